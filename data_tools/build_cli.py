"""The commands `plan`, `build`, `merge` and `bench`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from data_tools.bench import bench
from data_tools.build import BuildRun, build, merge_parts, plan_only
from data_tools.class_lists import read_class_list
from data_tools.command import json_option, tell, workers_option
from data_tools.parts import read_part
from data_tools.plan_file import PlanSettings
from data_tools.prepare import Preparation, parse_reencode
from data_tools.shard_writer import OnBad
from data_tools.sources.kinds import Source, SourceKind
from vitscale.data.labels import LABEL_SPACES
from vitscale.errors import ConfigError

Command = Callable[..., None]

keep_spool_option = click.option(
    "--keep-spool", is_flag=True, help="Keep the copied source of winter21-gz and parquet after the build."
)

PLAN_OPTIONS = (
    click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of shuffle and split."),
    click.option(
        "--val-fraction",
        default=0.0,
        show_default=True,
        type=click.FloatRange(0, 1),
        help="Part of each class that goes to val; 0 writes no val split, 1 nothing else.",
    ),
    click.option(
        "--val-list",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Images that go to val, a key or a name such as n01440764/n01440764_18.JPEG a line.",
    ),
    click.option(
        "--split-from-source",
        is_flag=True,
        help="Train and val as the source's folders or files are named: imagenet21k_val, val, validation-00000, ...",
    ),
    click.option("--shard-images", default=4096, show_default=True, type=click.IntRange(min=1), help="Images a shard."),
    click.option("--shard-bytes", type=click.IntRange(min=1), help="Bytes a shard, about; in place of --shard-images."),
    click.option(
        "--classes",
        default="present",
        show_default=True,
        metavar="present|SPACE|FILE",
        help="Classes in label order: those of the source by wnid, a label space, or a file with a wnid a line. "
        f"Label spaces: {', '.join(LABEL_SPACES)}.",
    ),
    click.option(
        "--outside",
        default="drop",
        show_default=True,
        type=click.Choice(["drop", "fail"]),
        help="Images of other classes: leave out and count, or stop.",
    ),
    click.option(
        "--check",
        default="decode",
        show_default=True,
        type=click.Choice(["decode", "header"]),
        help="How an image is tested: decoded whole, or (faster) its header only, which misses truncated files.",
    ),
    click.option(
        "--max-short-edge",
        type=click.IntRange(min=1),
        metavar="PX",
        help="Make larger images smaller, so that their shorter side has this many pixels.",
    ),
    click.option(
        "--reencode",
        default="never",
        show_default=True,
        metavar="never|baseline|QUALITY",
        help="baseline: rewrite progressive JPEGs without loss, they decode twice as fast. A number from 1 to 100: "
        "make every image a JPEG of this quality.",
    ),
    click.option(
        "--leakage",
        type=click.Path(path_type=Path),
        metavar="REFERENCE",
        help="Leave out copies and near copies of the images of this folder or dataset, such as ImageNet-1k's val.",
    ),
    click.option(
        "--leakage-distance",
        default=4,
        show_default=True,
        type=click.IntRange(0, 16),
        help="Bits of the 64 of a perceptual hash in which near copies may differ.",
    ),
    click.option("--image-column", help="Column of images in a Parquet or Arrow source; by default the binary one."),
    click.option("--label-column", help="Column of classes there; by default wnid, label or the like."),
    click.option(
        "--source-classes",
        metavar="SPACE|FILE",
        help="What numeric labels of a parquet or shards source mean: a label space, or a file with a wnid a line.",
    ),
)


def source_option(required: bool) -> Callable[[Command], Command]:
    """`--source KIND PATH`."""
    return click.option(
        "--source",
        "source",
        required=required,
        nargs=2,
        type=(click.Choice(get_args(SourceKind)), click.Path(path_type=Path)),
        metavar="KIND PATH",
        help="class-tars: a folder with a tar a class; fall11: fall11_whole.tar; winter21-gz: winter21_whole.tar.gz; "
        "image-folder: ROOT/CLASS/IMAGE; parquet: tables with a column of images; shards: WebDataset shards.",
    )


def plan_options(command: Command) -> Command:
    """Options that decide what a build holds."""
    for option in reversed(PLAN_OPTIONS):
        command = option(command)
    return command


def read_settings(source: tuple[SourceKind, Path], options: dict[str, Any]) -> PlanSettings:
    """Settings of a plan from a command's options."""
    if sum((options["val_fraction"] > 0, options["val_list"] is not None, options["split_from_source"])) > 1:
        raise ConfigError("--val-fraction, --val-list and --split-from-source: choose one of them")
    kind, path = source
    source_classes = options.pop("source_classes")
    columns = {name: options.pop(name) for name in ("image_column", "label_column")}
    if kind != "parquet" and any(columns.values()):
        raise ConfigError(f"--image-column and --label-column: are for --source parquet, not {kind}")
    if kind not in ("parquet", "shards") and source_classes is not None:
        raise ConfigError(f"--source-classes: is for --source parquet and shards, not {kind}")
    classes = read_class_list(source_classes)[0] if source_classes is not None else None
    preparation = Preparation(
        check=options.pop("check"),
        max_short_edge=options.pop("max_short_edge"),
        reencode=parse_reencode(options.pop("reencode")),
    )
    return PlanSettings(
        source=Source(kind=kind, path=path.resolve(), classes=classes, **columns), preparation=preparation, **options
    )


@click.command(
    "plan",
    epilog="Example: vitscale-data plan --source fall11 fall11_whole.tar --out shards --classes in21k_fall11",
)
@source_option(required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the build; new.")
@plan_options
@workers_option
@json_option
def plan_command(source: tuple[SourceKind, Path], out: Path, workers: int, as_json: bool, **options: Any) -> None:
    """Decide which image goes into which shard, for `build` to follow, in one process or in many parts."""
    tell(plan_only(out, read_settings(source, options), workers), as_json)


@click.command(
    "build",
    epilog="Example: vitscale-data build --source class-tars winter21 --out shards --val-fraction 0.01 --on-bad drop",
)
@source_option(required=False)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write; new, planned, or of a stopped build.",
)
@plan_options
@click.option(
    "--on-bad",
    default="fail",
    show_default=True,
    type=click.Choice(get_args(OnBad)),
    help="What to do with images that cannot be read: stop, leave out, or keep (training then replaces them).",
)
@click.option(
    "--part", metavar="I/N|slurm", help="Write one of N parts of a planned build; slurm: this task's part of its array."
)
@click.option("--recheck", is_flag=True, help="Compare finished shards with their checksums, not their sizes alone.")
@workers_option
@keep_spool_option
@json_option
@click.pass_context
def build_command(
    context: click.Context,
    /,
    source: tuple[SourceKind, Path] | None,
    out: Path,
    on_bad: OnBad,
    part: str | None,
    recheck: bool,
    workers: int,
    keep_spool: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write shards, an index a split and dataset.json, shuffled over all classes.

    Run again after any end, it goes on where it was. Without --source it follows the plan in OUT.
    """
    given = [name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if source is None and given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')}: belongs to the plan: give --source too, or leave it to the plan"
        )
    settings = None if source is None else read_settings(source, options)
    run = BuildRun(on_bad=on_bad, workers=workers, recheck=recheck, keep_spool=keep_spool)
    tell(build(out, settings, run, None if part is None else read_part(part, os.environ)), as_json)


@click.command("merge", epilog="Example: vitscale-data merge shards")
@click.argument("out", type=click.Path(path_type=Path))
@keep_spool_option
@json_option
def merge_command(out: Path, keep_spool: bool, as_json: bool) -> None:
    """Make a dataset of a folder whose parts are all built."""
    tell(merge_parts(out, keep_spool=keep_spool), as_json)


@click.command("bench", epilog="Example: vitscale-data bench /scratch/bench")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--images", default=20_000, show_default=True, type=click.IntRange(min=1), help="Images of 100 KB.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Rounds of each contender.")
@json_option
def bench_command(folder: Path, images: int, rounds: int, as_json: bool) -> None:
    """Measure the builder beside webdataset.ShardWriter, in a new folder that is removed afterwards."""
    tell(bench(folder, images, rounds), as_json)
