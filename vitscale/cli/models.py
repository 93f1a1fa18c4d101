"""`vitscale models`."""

import click
import torch

from vitscale.model import VARIANTS, create_model, forward_flops


@click.command(name="models", short_help="List the variants.")
def command() -> None:
    """List the model variants: shape, parameters and forward FLOPs of one image.

    \b
    Example:
      vitscale models
    """
    click.echo(
        f"{'name':34}{'patch':>6}{'width':>6}{'depth':>6}{'heads':>6}{'hidden':>7}{'repr.':>6}{'classes':>8}"
        f"{'img px':>7}{'parameters':>15}{'forward GF':>11}"
    )
    for name, variant in VARIANTS.items():
        with torch.device("meta"):
            model = create_model(name, num_classes=variant.num_classes)
        parameters = sum(p.numel() for p in model.parameters())
        click.echo(
            f"{name:34}{variant.patch_size:>6}{variant.embed_dim:>6}{variant.depth:>6}{variant.num_heads:>6}"
            f"{variant.mlp_hidden:>7}{variant.representation_size:>6}{variant.num_classes:>8}{variant.img_size:>7}"
            f"{parameters:>15,}{forward_flops(variant) / 1e9:>11.2f}"
        )
