"""What DeepSpeed cannot run, or would run as something else, refused before anything is built."""

from collections.abc import Iterator, Mapping
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from vitscale.config import EngineSection
from vitscale.engine.precision import Precision
from vitscale.errors import ConfigError

# DeepSpeed's key -> where it is set instead. A key stands for all below it.
OURS = {
    "train_batch_size": "batch.global_batch",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "gradient_accumulation_steps": "batch.global_batch and batch.micro_batch",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.kind",
    "scheduler": "schedule.kind",
    "bf16.enabled": "engine.precision",
    "fp16": "engine.precision=bf16, nothing here scales a loss",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "activation_checkpointing": "engine.activation_checkpointing",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.overlap_comm": "engine.overlap_comm",
    "zero_optimization.offload_optimizer.device": "engine.offload",
    "zero_optimization.offload_optimizer.pin_memory": "engine.offload_pin_memory",
    "zero_optimization.offload_param.device": "engine.offload",
    "zero_optimization.offload_param.pin_memory": "engine.offload_pin_memory",
    "zero_optimization.cpu_offload": "engine.offload",
    "zero_optimization.cpu_offload_param": "engine.offload",
    "zero_optimization.zero_hpz_partition_size": "engine.hpz",
    "zero_optimization.zero_quantized_weights": "engine.qwz",
}


def check_engine(
    engine: EngineSection,
    *,
    world_size: int,
    precision: Precision,
    device_type: str = "cuda",
    local_world_size: int | None = None,
) -> None:
    """Refuse an engine that cannot run as it is written.

    Args:
        engine: the config section; what it says against itself, its own validators have refused.
        world_size: ranks of the run.
        precision: resolved.
        device_type: where it will run; "cuda" when only planned.
        local_world_size: ranks of a node, where known.

    Raises:
        ConfigError: bf16 without ZeRO, a second partition that does not fit the ranks, 8-bit gathers where
            there is no kernel or nothing in 16 bits, or DeepSpeed keys that have a key of ours or do not exist.
    """
    if engine.kind == "torch":
        return
    if engine.zero_stage == 0 and precision == "bf16":
        # Its FP16_UnfusedOptimizer starts with a silent update on zero gradients, so Adam's bias correction
        # counts one update too many for the whole run.
        raise ConfigError(
            "engine.zero_stage=0 in bf16 makes DeepSpeed count one optimizer update too many: use "
            "engine.zero_stage=1 (on one rank it holds the same bytes) or engine.precision=fp32"
        )
    _check_second_partition(engine.hpz, world_size, local_world_size)
    if engine.qwz and device_type != "cuda":
        raise ConfigError("engine.qwz has kernels for CUDA only: set engine.qwz=false")
    if engine.qwz and precision == "fp32":
        raise ConfigError("engine.qwz rounds weights through fp16: use engine.precision=bf16, or engine.qwz=false")
    _check_overrides(engine.deepspeed_overrides)


def _check_second_partition(hpz: int, world_size: int, local_world_size: int | None) -> None:
    if hpz == 1:
        return
    if world_size % hpz:
        fitting = [n for n in range(2, world_size + 1) if world_size % n == 0]
        mend = f"use engine.hpz={' or '.join(map(str, fitting[:3]))}" if fitting else "remove it"
        raise ConfigError(f"engine.hpz={hpz} does not divide the run's {world_size} ranks: {mend}")
    if local_world_size is not None and local_world_size % hpz:
        raise ConfigError(
            f"engine.hpz={hpz} does not divide the node's {local_world_size} ranks, so the second partition would "
            f"cross nodes: use engine.hpz={local_world_size} or a divisor of it"
        )


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    for path in _paths(overrides):
        for key, ours in OURS.items():
            if path == key or path.startswith(key + "."):
                raise ConfigError(f"engine.deepspeed_overrides.{path} is set by the config: use {ours}")
    zero = overrides.get("zero_optimization", {})
    try:
        DeepSpeedZeroConfig(**zero)
    except (ValidationError, TypeError) as error:
        reason = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, ("engine.deepspeed_overrides.zero_optimization", *reason["loc"])))
        raise ConfigError(f"{where}: DeepSpeed refuses it ({reason['msg']}): mend or remove it") from None


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of a tree's leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
