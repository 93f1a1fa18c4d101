"""`vitscale bench start`."""

from functools import partial
from pathlib import Path

import click

from vitscale.bench.data import work_folder
from vitscale.bench.start import StartBench, report_start
from vitscale.model import resolve_variant


@click.command()
@click.option("--model", default="vit_giant_patch14_224", show_default=True, help="Variant of the run on paper.")
@click.option("--nodes", default=512, show_default=True, type=click.IntRange(min=1), help="Of the run on paper.")
@click.option("--ranks-per-node", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--samples", default=13_153_500, show_default=True, type=click.IntRange(min=1), help="Of its dataset.")
@click.option(
    "--ranks",
    multiple=True,
    default=(32, 64, 128),
    show_default=True,
    type=click.IntRange(min=2),
    help="Processes that meet on this machine; two numbers at least.",
)
@click.option(
    "--index-samples", default=1_000_000, show_default=True, type=click.IntRange(min=1), help="Converted here."
)
@click.option("--built", default="vit_base_patch16_224", show_default=True, help="Variant built and hashed here.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Of what can be repeated.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Folder to work in, not to be removed.")
def start(
    model: str, nodes: int, ranks_per_node: int, samples: int, ranks: tuple[int, ...], index_samples: int, built: str,
    rounds: int, keep: Path | None,
) -> None:  # fmt: skip
    """What a start costs by part: measured here, and on paper for many nodes.

    \b
    Examples:
      vitscale bench start
      vitscale bench start --nodes 64 --model vit_huge_patch14_224
    """
    for name in (model, built):
        resolve_variant(name)  # says which names there are
    if len(set(ranks)) < 2:
        raise click.BadParameter("give two different numbers at least", param_hint="--ranks")
    with work_folder(keep) as folder:
        bench = StartBench(
            folder, model, nodes, ranks_per_node, samples, ranks, index_samples, built, rounds,
            partial(click.echo, err=True),
        )  # fmt: skip
        for line in report_start(bench):
            click.echo(line)
