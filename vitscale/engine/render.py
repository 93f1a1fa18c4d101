"""The DeepSpeed config, rendered from ours by one pure function."""

from typing import Any

from vitscale.config import BatchSplit, EngineSection, merge_trees
from vitscale.engine.precision import Precision
from vitscale.errors import ConfigError


def render_deepspeed_config(
    engine: EngineSection, split: BatchSplit, clip_norm: float | None, precision: Precision
) -> dict[str, Any]:
    """DeepSpeed's JSON with every value that matters written out, since its defaults move between releases.

    `engine.deepspeed_overrides` is merged over the result, key by key.

    Raises:
        ConfigError: bf16 without ZeRO.
    """
    if engine.zero_stage == 0 and precision == "bf16":
        # Its FP16_UnfusedOptimizer starts with a silent update on zero gradients, so Adam's bias correction
        # counts one update too many for the whole run.
        raise ConfigError(
            "engine.zero_stage=0 in bf16 makes DeepSpeed count one optimizer update too many: use "
            "engine.zero_stage=1 (on one rank it holds the same bytes) or engine.precision=fp32"
        )
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": engine.bucket_elements,
        "allgather_bucket_size": engine.bucket_elements,
        "reduce_scatter": True,
        "allgather_partitions": True,
        # Releases before 0.19.8 skipped the all-reduce on CPUs without it (DeepSpeed #8382).
        "contiguous_gradients": True,
        # Overlapped reduction has open reports of NaN and wrong gradients (DeepSpeed #7965, #8061, #8080).
        "overlap_comm": False,
        "round_robin_gradients": False,
    }
    if engine.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": engine.bucket_elements // 2,
            "stage3_param_persistence_threshold": 100_000,
            # Below the size of H/14; DeepSpeed's 1e9 would keep all of it gathered after forward.
            "stage3_max_live_parameters": 2 * engine.bucket_elements,
            "stage3_max_reuse_distance": 2 * engine.bucket_elements,
            "sub_group_size": 1_000_000_000,
        }
    rendered = {
        "train_batch_size": split.global_batch,
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": split.grad_accum,
        # DeepSpeed clips at 1.0 when the key is missing; 0 is its word for never.
        "gradient_clipping": clip_norm or 0.0,
        # check_grad_overflow scans every gradient and waits for the device; the trainer watches the loss.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    return merge_trees(rendered, engine.deepspeed_overrides)
