"""The commands that show what a dataset holds: `vitscale-data stats` and `inspect`."""

from pathlib import Path
from typing import Any

import click

from data_tools.command import json_option, tell
from data_tools.inspect import inspect
from data_tools.stats import stats
from vitscale.data.labels import LABEL_SPACES

folder_argument = click.argument("folder", type=click.Path(path_type=Path))
batch_option = click.option(
    "--batch",
    default=1024,
    show_default=True,
    type=click.IntRange(min=1),
    help="Samples a batch, for the mixing score.",
)
lanes_option = click.option(
    "--lanes", default=64, show_default=True, type=click.IntRange(min=1), help="data.lanes of the run, for mixing."
)
block_option = click.option(
    "--block", default=64, show_default=True, type=click.IntRange(min=1), help="data.block of the run, for mixing."
)


@click.command("stats", epilog="Example: vitscale-data stats shards --split train --label-space in21k_p_winter21")
@folder_argument
@click.option("--split", help="Split to describe; by default all.")
@click.option(
    "--label-space",
    metavar="SPACE",
    help=f"Count the samples that have a class of it: {', '.join(LABEL_SPACES)}. By default the dataset's classes.",
)
@batch_option
@lanes_option
@block_option
@json_option
def stats_command(
    folder: Path, split: str | None, label_space: str | None, batch: int, lanes: int, block: int, as_json: bool
) -> None:
    """Count classes, sizes and formats, and score how well batches of the training order mix the classes."""
    report = stats(folder, split=split, label_space=label_space, batch=batch, lanes=lanes, block=block)
    tell(report, as_json)


@click.command("inspect", epilog="Example: vitscale-data inspect shards --out report --samples 128")
@folder_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the report.")
@click.option("--split", help="Split to look at; by default train, or the first if there is none.")
@click.option("--samples", default=64, show_default=True, type=click.IntRange(min=1, max=4096), help="Samples to show.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of their choice.")
@batch_option
@lanes_option
@block_option
@json_option
def inspect_command(folder: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write contact-sheet.png and index.html: samples, distributions, classes, rejects and the mixing score."""
    tell(inspect(folder, out, **options), as_json)
