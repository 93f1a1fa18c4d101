"""`vitscale export`."""

from pathlib import Path
from typing import Any

import click

from vitscale.checkpoint import export_model
from vitscale.cli.portable_options import export_options, format_option, report, verify_option, write_options


@click.command(name="export", short_help="Export a checkpoint.")
@click.argument("source", metavar="RUN_OR_CHECKPOINT", type=click.Path(path_type=Path))
@format_option(default="vitscale")
@write_options
@click.option("--weights", type=click.Choice(["raw", "ema"]), default="raw", show_default=True, help="Which weights.")
@verify_option
def command(source: Path, format_: str, out: Path, weights: str, verify: bool, **chosen: Any) -> None:
    """Export a run's newest valid checkpoint, or the one that is named, with a certificate.

    Works for a checkpoint of any ZeRO stage and any number of ranks; needs no GPU, and memory for the largest
    tensor only. What was written is read back and compared before it gets its name.

    \b
    Formats:
      vitscale     safetensors + card.json: every architecture
      timm         timm.create_model("local-dir:PATH", pretrained=True)
      hf           transformers: ViTForImageClassification, ViTModel, DeiTForImageClassificationWithTeacher
      npz          Google's vision_transformer
      big_vision   Google's big_vision

    \b
    Examples:
      vitscale export runs/demo-pretrain --out exports/demo
      vitscale export runs/demo-pretrain/checkpoints/step-00000300 --format timm --features-only --out exports/timm
      vitscale export runs/in21k-vit-huge-patch14 --format npz --verify --out exports/vit-huge-npz
    """
    report(export_model(source, out, export_options(format_, verify, **chosen), weights=weights), out)
