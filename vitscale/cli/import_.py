"""`vitscale import`."""

from pathlib import Path
from typing import Any

import click

from vitscale.checkpoint import read_portable, write_portable
from vitscale.cli.portable_options import export_options, hints, read_options, report, write_options


@click.command(name="import", short_help="Import weights of others.")
@click.argument("source", type=click.Path(path_type=Path))
@read_options
@write_options
def command(
    source: Path,
    out: Path,
    overrides: tuple[str, ...],
    from_: str | None,
    model: str | None,
    labels: Path | None,
    **chosen: Any,
) -> None:
    """Turn weights of timm, Hugging Face, Google, DeiT, DINO or MIIL into our safetensors and card.

    The result is what `init.path` of a config takes. A file without a config (.pth, .pt, .bin, .safetensors) does
    not say what it is: --model does.

    \b
    Examples:
      vitscale import ViT-H_14.npz --out exports/vit-huge-in21k
      vitscale import dino_vitbase16_pretrain.pth --model vit_base_patch16_224_dino --out exports/dino-b16
      vitscale import mine.pth --model vit_base_patch16_224 model.depth=6 --labels classes.txt --out exports/mine
    """
    found = read_portable(source, from_, hints(model, labels, overrides))
    report(write_portable(found, out, export_options("vitscale", **chosen)), out)
