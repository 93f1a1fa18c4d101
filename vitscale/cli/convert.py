"""`vitscale convert`."""

from pathlib import Path
from typing import Any

import click

from vitscale.checkpoint import read_portable, write_portable
from vitscale.cli.portable_options import (
    export_options,
    format_option,
    hints,
    read_options,
    report,
    verify_option,
    write_options,
)


@click.command(name="convert", short_help="Convert between portable formats.")
@click.argument("source", type=click.Path(path_type=Path))
@format_option(default=None)
@read_options
@write_options
@verify_option
def command(
    source: Path,
    format_: str,
    out: Path,
    overrides: tuple[str, ...],
    from_: str | None,
    model: str | None,
    labels: Path | None,
    unsafe_pickle: bool,
    verify: bool,
    **chosen: Any,
) -> None:
    """Turn an exported model, of any format and any origin, into another format, with a certificate.

    \b
    Examples:
      vitscale convert ViT-H_14.npz --format timm --features-only --out exports/vit-huge-timm
      vitscale convert deit_base_patch16_224-b5f2ef4d.pth --model deit_base_patch16_224 --format hf --out exports/deit
    """
    found = read_portable(source, from_, hints(model, labels, overrides, unsafe_pickle))
    report(write_portable(found, out, export_options(format_, verify, **chosen)), out)
