"""The commands `index` and `verify`."""

from pathlib import Path

import click

from data_tools.class_lists import read_class_list
from data_tools.command import json_option, tell, workers_option
from data_tools.index_shards import find_shards, index_shards
from data_tools.verify import verify
from vitscale.errors import ShardError


@click.command(
    "index",
    epilog="Example: vitscale-data index 'imagenet21k-train-{0000..2047}.tar' --out index --classes in21k_winter21",
)
@click.argument("shards", nargs=-1, required=True)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write, which may be the shards'."
)
@click.option("--val", "val", multiple=True, metavar="SHARDS", help="Shards of the val split; may be given repeatedly.")
@click.option(
    "--classes",
    metavar="SPACE|FILE",
    help="What numeric labels mean: a label space, or a file with a wnid a line; by default the wnids in the shards.",
)
@click.option(
    "--no-crc", is_flag=True, help="Read headers only: many times faster, but readers cannot check the bytes."
)
@workers_option
@json_option
def index_command(
    shards: tuple[str, ...],
    out: Path,
    val: tuple[str, ...],
    classes: str | None,
    no_crc: bool,
    workers: int,
    as_json: bool,
) -> None:
    """Make a dataset of WebDataset shards that exist already, in one pass; they stay as they are.

    SHARDS are tar files, folders of them, or names with wildcards or {0000..2047}.
    """
    wnids, label_space = (None, None) if classes is None else read_class_list(classes)
    splits = {"train": find_shards(shards)} | ({"val": find_shards(val)} if val else {})
    report = index_shards(splits, out, classes=wnids, label_space=label_space, crc=not no_crc, workers=workers)
    tell(report, as_json)


@click.command("verify", epilog="Example: vitscale-data verify shards --decode")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--decode", "decode_images", is_flag=True, help="Decode every image too.")
@workers_option
@json_option
def verify_command(directory: Path, decode_images: bool, workers: int, as_json: bool) -> None:
    """Check that a dataset is whole: its files, the structure of its shards, and the crc32 of every sample."""
    report = verify(directory, decode_images=decode_images, workers=workers)
    tell(report, as_json)
    if report.faults:
        count = len(report.faults)
        raise ShardError(f"{directory}: {count} faults: copy the named files again or build the dataset again")
