"""`vitscale checkpoint`."""

import datetime
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import yaml
from pydantic import ValidationError

from vitscale.checkpoint import CheckpointStore, FileRecord, Manifest, Mirror
from vitscale.checkpoint.containers import SAFETENSORS_NAMES
from vitscale.checkpoint.index import read_index
from vitscale.checkpoint.source import tag_directory
from vitscale.checkpoint.tags import is_tag, overtaken_tags, read_tag, step_of
from vitscale.config import CheckpointSection
from vitscale.config.checkpoint import ValidationMetric
from vitscale.errors import CheckpointError, ConfigError

_COLUMNS = ("tag", "age", "size", "ranks", "ZeRO", "start", "sound", "metrics")
_KEEP = ("keep_last", "keep_every_steps", "keep_best")
_ELEMENT_BYTES = {name: dtype.itemsize for dtype, name in SAFETENSORS_NAMES.items()}
_PATIENCE_S = 20.0


@click.group(name="checkpoint", short_help="Look after checkpoints.")
def command() -> None:
    """Show, check and remove what a run has saved.

    \b
    Examples:
      vitscale checkpoint list runs/in21k-vit-huge-patch14
      vitscale checkpoint verify s3://bucket/runs/in21k-vit-huge-patch14
      vitscale checkpoint inspect runs/in21k-vit-huge-patch14/checkpoints/step-00200000
      vitscale checkpoint prune runs/in21k-vit-huge-patch14 --keep-last 1 --dry-run
    """


@command.command(name="list", short_help="What is saved, and what was cut off.")
@click.argument("run")
def list_(run: str) -> None:
    """List the checkpoints, the newest last. Sound is said by manifests and sizes: `verify` reads every byte.

    RUN: its directory, or the URL of its folder in a mirror.

    \b
    Example:
      vitscale checkpoint list runs/in21k-vit-huge-patch14
    """
    place = _open(run)
    _tags(place, run)
    manifests, faults = place.manifests()
    past = place.passed_over(manifests) if isinstance(place, CheckpointStore) else overtaken_tags(manifests)
    incomplete = set(place.incomplete(manifests))
    now = datetime.datetime.now(datetime.UTC)
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for tag in sorted([*manifests, *faults], key=step_of):
        if tag in faults:
            rows.append((tag, *[""] * 5, "no", ""))
            continue
        manifest = manifests[tag]
        pinned = isinstance(place, CheckpointStore) and place.is_pinned(tag)
        sound = "no" if tag in incomplete else "passed over" if tag in past else "yes, kept" if pinned else "yes"
        rows.append((*_row(manifest, now), sound, _metrics(manifest)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:6], widths[1:6], strict=True)]
        click.echo("  ".join([row[0].ljust(widths[0]), *numbers, row[6].ljust(widths[6]), row[7]]).rstrip())
    for line in [*faults.values(), *(f"{_where(place, tag)}: {why}" for tag, why in past.items())]:
        click.echo(line)
    for name in place.unfinished():
        click.echo(f"{_where(place, name)}: under way, or cut off: no checkpoint")


@command.command(short_help="Read every byte and compare.")
@click.argument("run")
def verify(run: str) -> None:
    """Read every byte of every checkpoint and compare it with what was recorded: a line for each problem.

    RUN: its directory, or the URL of its folder in a mirror. Exit status 2 if anything is wrong.

    \b
    Example:
      vitscale checkpoint verify runs/in21k-vit-huge-patch14
    """
    place = _open(run)
    tags = _tags(place, run)
    bad = 0
    for tag in tags:
        faults = place.faults(tag)
        bad += bool(faults)
        for line in faults or [f"{_where(place, tag)}: sound"]:
            click.echo(line)
    if bad:
        raise CheckpointError(
            f"{run}: {bad} of {len(tags)} checkpoints are damaged: restore them from a copy, or remove them; "
            "a run goes on from its newest sound one"
        )


@command.command(short_help="Show what a checkpoint holds.")
@click.argument("path")
def inspect(path: str) -> None:
    """Show what a checkpoint holds and what it came from, as its manifest says.

    PATH: a run, whose newest checkpoint is taken, or one of its checkpoints/step-*, or the URL of either in a mirror.

    \b
    Example:
      vitscale checkpoint inspect runs/in21k-vit-huge-patch14/checkpoints/step-00200000
    """
    where, manifest, directory = _one(path)
    click.echo(where)
    for label, value in _facts(manifest, directory):
        click.echo(f"  {label:<15}{value}")
    click.echo("\n" + yaml.safe_dump({"config": manifest.config}, sort_keys=False).rstrip())


@command.command(short_help="Remove old checkpoints.")
@click.argument("run")
@click.option("--keep-last", type=click.IntRange(1), help="Newest sound ones to keep.")
@click.option("--keep-every-steps", type=click.IntRange(1), help="Keep those at multiples of so many steps.")
@click.option("--keep-best", type=click.Choice(get_args(ValidationMetric)), help="Keep the best by this metric.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def prune(run: str, dry_run: bool, **chosen: Any) -> None:
    """Remove old checkpoints, and what cut-off saves left. What is not given is as the run's own config says.

    The newest sound checkpoint is read whole first and always stays; so do pinned ones (a file `keep` in them).

    \b
    Example:
      vitscale checkpoint prune runs/in21k-vit-huge-patch14 --keep-last 1 --keep-every-steps 50000 --dry-run
    """
    if "://" in run:
        raise ConfigError(f"{run}: a mirror is pruned by its run: give the run's directory")
    store = CheckpointStore(Path(run))
    newest = store.newest_valid()
    if newest is None:
        raise _nothing(run)
    tag, manifest, passed_over = newest
    for line in passed_over:
        click.echo(line)
    keep = _retention(manifest, chosen)
    gone = store.doomed(keep, tag) if dry_run else store.prune(keep, tag)
    for name in gone:
        click.echo(f"{'would remove' if dry_run else 'removed'} {store.path(name)}")
    left = set(store.tags()) - set(gone)
    click.echo(f"{len(left)} checkpoints {'would be' if dry_run else 'are'} left: {', '.join(sorted(left))}")


def _open(run: str) -> CheckpointStore | Mirror:
    return Mirror(run, _PATIENCE_S) if "://" in run else CheckpointStore(Path(run))


def _one(path: str) -> tuple[str, Manifest, Path | None]:
    """Name, manifest and, on a disk, directory of the checkpoint that a path or a URL stands for."""
    parent, _, name = path.rstrip("/").rpartition("/")
    if "://" in path and is_tag(name):
        return path, Mirror(parent, _PATIENCE_S).manifest(name), None
    if "://" not in path and (directory := tag_directory(Path(path))) is not None:
        return path, read_tag(directory), directory
    place = _open(path)
    tag = _tags(place, path)[-1]
    directory = place.path(tag) if isinstance(place, CheckpointStore) else None
    return _where(place, tag), place.manifest(tag), directory


def _tags(place: CheckpointStore | Mirror, run: str) -> list[str]:
    if not (tags := place.tags()):
        if isinstance(place, CheckpointStore):
            place.newest_valid()  # tells where there was one once
        raise _nothing(run)
    return tags


def _nothing(run: str) -> CheckpointError:
    return CheckpointError(f"{run}: no checkpoint here: give a run directory, or the URL of its folder in a mirror")


def _where(place: CheckpointStore | Mirror, name: str) -> str:
    return f"{place.url}/{name}" if isinstance(place, Mirror) else str(place.path(name))


def _row(manifest: Manifest, now: datetime.datetime) -> tuple[str, ...]:
    engine = manifest.config.get("engine") or {}
    return (
        f"step-{manifest.step:08d}",
        _age(manifest.saved_at, now),
        _size(sum(record.size_bytes for record in manifest.files)),
        str(manifest.world_size),
        str(engine.get("zero_stage", "?")) if engine.get("kind") == "deepspeed" else "-",
        str(manifest.generation),
    )


def _age(saved_at: str, now: datetime.datetime) -> str:
    try:
        age_s = (now - datetime.datetime.fromisoformat(saved_at)).total_seconds()
    except (ValueError, TypeError):
        return "?"
    for unit, unit_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if age_s >= 2 * unit_s:
            return f"{age_s / unit_s:.0f} {unit}"
    return f"{max(age_s, 0):.0f} s"


def _size(size_bytes: int) -> str:
    for unit, unit_bytes in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.1f} {unit}"
    return f"{size_bytes} B"


def _metrics(manifest: Manifest) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items())


def _facts(manifest: Manifest, directory: Path | None) -> Iterator[tuple[str, str]]:
    now = datetime.datetime.now(datetime.UTC)
    _, age, size, ranks, stage, start = _row(manifest, now)
    yield "saved", f"{manifest.saved_at} ({age} ago) by start {start} of the run"
    yield "step", f"{manifest.step:,} ({manifest.optimizer_steps:,} updates)"
    yield "layout", f"{ranks} ranks, " + ("no ZeRO" if stage == "-" else f"ZeRO {stage}")
    yield "cursor", _pairs(manifest.cursor)
    if manifest.course:
        yield "course", _pairs(manifest.course)
    yield "metrics", _metrics(manifest) or "none"
    yield "versions", _pairs(manifest.versions)
    numel = sum(math.prod(shape) for shape in manifest.shapes.values())
    yield "parameters", f"{numel:,} in {len(manifest.shapes):,} tensors"
    if directory is not None:
        by_value = _bytes_by_value(directory, manifest)
        yield "values", ", ".join(f"{name} {_size(size_bytes)}" for name, size_bytes in by_value.items())
    yield "files", f"{len(manifest.files):,}, {size}: {_files(manifest.files)}"


def _bytes_by_value(directory: Path, manifest: Manifest) -> Counter[str]:
    total: Counter[str] = Counter()
    for by_value in read_index(directory, manifest).values.values():
        for value, strides in by_value.items():
            total[value] += sum(s.numel * s.runs * _ELEMENT_BYTES[s.dtype] for s in strides)
    return total


def _files(files: Sequence[FileRecord]) -> str:
    shown = [f"{record.name} {_size(record.size_bytes)}" for record in files[:4]]
    return ", ".join(shown) + (" ..." if len(files) > len(shown) else "")


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _retention(manifest: Manifest, chosen: dict[str, Any]) -> CheckpointSection:
    own = manifest.config.get("checkpoint") or {}
    given = {key: value for key, value in chosen.items() if value is not None}
    try:
        return CheckpointSection.model_validate({key: own[key] for key in _KEEP if key in own} | given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"step {manifest.step}: its config's checkpoint.{'.'.join(map(str, first['loc']))}: {first['msg']}: "
            f"give --{str(first['loc'][0]).replace('_', '-')}"
        ) from None
