"""`vitscale export`."""

from pathlib import Path

import click

from vitscale.checkpoint import CARD_NAME, WEIGHTS_NAME, export_model


@click.command(name="export", short_help="Export a checkpoint.")
@click.argument("source", metavar="RUN_OR_CHECKPOINT", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to create.")
@click.option("--format", "format_", type=click.Choice(["vitscale"]), default="vitscale", show_default=True)
def command(source: Path, out: Path, format_: str) -> None:
    """Export a run's newest valid checkpoint, or the one that is named, as fp32 safetensors and a JSON card.

    Works for a checkpoint of any ZeRO stage and any number of ranks; needs no GPU.

    \b
    Examples:
      vitscale export runs/demo-pretrain --out exports/demo
      vitscale export runs/demo-pretrain/checkpoints/step-00000300 --out exports/demo-300
    """
    card = export_model(source, out)
    size_mb = card.weights.size_bytes / 1e6
    click.echo(f"{out}: {WEIGHTS_NAME} ({size_mb:.1f} MB, fp32) and {CARD_NAME} of step {card.trained['step']}")
