"""The rendered DeepSpeed config against golden files, and that it leaves nothing that matters to DeepSpeed's defaults.

After a change that is meant, write the golden files anew and read their diff:

    .venv/bin/python tests/unit/engine/test_engine_render.py
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from hypothesis import given
from hypothesis import strategies as st

from vitscale.config import BatchSplit, EngineSection
from vitscale.engine import render_deepspeed_config, resolve_precision

GOLDEN = Path(__file__).parents[2] / "golden" / "deepspeed"
SPLIT = BatchSplit(global_batch=64, micro_batch=4, grad_accum=2, world_size=8)
# What DeepSpeed's own checkpoints, other optimizers, NVMe, debugging or its deprecated spellings are for.
OF_NO_EFFECT_HERE = {
    "elastic_checkpoint",
    "load_from_fp32_weights",
    "pipeline_loading_checkpoint",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "save_muon_momentum_buffer_in_memory",
    "zenflow",
    "legacy_stage1",
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "enable_sanity_checks",
    "log_trace_cache_warnings",
    "override_module_apply",
    "leaf_module",  # named by module class: `prepare_model`
}


def golden_cases():
    """Name of the golden file -> precision and engine settings."""
    offloads = ("none", "optimizer", "optimizer_and_params")
    cases = {}
    for stage, precision, offload, hpz, qwz in itertools.product(
        range(4), ("fp32", "bf16"), offloads, (1, 8), (False, True)
    ):
        if (stage == 0 and (precision == "bf16" or offload != "none")) or (qwz and precision == "fp32"):
            continue
        if stage < 3 and (hpz > 1 or qwz or offload == "optimizer_and_params"):
            continue
        parts = [f"stage{stage}", precision]
        parts += [f"offload_{offload}"] * (offload != "none") + [f"hpz{hpz}"] * (hpz > 1) + ["qwz"] * qwz
        cases["-".join(parts)] = precision, {"zero_stage": stage, "offload": offload, "hpz": hpz, "qwz": qwz}
    return cases


CASES = golden_cases()


def render(clip_norm=1.0, precision="bf16", **settings):
    return render_deepspeed_config(EngineSection(**settings), SPLIT, clip_norm, precision)


def as_text(case):
    precision, settings = CASES[case]
    return json.dumps(render(precision=precision, **settings), indent=2) + "\n"


@pytest.mark.parametrize("case", CASES)
def test_rendered_config_is_the_golden_one(case):
    assert as_text(case) == (GOLDEN / f"{case}.json").read_text()


def test_each_golden_file_has_its_case():
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize("stage", range(4))
def test_no_default_of_deepspeed_is_left_to_it(stage):
    zero = set(render(zero_stage=stage, precision="fp32")["zero_optimization"])
    fields = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()} - OF_NO_EFFECT_HERE
    of_stage_3 = {name for name in fields if name.startswith("stage3_")}
    of_stage_3 |= {"offload_param", "sub_group_size", "memory_efficient_linear"}
    of_stage_1_2 = {"compute_grad_norm"}
    expected = fields - (set() if stage == 3 else of_stage_3) - (set() if stage in (1, 2) else of_stage_1_2)
    assert zero == expected
    assert set(render()["bf16"]) == set(DeepSpeedBF16Config.model_fields)


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_reads_back_what_is_rendered(case):
    zero = json.loads(as_text(case))["zero_optimization"]
    read = DeepSpeedZeroConfig(**zero).model_dump(by_alias=True, mode="json")
    assert {key: read[key] for key in zero if not key.startswith("offload")} == {
        key: value for key, value in zero.items() if not key.startswith("offload")
    }
    for key in ("offload_optimizer", "offload_param"):
        assert zero.get(key, {}).items() <= (read[key] or {}).items()


def test_no_clipping_is_0_and_not_deepspeeds_default_of_1():
    assert render(clip_norm=None)["gradient_clipping"] == 0.0


@given(st.integers(1, 2_000_000_000))
def test_sizes_of_stage_3_follow_the_bucket(elements):
    zero = render(zero_stage=3, bucket_elements=elements)["zero_optimization"]
    assert zero["reduce_bucket_size"] == elements
    assert zero["stage3_prefetch_bucket_size"] <= elements < zero["stage3_max_live_parameters"]
    assert zero["allgather_bucket_size"] % 2 == 0  # DeepSpeed asserts it


def test_stage_3_gathers_a_block_of_gigantic_ahead_but_does_not_keep_all_of_huge():
    zero = render(zero_stage=3)["zero_optimization"]
    assert zero["stage3_prefetch_bucket_size"] > 38_300_000
    assert zero["stage3_max_live_parameters"] < 630_764_800


def test_overrides_are_merged_key_by_key():
    rendered = render(deepspeed_overrides={"zero_optimization": {"round_robin_gradients": True}, "dump_state": True})
    assert rendered["zero_optimization"] == render()["zero_optimization"] | {"round_robin_gradients": True}
    assert rendered["dump_state"] is True


def test_asked_precision_is_used_as_it_is():
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    assert resolve_precision("fp32", torch.device("cpu")) == "fp32"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*.json"):
        path.unlink()
    for case in CASES:
        (GOLDEN / f"{case}.json").write_text(as_text(case))
