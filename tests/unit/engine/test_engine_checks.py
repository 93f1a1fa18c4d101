"""What no engine can run is refused in one line that names the key and the mend."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vitscale.config import BatchSplit, EngineSection
from vitscale.engine import check_engine, render_deepspeed_config
from vitscale.engine.checks import OURS
from vitscale.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 2, "hpz": 2}, "engine.hpz has no effect at engine.zero_stage=2: use engine.zero_stage=3"),
        ({"zero_stage": 2, "qwz": True}, "engine.qwz has no effect at engine.zero_stage=2: use engine.zero_stage=3"),
        (
            {"zero_stage": 0, "offload": "optimizer"},
            "engine.offload has no effect at engine.zero_stage=0: use engine.zero_stage=1",
        ),
        (
            {"zero_stage": 0, "overlap_comm": True},
            "engine.overlap_comm has no effect at engine.zero_stage=0: use engine.zero_stage=1",
        ),
        (
            {"zero_stage": 2, "offload": "optimizer_and_params"},
            "use engine.zero_stage=3, or engine.offload=optimizer",
        ),
        ({"kind": "torch", "offload": "optimizer"}, "engine.offload is for engine.kind=deepspeed: remove it"),
        ({"kind": "torch", "hpz": 2}, "engine.hpz is for engine.kind=deepspeed: remove it"),
        ({"kind": "torch", "qwz": True}, "engine.qwz is for engine.kind=deepspeed: remove it"),
        ({"kind": "torch", "overlap_comm": True}, "engine.overlap_comm is for engine.kind=deepspeed: remove it"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(settings, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        EngineSection(**settings)


@pytest.mark.parametrize(
    ("settings", "run", "message"),
    [
        ({"zero_stage": 0}, {"precision": "bf16"}, "use engine.zero_stage=1"),
        ({"zero_stage": 3, "hpz": 3}, {}, "engine.hpz=3 does not divide the run's 8 ranks: use engine.hpz=2 or 4 or 8"),
        ({"zero_stage": 3, "hpz": 4}, {"world_size": 1}, "engine.hpz=4 does not divide the run's 1 ranks: remove it"),
        (
            {"zero_stage": 3, "hpz": 8},
            {"local_world_size": 4},
            "so the second partition would cross nodes: use engine.hpz=4 or a divisor of it",
        ),
        ({"zero_stage": 3, "qwz": True}, {"device_type": "cpu"}, "engine.qwz has kernels for CUDA only"),
        ({"zero_stage": 3, "qwz": True}, {"precision": "fp32"}, "use engine.precision=bf16, or engine.qwz=false"),
    ],
)
def test_what_the_run_cannot_do_is_refused(settings, run, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        check_engine(EngineSection(**settings), **{"world_size": 8, "precision": "bf16"} | run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", OURS)
def test_a_deepspeed_key_that_the_config_sets_is_refused(key):
    *sections, last = key.split(".")
    overrides = {last: {"enabled": True}}
    for section in reversed(sections):
        overrides = {section: overrides}
    with pytest.raises(ConfigError, match=re.escape(f"engine.deepspeed_overrides.{key}")) as error:
        check_engine(EngineSection(deepspeed_overrides=overrides), world_size=1, precision="fp32")
    assert f"use {OURS[key]}" in str(error.value)


@pytest.mark.parametrize(
    ("zero", "where"),
    [({"reduce_bucket": 1}, ".reduce_bucket"), ({"reduce_bucket_size": -1}, ".reduce_bucket_size"), (3, "")],
)
def test_what_deepspeed_does_not_know_is_refused(zero, where):
    section = EngineSection(deepspeed_overrides={"zero_optimization": zero})
    pattern = re.escape(f"engine.deepspeed_overrides.zero_optimization{where}: DeepSpeed refuses it (")
    with pytest.raises(ConfigError, match=pattern) as error:
        check_engine(section, world_size=1, precision="fp32")
    assert "\n" not in str(error.value)


def test_rendering_refuses_the_same():
    split = BatchSplit(global_batch=24, micro_batch=8, grad_accum=1, world_size=3)
    with pytest.raises(ConfigError, match=r"does not divide the run's 3 ranks"):
        render_deepspeed_config(EngineSection(zero_stage=3, hpz=2), split, None, "fp32")


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_a_second_partition_passes_where_it_fills_whole_nodes(hpz, local_world_size, nodes):
    world_size = local_world_size * nodes
    fits = local_world_size % hpz == 0
    section = EngineSection(zero_stage=3, hpz=hpz)
    try:
        check_engine(section, world_size=world_size, precision="bf16", local_world_size=local_world_size)
    except ConfigError:
        assert not fits
    else:
        assert fits


def test_the_torch_engine_runs_bf16_without_zero():
    check_engine(EngineSection(kind="torch", zero_stage=0), world_size=1, precision="bf16")
