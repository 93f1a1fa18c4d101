"""`vitscale plan`."""

import json
from pathlib import Path

import click
import torch
import yaml

from vitscale.config import load_config, split_batch
from vitscale.engine import Precision, render_deepspeed_config
from vitscale.model import forward_flops, train_flops
from vitscale.planning import Reading, state_bytes
from vitscale.train import build_model

SAMPLE_BYTES = 100_000


@click.command(name="plan", short_help="What a config comes to.")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks of the run.")
def command(config: Path, overrides: tuple[str, ...], gpus: int) -> None:
    """Show the resolved config, the batch split, parameters, FLOPs, how shards are read, state bytes a rank
    and the DeepSpeed config.

    Reads no shards and builds no weights. Precision auto is planned as bf16, what the GPUs will run.

    \b
    Example:
      vitscale plan configs/in21k/vit_huge_patch14.yaml --gpus 64
    """
    resolved = load_config(config, overrides)
    split = split_batch(resolved.batch, gpus)
    with torch.device("meta"):
        model = build_model(resolved)
    parameters = sum(p.numel() for p in model.parameters())
    precision: Precision = "fp32" if resolved.engine.precision == "fp32" else "bf16"
    stage = resolved.engine.zero_stage

    click.echo(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False).rstrip())
    click.echo(
        f"\nbatch       {split.global_batch} = {gpus} ranks x {split.micro_batch} x {split.grad_accum} micro-steps"
    )
    click.echo(f"parameters  {parameters:,}")
    click.echo(
        f"FLOPs       {forward_flops(model.variant) / 1e9:.2f} G forward, "
        f"{train_flops(model.variant) / 1e12:.4f} T training, an image"
    )
    if resolved.data.stream is None:
        data = resolved.data
        click.echo(f"reading     {_describe(Reading(data.lanes, data.block, gpus, data.workers), data.read_ahead_mb)}")
    if resolved.engine.kind == "deepspeed":
        deepspeed = render_deepspeed_config(resolved.engine, split, resolved.optim.clip_norm, precision)
        state = state_bytes(parameters, world_size=gpus, zero_stage=stage, precision=precision)
        click.echo(
            f"state       {state.total / 1e9:.2f} GB a rank at ZeRO stage {stage} in {precision}: weights "
            f"{state.weights / 1e9:.2f}, gradients {state.gradients / 1e9:.2f}, optimizer {state.optimizer / 1e9:.2f}"
        )
        click.echo(f"\nDeepSpeed config\n{json.dumps(deepspeed, indent=2)}")


def _describe(reading: Reading, read_ahead_mb: int) -> str:
    """How shards are read, for a person."""
    window_mb = reading.window_samples * SAMPLE_BYTES / 2**20
    if not reading.workers_own_lanes:
        whose = "ranks" if not reading.ranks_own_lanes else "workers of a rank"
        return (
            f"each block in pieces by up to {reading.readers_of_a_block} {whose}, no byte twice; "
            f"data.lanes={reading.fitting_lanes} would give each whole lanes (fixed when the run starts)"
        )
    fits = "" if 2 * window_mb <= read_ahead_mb else f"; data.read_ahead_mb={2 * window_mb:.0f} would hold whole blocks"
    return (
        f"whole blocks, {reading.lanes // reading.world_size} lanes a rank; at 100 kB a sample "
        f"{2 * window_mb:.0f} MiB read ahead a rank, data.read_ahead_mb is {read_ahead_mb}{fits}"
    )
