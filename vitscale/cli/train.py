"""`vitscale train`."""

import logging
import os
import sys
from pathlib import Path

import click

from vitscale.config import load_config
from vitscale.errors import ExitStatus
from vitscale.ranks.placement import read_placement
from vitscale.train.run import run_training


@click.command(name="train", short_help="Pretrain or fine-tune.")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--allow-change",
    multiple=True,
    metavar="KEY",
    help="A config key that may differ from what the run directory was started with.",
)
@click.option(
    "--fresh",
    is_flag=True,
    help="Begin at step 0 in a run directory that has lost all its checkpoints; refused where there is one.",
)
def command(config: Path, overrides: tuple[str, ...], allow_change: tuple[str, ...], fresh: bool) -> ExitStatus:
    """Pretrain or fine-tune as CONFIG says, going on where its run directory left off.

    Runs alone, under torchrun, the deepspeed launcher or mpirun, or as the tasks of a Slurm step, with the same
    arguments (docs/launching.md).

    \b
    Examples:
      vitscale train configs/demo-pretrain.yaml optim.peak_lr=1e-3
      torchrun --nproc-per-node 8 -m vitscale train configs/in21k/vit_huge_patch14.yaml
      deepspeed --module vitscale train configs/in21k/vit_huge_patch14.yaml

    \b
    Exit status: 0 finished, 2 an error to mend, 3 divergence, 75 checkpointed on request (run it again),
    anything else transient. RUN/exit.json has it too, for launchers that hide it.
    """
    # Before the ranks have met, the launcher's variables are all there is to tell them apart.
    start_log(read_placement(os.environ).rank, for_eyes=sys.stderr.isatty())
    return run_training(load_config(config, overrides), allow_change, fresh)


def start_log(rank: int, for_eyes: bool) -> None:
    """Rank 0 tells all, the others warnings, with their rank; in a file every line has its time."""
    words = ["%(message)s"] if rank == 0 else [f"rank {rank}:", "%(message)s"]
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=" ".join(words if for_eyes else ["%(asctime)s", *words]),
        datefmt="%Y-%m-%d %H:%M:%S",
    )
