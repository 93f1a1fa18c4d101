from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from vitscale.optim import learning_rate

KINDS = ["cosine", "linear", "constant"]


@st.composite
def schedules(draw, kinds=KINDS):
    total = draw(st.integers(1, 300))
    peak = draw(st.floats(1e-6, 1.0))
    return {
        "kind": draw(st.sampled_from(kinds)),
        "peak_lr": peak,
        "total_steps": total,
        "warmup_steps": draw(st.integers(0, total - 1)),
        "final_lr": peak * draw(st.floats(0.0, 1.0)),
    }


def rates(schedule):
    return [learning_rate(step, **schedule) for step in range(schedule["total_steps"])]


@given(schedules())
def test_shape(schedule):
    lrs, warmup, peak = rates(schedule), schedule["warmup_steps"], schedule["peak_lr"]
    rounding = 1e-12 * peak
    assert lrs[warmup] == peak
    assert min(lrs) > 0
    assert all(a < b for a, b in pairwise(lrs[: warmup + 1]))
    assert all(a >= b - rounding for a, b in pairwise(lrs[warmup:]))
    assert all(rate >= schedule["final_lr"] - rounding for rate in lrs[warmup:])


@given(schedules())
def test_warmup_is_the_line_from_zero_before_the_run(schedule):
    lrs, warmup, peak = rates(schedule), schedule["warmup_steps"], schedule["peak_lr"]
    for step in range(warmup):
        assert lrs[step] == pytest.approx(peak * (step + 1) / (warmup + 1), rel=1e-12)


@given(schedules(kinds=["linear"]))
def test_linear_decay_ends_one_equal_step_above_the_final_rate(schedule):
    lrs = [*rates(schedule)[schedule["warmup_steps"] :], schedule["final_lr"]]
    falls = [a - b for a, b in pairwise(lrs)]
    expected = (schedule["peak_lr"] - schedule["final_lr"]) / len(falls)
    assert falls == pytest.approx([expected] * len(falls), rel=1e-6, abs=1e-12)


@given(schedules(kinds=["cosine"]))
def test_cosine_is_symmetric_about_its_middle(schedule):
    lrs = [*rates(schedule)[schedule["warmup_steps"] :], schedule["final_lr"]]
    whole = schedule["peak_lr"] + schedule["final_lr"]
    assert [a + b for a, b in zip(lrs, reversed(lrs), strict=True)] == pytest.approx([whole] * len(lrs), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [1, 7])
def test_equals_torchs_schedulers(kind, warmup):
    peak, final, total = 3e-3, 1e-5, 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    rising = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    falling = {
        "cosine": lambda: CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=final),
        "linear": lambda: LinearLR(optimizer, 1.0, end_factor=final / peak, total_iters=total - warmup),
        "constant": lambda: ConstantLR(optimizer, factor=1.0),
    }[kind]()
    scheduler = SequentialLR(optimizer, [rising, falling], milestones=[warmup])
    schedule = {"peak_lr": peak, "total_steps": total, "warmup_steps": warmup, "final_lr": final}
    for step in range(total):
        assert learning_rate(step, kind=kind, **schedule) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("step", [-1, 10])
def test_there_is_no_update_outside_the_run(step):
    with pytest.raises(AssertionError):
        learning_rate(step, kind="cosine", peak_lr=1.0, total_steps=10, warmup_steps=2, final_lr=0.0)
