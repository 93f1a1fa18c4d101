"""Engines that execute a training step. The only package that imports deepspeed."""

import torch
from torch import nn

from vitscale.config import BatchSplit, EngineSection
from vitscale.engine.deepspeed_engine import DeepSpeedEngine
from vitscale.engine.precision import Precision, resolve_precision
from vitscale.engine.protocol import MASTER, Fragment, LossFn, MicroBatch, StepResult, TrainEngine
from vitscale.engine.render import render_deepspeed_config
from vitscale.engine.torch_engine import TorchEngine

__all__ = [
    "MASTER",
    "DeepSpeedEngine",
    "Fragment",
    "LossFn",
    "MicroBatch",
    "Precision",
    "StepResult",
    "TorchEngine",
    "TrainEngine",
    "create_engine",
    "render_deepspeed_config",
    "resolve_precision",
]


def create_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    config: EngineSection,
    *,
    split: BatchSplit,
    clip_norm: float | None,
    device: torch.device,
    rank: int,
) -> TrainEngine:
    """The engine that `config.kind` names, over a model on `device`; the process group must be up."""
    precision = resolve_precision(config.precision, device)
    if config.kind == "torch":
        return TorchEngine(
            module,
            optimizer,
            loss_fn,
            grad_accum=split.grad_accum,
            clip_norm=clip_norm,
            precision=precision,
            device=device,
            rank=rank,
            world_size=split.world_size,
        )
    rendered = render_deepspeed_config(config, split, clip_norm, precision)
    return DeepSpeedEngine(module, optimizer, loss_fn, deepspeed_config=rendered)
