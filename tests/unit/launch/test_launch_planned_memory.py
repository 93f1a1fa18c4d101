"""launch/planned_memory.py: the planner's verdict on a real config."""

from pathlib import Path

import pytest
from job_request import JobRequest
from planned_memory import check_memory, plan_lines, plan_of

from vitscale.config import load_config
from vitscale.errors import LaunchError

HUGE = load_config(Path(__file__).parents[3] / "configs" / "in21k" / "vit_huge_patch14.yaml")


def plan(hbm_gb: float | None) -> dict:
    return plan_of(HUGE, JobRequest(gpus_per_node=8, hbm_gb=hbm_gb), nodes=2)


def test_what_fits_or_is_not_known_to_fit_passes():
    check_memory(plan(None))
    check_memory(plan(1000))


def test_what_does_not_fit_is_refused_with_what_would():
    with pytest.raises(LaunchError, match=r"a step needs \d+\.\d GB on each of 16 GPUs of 24 GB less 4 GB .* --force"):
        check_memory(plan(24))


def test_the_mends_are_those_of_the_plan():
    found = plan(24)
    (phase,) = found["phases"]
    chosen = next(row for row in phase["activations"] if row["chosen"])
    with pytest.raises(LaunchError) as refused:
        check_memory(found)
    assert f"use batch.micro_batch={chosen['largest_dividing']}, " in str(refused.value)


def test_the_text_is_that_of_vitscale_plan():
    lines = plan_lines(plan(80)).splitlines()
    assert "16 ranks" in next(line for line in lines if line.startswith("batch  "))
    assert any(line.startswith("if nodes of 8 GPUs are lost") for line in lines)
