"""`vitscale plan`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from pydantic import ValidationError

from vitscale.checkpoint import mirror_of
from vitscale.cli.plan_elastic import elastic_plan, elastic_text
from vitscale.cli.plan_goodput import goodput_plan, goodput_text
from vitscale.cli.plan_text import plan_text
from vitscale.config import BatchSplit, Config, DataSection, EngineSection, load_config, phase_batches, split_batch
from vitscale.data.index import DATASET_FILE, read_dataset
from vitscale.data.labels import load_label_space
from vitscale.engine import Precision, check_engine, check_execution, render_deepspeed_config, resolve_precision
from vitscale.errors import ConfigError
from vitscale.model import (
    Execution,
    Recompute,
    Variant,
    VisionTransformer,
    executed_train_flops,
    forward_flops,
    train_flops,
)
from vitscale.optim import check_fused
from vitscale.planning import (
    ActivationRule,
    Reading,
    StateBytes,
    activation_bytes,
    largest_dividing,
    largest_micro_batch,
    parameter_parts,
    step_bytes,
)
from vitscale.train.build import build_model, check_classes
from vitscale.train.footprint import activation_rule, planned_checkpoint_bytes, planned_state

GB = 1e9
_STAGES = (0, 1, 2, 3)


@click.command(name="plan", short_help="What a config comes to.")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks of the run.")
@click.option(
    "--gpus-per-node",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Ranks that are lost with a node.",
)
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    show_default=True,
    help="What the ranks run on; what it cannot do is refused.",
)
@click.option("--hbm", type=click.FloatRange(min=0, min_open=True), metavar="GB", help="Memory of one GPU.")
@click.option(
    "--reserve",
    type=click.FloatRange(min=0),
    default=4.0,
    show_default=True,
    metavar="GB",
    help="Of --hbm, what CUDA, NCCL and fragmentation may take. An estimate.",
)
@click.option("--goodput", is_flag=True, help="Share of time on steps that stay under failures, and how often to save.")
@click.option(
    "--step-s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="For --goodput: a step, as measured; else that of an assumed MFU.",
)
@click.option("--json", "as_json", is_flag=True, help="For machines; bytes and FLOPs as whole numbers.")
def command(
    config: Path,
    overrides: tuple[str, ...],
    gpus: int,
    gpus_per_node: int,
    device: str,
    hbm: float | None,
    reserve: float,
    goodput: bool,
    step_s: float | None,
    as_json: bool,
) -> None:
    """Show what a run comes to: the resolved config, how the batch falls on ranks, parameters and FLOPs, bytes of
    state by ZeRO stage, bytes of activations by recomputation, how shards are read, the DeepSpeed config, and how the
    run goes on when nodes are lost.

    Reads no shards and builds no weights. Precision auto is planned as bf16, what the GPUs will run. Classes and the
    hierarchy among them are checked where the label space is named or the dataset lies on this machine.

    \b
    Examples:
      vitscale plan configs/in21k/vit_huge_patch14.yaml --gpus 64 --hbm 80
      vitscale plan configs/in21k/vit_huge_patch14.yaml engine.zero_stage=3 --gpus 8 --json
      vitscale plan configs/in21k/vit_giant_patch14_augreg.yaml batch.micro_batch=4 --gpus 1024 --goodput
    """
    if step_s is not None and not goodput:
        raise click.UsageError("--step-s is read by --goodput alone: add --goodput")
    found = draw_plan(load_config(config, overrides), gpus, hbm, reserve, device, gpus_per_node)
    if goodput:
        found["goodput"] = goodput_plan(found, step_s)
    text = [plan_text(found), elastic_text(found), goodput_text(found) if goodput else ""]
    click.echo(json.dumps(found, indent=2) if as_json else "\n\n".join(filter(None, text)))


def draw_plan(
    config: Config,
    gpus: int,
    hbm_gb: float | None,
    reserve_gb: float,
    device_type: str = "cuda",
    gpus_per_node: int = 8,
) -> dict[str, Any]:
    """Everything that is printed, as plain values.

    Raises:
        ConfigError: the config cannot run on so many ranks, or on such a device.
    """
    mirror_of(config)  # refuses one whose client is not installed
    with torch.device("meta"):
        model = build_model(config)
    variant, device = model.variant, torch.device(device_type)
    precision: Precision = "bf16" if config.engine.precision == "auto" else config.engine.precision
    if device_type == "cpu":  # what a GPU can do is seen where there is one
        precision = resolve_precision(config.engine.precision, device)
        check_execution(config.engine, precision, device, variant.head_dim)
        check_engine(config.engine, world_size=gpus, precision=precision, device_type=device_type)
    check_fused(config.optim, device)
    if (classes := _known_classes(config.data)) is not None:
        check_classes(config, classes)
    phases = list(_phases(config, variant, gpus))
    deepspeed = None
    if config.engine.kind == "deepspeed":
        deepspeed = render_deepspeed_config(config.engine, phases[-1].split, config.optim.clip_norm, precision)
    parts = parameter_parts(variant)
    return {
        "config": config.model_dump(mode="json"),
        "gpus": gpus,
        "gpus_per_node": gpus_per_node,
        "precision": precision,
        "hbm_gb": hbm_gb,
        "reserve_gb": reserve_gb,
        "model": {"name": config.model.name, "parameters": sum(parts.values()), "parts": parts} | _shape(variant),
        "phases": [
            _phase_plan(phase, config, model, precision, None if hbm_gb is None else (hbm_gb - reserve_gb) * GB)
            for phase in phases
        ],
        "checkpoint_bytes": planned_checkpoint_bytes(config, model),
        "state": list(_state_table(config, model, phases[-1].split, precision)),
        "reading": None if config.data.stream is not None else _reading(config, gpus),
        "if_lost": elastic_plan(config.schedule, config.batch, phases[-1].split, gpus_per_node),
        "deepspeed": deepspeed,
    }


def _known_classes(data: DataSection) -> Sequence[str] | None:
    """The training classes; None where only the machine that has the dataset knows them."""
    if data.label_space is not None:
        return load_label_space(data.label_space).wnids
    if data.sources and (Path(data.sources[0].path) / DATASET_FILE).is_file():
        return read_dataset(Path(data.sources[0].path)).classes
    return None


@dataclass(frozen=True)
class _PlannedPhase:
    """A part of the run with one input size and batch."""

    until: str
    variant: Variant
    split: BatchSplit


def _phases(config: Config, variant: Variant, gpus: int) -> Iterator[_PlannedPhase]:
    for section, own in zip(config.schedule.phases, phase_batches(config.schedule, config.batch), strict=False):
        sized = variant if section.img_size is None else replace(variant, img_size=section.img_size)
        yield _PlannedPhase(str(section.until), sized, split_batch(own, gpus))
    yield _PlannedPhase(str(config.schedule.length), variant, split_batch(config.batch, gpus))


def _shape(variant: Variant) -> dict[str, Any]:
    return {
        "depth": variant.depth, "embed_dim": variant.embed_dim, "num_heads": variant.num_heads,
        "mlp_hidden": variant.mlp_hidden, "num_classes": variant.num_classes, "stem": variant.stem,
    }  # fmt: skip


def _phase_plan(
    phase: _PlannedPhase, config: Config, model: VisionTransformer, precision: Precision, limit: float | None
) -> dict[str, Any]:
    variant, split, section = phase.variant, phase.split, config.model
    engine = config.engine
    executed = executed_train_flops(
        variant,
        split.micro_batch,
        execution=Execution(recompute=engine.activation_checkpointing, every=engine.checkpoint_every or 1),
        drop_rate=section.drop_rate,
        drop_path_rate=section.drop_path_rate,
        drop_path_mode=section.drop_path_mode,
    )
    state = planned_state(config, engine, model, split, precision)
    return {
        "until": phase.until,
        "img_size": list(variant.image_px),
        "tokens": variant.tokens,
        "global_batch": split.global_batch,
        "micro_batch": split.micro_batch,
        "grad_accum": split.grad_accum,
        "padding": split.padding,
        "forward_flops": forward_flops(variant),
        "train_flops": train_flops(variant),
        "executed_train_flops": executed * split.places // (split.micro_batch * split.global_batch),
        "activations": [_activations(rule, chosen, phase, state, limit) for rule, chosen in _rules(config, precision)],
    }


def _rules(config: Config, precision: Precision) -> Iterator[tuple[ActivationRule, bool]]:
    """Each recomputation policy, and whether it is the config's; the config's k and budget stand for themselves."""
    policies: tuple[Recompute, ...] = ("none", "budget", "selective", "every_k", "full")
    for policy in policies:
        yield activation_rule(config, policy, precision), policy == config.engine.activation_checkpointing


def _activations(
    rule: ActivationRule, chosen: bool, phase: _PlannedPhase, state: StateBytes, limit: float | None
) -> dict[str, Any]:
    variant, split = phase.variant, phase.split
    needed = activation_bytes(variant, split.micro_batch, rule)
    peak = step_bytes(variant, split.micro_batch, rule, state)
    found: dict[str, Any] = {
        "recompute": rule.recompute,
        "every": rule.every if rule.recompute == "every_k" else None,
        "budget": rule.budget if rule.recompute == "budget" else None,
        "chosen": chosen,
        "estimate": rule.recompute == "budget",
        "kept_bytes": needed.kept,
        "backward_bytes": needed.peak,
        "step_bytes": peak,
    }
    if limit is not None:
        largest = largest_micro_batch(variant, rule, state, limit)
        found |= {
            "fits": peak <= limit,
            "largest_micro_batch": largest,
            "largest_dividing": largest_dividing(largest, split.rank_batch),
        }
    return found


def _state_table(
    config: Config, model: VisionTransformer, split: BatchSplit, precision: Precision
) -> Iterator[dict[str, Any]]:
    """One row a ZeRO stage: its bytes, or why it cannot be; of the torch engine one row."""
    if config.engine.kind == "torch":
        yield {
            "stage": "torch",
            "chosen": True,
            **_state_row(planned_state(config, config.engine, model, split, precision)),
        }
        return
    for stage in _STAGES:
        row = {"stage": stage, "chosen": stage == config.engine.zero_stage}
        try:
            engine = EngineSection.model_validate(config.engine.model_dump() | {"zero_stage": stage})
            yield row | _state_row(planned_state(config, engine, model, split, precision))
        except (ConfigError, ValidationError) as error:
            reason = str(error) if isinstance(error, ConfigError) else error.errors()[0]["msg"]
            yield row | {"refused": reason.removeprefix("Value error, ")}


def _state_row(state: StateBytes) -> dict[str, int]:
    return {
        "weights": state.weights, "master": state.master, "moments": state.moments, "average": state.average,
        "gradients": state.gradients, "buckets": state.buffers + state.bucket, "gathered": state.gathered,
        "update": state.update, "resident": state.resident, "step_bytes": state.peak(0), "host": state.host,
    }  # fmt: skip


def _reading(config: Config, gpus: int) -> dict[str, Any]:
    data = config.data
    reading = Reading(data.lanes, data.block, gpus, data.workers)
    return {
        "ranks_own_lanes": reading.ranks_own_lanes,
        "workers_own_lanes": reading.workers_own_lanes,
        "readers_of_a_block": reading.readers_of_a_block,
        "fitting_lanes": reading.fitting_lanes,
        "lanes_a_rank": reading.lanes // gpus,
        "window_samples": reading.window_samples,
        "read_ahead_mb": data.read_ahead_mb,
    }
