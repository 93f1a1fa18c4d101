"""`vitscale import`."""

from pathlib import Path
from typing import Any

import click

from vitscale.checkpoint import read_portable, write_portable
from vitscale.cli.portable_options import (
    changes_of_weights,
    export_options,
    hints,
    read_options,
    report,
    write_options,
)
from vitscale.config import load_config
from vitscale.errors import CheckpointError
from vitscale.train.adoption import adopt_deepspeed


@click.command(name="import", short_help="Import weights of others.")
@click.argument("source", type=click.Path(path_type=Path))
@read_options
@write_options
@click.option(
    "--training",
    metavar="CONFIG",
    type=click.Path(path_type=Path),
    help="Take DeepSpeed's training state, for a run of this config to go on from. Overrides are the config's then.",
)
def command(
    source: Path,
    out: Path,
    overrides: tuple[str, ...],
    from_: str | None,
    model: str | None,
    labels: Path | None,
    unsafe_pickle: bool,
    training: Path | None,
    **chosen: Any,
) -> None:
    """Turn weights of timm, Hugging Face, Google, DeiT, DINO, MIIL or DeepSpeed into our safetensors and card.

    The result is what `init.path` of a config takes. A file without a config (.pth, .pt, .bin, .safetensors) does
    not say what it is, nor does a folder that DeepSpeed's save_checkpoint wrote (any ZeRO stage and number of ranks,
    or universal): --model does.

    With --training the result is a run directory with one checkpoint, for `run.branch_from`: DeepSpeed's fp32 weights,
    Adam's two moments and the step count.

    \b
    Examples:
      vitscale import ViT-H_14.npz --out exports/vit-huge-in21k
      vitscale import dino_vitbase16_pretrain.pth --model vit_base_patch16_224_dino --out exports/dino-b16
      vitscale import mine.pth --model vit_base_patch16_224 model.depth=6 --labels classes.txt --out exports/mine
      vitscale import old/checkpoints --from deepspeed --model vit_huge_patch14_224 --out exports/old
      vitscale import old/checkpoints --training configs/in21k/vit_huge_patch14.yaml --out runs/old
    """
    if training is None:
        found = read_portable(source, from_, hints(model, labels, overrides, unsafe_pickle))
        report(write_portable(found, out, export_options("vitscale", **chosen)), out)
        return
    told = {"--from": from_ not in (None, "deepspeed"), "--model": model, "--labels": labels}
    if idle := [flag for flag, given in told.items() if given] + changes_of_weights(**chosen):
        raise CheckpointError(f"{idle[0]} has no effect with --training, which takes the state as it is: leave it out")
    tag = adopt_deepspeed(source, load_config(training, overrides), out, unsafe_pickle)
    click.echo(f"{tag}: fp32 weights, both moments and the step count; go on from it with run.branch_from={out}")
