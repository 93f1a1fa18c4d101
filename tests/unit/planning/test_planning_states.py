"""State bytes against the published figures, and against what the formula is made of."""

import pytest

from vitscale.planning import state_bytes

GB = 1e9


@pytest.mark.parametrize(
    ("parameters", "world_size", "stage", "gb"),
    [(630_764_800, 8, 1, 3.47), (1_011_202_432, 8, 1, 5.56), (1_842_775_680, 64, 3, 0.46), (630_764_800, 1, 1, 10.09)],
)
def test_bf16_states(parameters, world_size, stage, gb):
    total = state_bytes(parameters, world_size=world_size, zero_stage=stage, precision="bf16").total
    assert total / GB == pytest.approx(gb, abs=0.006)


def test_each_stage_divides_one_more_part():
    parts = [state_bytes(1000, world_size=10, zero_stage=s, precision="bf16") for s in (1, 2, 3)]
    assert [(p.weights, p.gradients, p.optimizer) for p in parts] == [
        (2000, 2000, 1200), (2000, 200, 1200), (200, 200, 1200)
    ]  # fmt: skip


def test_fp32_without_zero_has_no_copy_of_the_weights():
    assert state_bytes(1000, world_size=2, zero_stage=0, precision="fp32").total == 4000 + 4000 + 8000
