"""Engines that execute a training step. The only package that imports deepspeed."""

import os
import sys
from pathlib import Path

import torch

# DeepSpeed compiles its CPU op with the ninja on the path. Another one than before compiles all of it anew, and
# without an activated environment there may be none.
os.environ["PATH"] = os.pathsep.join(
    dict.fromkeys([str(Path(sys.executable).parent), *os.environ.get("PATH", os.defpath).split(os.pathsep)])
)

# Read when deepspeed is imported; left to itself it takes the CPU too, with a warning in every process.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from vitscale.config import AverageSection, BatchSplit, EngineSection
from vitscale.engine.checks import check_engine
from vitscale.engine.communication import CommunicationRecord, Traffic, record_communication
from vitscale.engine.compile import check_execution, prepare_model
from vitscale.engine.deepspeed_engine import DeepSpeedEngine
from vitscale.engine.host_memory import keep_freed_memory
from vitscale.engine.norms import PARTS, model_part
from vitscale.engine.precision import Precision, resolve_precision
from vitscale.engine.protocol import (
    AVERAGE,
    MASTER,
    Accept,
    Fragment,
    LossFn,
    MicroBatch,
    StepResult,
    TrainEngine,
)
from vitscale.engine.render import render_deepspeed_config
from vitscale.engine.timing import StepTimes
from vitscale.engine.torch_engine import TorchEngine
from vitscale.model import VisionTransformer

__all__ = [
    "AVERAGE",
    "MASTER",
    "PARTS",
    "Accept",
    "CommunicationRecord",
    "DeepSpeedEngine",
    "Fragment",
    "LossFn",
    "MicroBatch",
    "Precision",
    "StepResult",
    "StepTimes",
    "TorchEngine",
    "Traffic",
    "TrainEngine",
    "check_engine",
    "check_execution",
    "create_engine",
    "model_part",
    "record_communication",
    "render_deepspeed_config",
    "resolve_precision",
]


def create_engine(
    model: VisionTransformer,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    config: EngineSection,
    *,
    split: BatchSplit,
    clip_norm: float | None,
    device: torch.device,
    rank: int,
    average: AverageSection | None = None,
) -> TrainEngine:
    """The engine that `config.kind` names, over a model on `device`; the process group must be up.

    Args:
        model: made to run as `config` says.
        optimizer: over its parameters.
        loss_fn: mean loss of a micro-batch.
        config: what executes a step.
        split: of the global batch over ranks and micro-batches.
        clip_norm: global norm to which gradients are clipped; None never clips.
        device: of the model.
        rank: of this process.
        average: the weights' moving average; None keeps none.

    Raises:
        ConfigError: the device, the ranks or DeepSpeed cannot run what `config` asks for.
    """
    precision = resolve_precision(config.precision, device)
    check_engine(config, world_size=split.world_size, precision=precision, device_type=device.type)
    prepare_model(model, config, precision=precision, device=device)
    if device.type == "cpu":
        keep_freed_memory()
    if config.kind == "torch":
        return TorchEngine(
            model,
            optimizer,
            loss_fn,
            grad_accum=split.grad_accum,
            clip_norm=clip_norm,
            precision=precision,
            device=device,
            rank=rank,
            world_size=split.world_size,
            average=average,
        )
    rendered = render_deepspeed_config(config, split, clip_norm, precision)
    return DeepSpeedEngine(model, optimizer, loss_fn, deepspeed_config=rendered, average=average)
