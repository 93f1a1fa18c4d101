"""The rendered DeepSpeed config: golden values, and what is refused."""

import pytest
import torch

from vitscale.config import BatchSplit, EngineSection
from vitscale.engine import render_deepspeed_config, resolve_precision
from vitscale.errors import ConfigError

SPLIT = BatchSplit(global_batch=64, micro_batch=4, grad_accum=2, world_size=8)


def render(clip_norm=1.0, precision="bf16", **settings):
    return render_deepspeed_config(EngineSection(**settings), SPLIT, clip_norm, precision)


def test_golden_stage_2():
    assert render(zero_stage=2, bucket_elements=1000) == {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 1000,
            "allgather_bucket_size": 1000,
            "reduce_scatter": True,
            "allgather_partitions": True,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "round_robin_gradients": False,
        },
        "zero_allow_untested_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def test_no_clipping_is_0_and_not_deepspeeds_default_of_1():
    assert render(clip_norm=None)["gradient_clipping"] == 0.0


def test_stage_3_does_not_keep_all_of_h14_gathered():
    assert render(zero_stage=3)["zero_optimization"]["stage3_max_live_parameters"] < 630_764_800


def test_overrides_are_merged_key_by_key():
    rendered = render(deepspeed_overrides={"zero_optimization": {"overlap_comm": True}})
    assert rendered["zero_optimization"]["overlap_comm"] is True
    assert rendered["zero_optimization"]["contiguous_gradients"] is True


def test_bf16_without_zero_is_refused_with_the_mend():
    with pytest.raises(ConfigError, match=r"use engine\.zero_stage=1"):
        render(zero_stage=0)
    assert render(zero_stage=0, precision="fp32")["zero_optimization"]["stage"] == 0


def test_asked_precision_is_used_as_it_is():
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    assert resolve_precision("fp32", torch.device("cpu")) == "fp32"
