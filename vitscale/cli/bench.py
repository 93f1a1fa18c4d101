"""`vitscale bench`."""

import platform
import statistics

import click
import torch

from vitscale import ranks as process_group
from vitscale.bench import compare_engines


@click.group(name="bench", short_help="Run a benchmark.")
def command() -> None:
    """Run a benchmark and print its table; docs/benchmarks keeps the results.

    \b
    Example:
      vitscale bench engines --model vit_small_patch16_224 --pairs 20
    """


@command.command()
@click.option("--model", default="vit_tiny_patch16_224", show_default=True, help="Variant to train.")
@click.option("--micro-batch", default=8, show_default=True, type=click.IntRange(min=1), help="Images a step and rank.")
@click.option("--zero-stage", default=2, show_default=True, type=click.IntRange(0, 3))
@click.option("--pairs", default=10, show_default=True, type=click.IntRange(min=1), help="Counted pairs of steps.")
def engines(model: str, micro_batch: int, zero_stage: int, pairs: int) -> None:
    """Step time of the DeepSpeed engine over the plain torch engine.

    \b
    Example:
      vitscale bench engines --zero-stage 1
    """
    ranks = process_group.start()
    try:
        times = compare_engines(ranks, model_name=model, micro_batch=micro_batch, zero_stage=zero_stage, pairs=pairs)
    finally:
        process_group.stop()
    if ranks.is_main:
        device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else platform.processor() or "CPU"
        click.echo(
            f"{model}, {micro_batch} images x {ranks.world_size} ranks, ZeRO {zero_stage}, {device}, "
            f"torch {torch.__version__}"
        )
        click.echo(f"torch      median {statistics.median(times.torch_s) * 1e3:8.1f} ms a step")
        click.echo(f"deepspeed  median {statistics.median(times.deepspeed_s) * 1e3:8.1f} ms a step")
        low, high = min(times.ratios), max(times.ratios)
        click.echo(f"ratio      median {times.ratio:8.3f}    ({low:.3f} to {high:.3f} over {pairs} alternating pairs)")
