"""The command `vitscale-data`."""

import os
import sys
from pathlib import Path
from typing import get_args

import click

from data_tools.build import BuildSettings, Check, OnBad, build
from data_tools.verify import verify
from vitscale.errors import ShardError, VitscaleError

CORES = len(os.sched_getaffinity(0))


def main() -> None:
    """Run the command; an error its user can mend is one line on stderr and the error's exit status."""
    try:
        cli(prog_name="vitscale-data")
    except VitscaleError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.status)


@click.group()
def cli() -> None:
    """Build and check shards."""


@cli.command(
    "build",
    epilog="Example: vitscale-data build --source class-tars winter21 --out shards --val-fraction 0.01 --on-bad drop",
)
@click.option(
    "--source",
    "source",
    required=True,
    nargs=2,
    type=(click.Choice(["class-tars"]), click.Path(path_type=Path)),
    metavar="class-tars SRC",
    help="A folder with one tar of images a class, named by its wnid: n01440764.tar, ...",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write; new, or of a stopped build."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of shuffle and split.")
@click.option(
    "--val-fraction",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Part of each class that goes to val; 0 writes no val split, 1 nothing else.",
)
@click.option("--shard-images", default=4096, show_default=True, type=click.IntRange(min=1), help="Images a shard.")
@click.option("--workers", default=CORES, show_default="cores", type=click.IntRange(min=1), help="Processes.")
@click.option(
    "--on-bad",
    default="fail",
    show_default=True,
    type=click.Choice(get_args(OnBad)),
    help="What to do with images that cannot be read: stop, leave out, or keep (training then replaces them).",
)
@click.option(
    "--check",
    default="decode",
    show_default=True,
    type=click.Choice(get_args(Check)),
    help="How an image is tested: decoded whole, or (faster) its header only, which misses truncated files.",
)
def build_command(
    source: tuple[str, Path],
    out: Path,
    seed: int,
    val_fraction: float,
    shard_images: int,
    workers: int,
    on_bad: OnBad,
    check: Check,
) -> None:
    """Write shards, an index a split and dataset.json, shuffled over all classes."""
    settings = BuildSettings(seed, val_fraction, shard_images, on_bad, check)
    for line in build(source[1], out, settings, workers):
        click.echo(line)


@cli.command("verify", epilog="Example: vitscale-data verify shards --decode")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--decode", "decode_images", is_flag=True, help="Decode every image too.")
@click.option("--workers", default=CORES, show_default="cores", type=click.IntRange(min=1), help="Processes.")
def verify_command(directory: Path, decode_images: bool, workers: int) -> None:
    """Check that a built dataset is whole: its files, and the crc32 of every sample."""
    samples, faults = verify(directory, decode_images, workers)
    for fault in faults:
        click.echo(fault)
    if faults:
        raise ShardError(f"{directory}: {len(faults)} faults: copy the named files again or build the dataset again")
    click.echo(f"{directory}: {samples} samples are sound")
