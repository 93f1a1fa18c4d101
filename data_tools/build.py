"""Builds a dataset: plan, shards, merge. The output is the same byte for byte, whatever processes wrote it.

Killed anywhere and run again, a build goes on where it was: what the disk holds whole is not written again.
"""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from data_tools.class_lists import read_class_list
from data_tools.leakage import LeakageFilter
from data_tools.merge import REJECTS_FILE, merge, tidy
from data_tools.parts import LOCK_FILE, PART_LOCKS, Part, claim
from data_tools.plan import Division, lay_out
from data_tools.plan_file import LEAKAGE_FILE, PLAN_FILE, ROWS_FILE, Plan, PlanSettings, read_plan, write_plan
from data_tools.progress import progress
from data_tools.reports import BuildReport, DatasetReport, PlanReport
from data_tools.shard_writer import OnBad, ShardJob, ShardReport, write_shard
from data_tools.sources.kinds import list_images
from data_tools.sources.listing import Listing
from data_tools.sources.spool import SPOOL_FOLDER
from data_tools.workers import ordered_map
from vitscale.data.index import DATASET_FILE, read_dataset
from vitscale.errors import ConfigError, ShardError

# Files a build writes; any other makes the folder someone else's.
SHARD_FILES = ("train-*.tar", "val-*.tar", "train-*.parquet", "val-*.parquet", "train.parquet", "val.parquet", "*.tmp")
PLAN_FILES = (PLAN_FILE, ROWS_FILE, LEAKAGE_FILE, SPOOL_FOLDER, LOCK_FILE, PART_LOCKS)
OWN_FILES = (*SHARD_FILES, *PLAN_FILES, REJECTS_FILE, DATASET_FILE)


@dataclass(frozen=True)
class BuildRun:
    """How shards are written. None of it changes a shard's bytes, but `on_bad` that of shards with bad images."""

    on_bad: OnBad
    workers: int
    recheck: bool
    keep_spool: bool


def plan_only(out: Path, settings: PlanSettings, workers: int) -> PlanReport:
    """Plan a build, if it is not planned by the same settings already.

    Raises:
        ShardError: the source is damaged, or `out` cannot take the build.
    """
    with _claim_own(out, None):
        return PlanReport(out, _planned(out, settings) or _make_plan(out, settings, workers))


def build(
    out: Path, settings: PlanSettings | None, run: BuildRun, part: Part | None = None
) -> BuildReport | DatasetReport:
    """Build `out`, or one part of it, by these settings; without settings by the plan that is there.

    Raises:
        ShardError: the source is damaged, has bad images under on_bad=fail, or `out` cannot take the build.
    """
    started = time.monotonic()
    with _claim_own(out, part):
        plan = _planned(out, settings)
        if plan is None and settings is not None and part is None:
            plan = _make_plan(out, settings, run.workers)
        if plan is None:
            raise ShardError(f"{out}: holds no plan: make it with vitscale-data plan --source ... --out {out}")
        if (out / DATASET_FILE).exists():
            _check_finished(out, plan, run.on_bad)
            tidy(out, keep_spool=run.keep_spool)
            return DatasetReport(out)
        _check_sources(out, plan)
        reports = _write_shards(out, plan, run, part or Part(1, 1))
        if part is None:
            merge(out, plan, keep_spool=run.keep_spool)
        return BuildReport(out, plan, reports, run.on_bad, part is not None, time.monotonic() - started)


def merge_parts(out: Path, *, keep_spool: bool) -> DatasetReport:
    """Make a dataset of a folder whose parts are all written.

    Raises:
        ShardError: there is no plan, or a shard is missing.
    """
    with _claim_own(out, None):
        plan = _planned(out, None)
        if plan is None:
            raise ShardError(f"{out}: holds no plan: give the --out of vitscale-data plan and build")
        if (out / DATASET_FILE).exists():
            tidy(out, keep_spool=keep_spool)
        else:
            merge(out, plan, keep_spool=keep_spool)
        return DatasetReport(out)


@contextmanager
def _claim_own(out: Path, part: Part | None) -> Iterator[None]:
    """Hold a folder that is new or of a build; what its disk refuses is told in one line."""
    try:
        foreign = [path.name for path in out.glob("*") if not any(path.match(pattern) for pattern in OWN_FILES)]
        if foreign:
            raise ShardError(
                f"{out}: holds {min(foreign)}, which no build writes: give an empty or new folder as --out"
            )
        with claim(out, part):
            yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = f"no room left ({error.strerror}): free some" if full else f"cannot be built ({error}): mend the folder"
        raise ShardError(f"{out}: {what}, then run it again; it goes on where it was") from None


def _planned(out: Path, settings: PlanSettings | None) -> Plan | None:
    """The plan that is there; it must be of these settings, if any are given."""
    plan = read_plan(out)
    if plan is None:
        if (out / DATASET_FILE).exists():
            raise ShardError(f"{out}: holds another finished dataset: give another --out")
        return None
    if settings is not None and settings != plan.settings:
        old, new = dict(plan.settings), dict(settings)
        name = next(name for name in old if old[name] != new[name])
        state = "another finished build" if (out / DATASET_FILE).exists() else "an unfinished build"
        raise ShardError(
            f"{out}: holds {state}, planned with {name} {old[name]}, not {new[name]}: give the same, another --out, or "
            "remove the folder"
        )
    return plan


def _make_plan(out: Path, settings: PlanSettings, workers: int) -> Plan:
    settings.preparation.require()
    for path in [path for pattern in SHARD_FILES for path in out.glob(pattern)]:
        path.unlink()  # without its plan nobody knows what it is
    listing = list_images(settings.source, out / SPOOL_FOLDER, workers)
    classes, label_space = _classes(settings, listing)
    division = Division(
        seed=settings.seed,
        val_fraction=settings.val_fraction,
        val_list=None if settings.val_list is None else _read_lines(settings.val_list),
        split_from_source=settings.split_from_source,
        shard_images=settings.shard_images,
        shard_bytes=settings.shard_bytes,
    )
    layout = lay_out(listing, classes, division)
    if layout.outside and settings.outside == "fail":
        wnid, count = next(iter(layout.outside.items()))
        raise ShardError(
            f"{settings.source.path}: {sum(layout.outside.values())} images are outside --classes {settings.classes}, "
            f"{count} of them in {wnid}: leave them out with --outside drop, or give other classes"
        )
    if settings.leakage is not None:
        reference = LeakageFilter.build(settings.leakage, distance=settings.leakage_distance, workers=workers)
        reference.save(out / LEAKAGE_FILE)
    return write_plan(out, settings, listing, classes, label_space, layout)


def _classes(settings: PlanSettings, listing: Listing) -> tuple[tuple[str, ...], str | None]:
    if settings.classes == "present":
        return tuple(sorted(listing.table["wnid"].combine_chunks().dictionary.to_pylist())), None
    return read_class_list(settings.classes)


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: --val-list cannot be read ({error}): give a text file with an image a line"
        ) from None


def _check_finished(out: Path, plan: Plan, on_bad: OnBad) -> None:
    stored = pq.read_schema(out / REJECTS_FILE).metadata
    built_with = stored[b"on_bad"].decode()
    if read_dataset(out).plan != plan.identity or built_with not in ("", on_bad):
        raise ShardError(
            f"{out}: holds another finished build, with --on-bad {built_with}: give another --out, or remove the folder"
        )


def _check_sources(out: Path, plan: Plan) -> None:
    for file in plan.files:
        path = out / plan.root / file.name
        if not path.is_file() or path.stat().st_size != file.size_bytes:
            raise ShardError(
                f"{path}: is missing or has another size than when the build was planned: put it back, or remove "
                f"{out} and plan again"
            )


def _write_shards(out: Path, plan: Plan, run: BuildRun, part: Part) -> list[ShardReport]:
    numbers = [number for number in range(len(plan.shards)) if part.takes(number)]
    own = {plan.shards[number].name.removesuffix(".tar") for number in numbers}
    for stale in out.glob("*.tmp"):
        if stale.name.partition(".")[0] in own:
            stale.unlink(missing_ok=True)
    write = partial(write_shard, on_bad=run.on_bad, recheck=run.recheck)
    written = ordered_map(write, [ShardJob(out, number) for number in numbers], run.workers)
    images = sum(plan.shards[number].samples for number in numbers)
    reports = list(progress(written, images, "image", lambda shard: shard.planned))
    bad = [reject for report in reports for reject in report.rejects if reject.bad]
    if bad and run.on_bad == "fail":
        raise ShardError(
            f"{plan.settings.source.path}: {bad[0].source}: {bad[0].reason}; {len(bad)} bad images in all: "
            "leave them out with --on-bad drop, or keep them with --on-bad keep"
        )
    return reports
