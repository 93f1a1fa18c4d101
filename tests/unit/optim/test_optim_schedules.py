import math
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


def published(step, kind, base, total, warmup, cooldown=0, timescale=10_000, end=0.0):
    """The curve of big_vision's experiments (Zhai et al. 2022, section 3.5 and its config), written down anew."""
    progress = min(max((step - warmup) / (total - warmup), 0.0), 1.0)
    rate = {
        "linear": end + (base - end) * (1 - progress),
        "cosine": base * (1 + math.cos(math.pi * progress)) / 2,
        "rsqrt": base / math.sqrt(1 + max(step - warmup, 0) / timescale),
        "constant": base,
    }[kind]
    rate *= min(1.0, step / warmup) if warmup else 1.0
    return rate * (min(1.0, (total - step) / cooldown) if cooldown else 1.0)


@pytest.mark.parametrize("kind", ["cosine", "linear", "rsqrt"])
def test_equals_the_published_curve_but_for_its_idle_first_step(kind):
    cooldown = 50_000 if kind == "rsqrt" else 0
    own = {"timescale_steps": 10_000, "cooldown_steps": cooldown} if kind == "rsqrt" else {}
    for step in (0, 1, 4_999, 9_998, 9_999, 10_000, 57_123, 249_999, 250_000, 250_001, 299_998):
        ours = learning_rate(step, kind=kind, peak_lr=8e-4, total_steps=299_999, warmup_steps=9_999, **own)
        assert ours == pytest.approx(published(step + 1, kind, 8e-4, 300_000, 10_000, cooldown), rel=1e-12)


def test_points_of_the_scaling_vit_schedule():
    # Peak 8e-4, timescale and warm-up 10k, cool-down 50k of 400k steps: the peak, its half after three more timescales,
    # and the half of 8e-4 / sqrt(1 + 36.5) in the middle of the cool-down.
    curve = {"kind": "rsqrt", "peak_lr": 8e-4, "total_steps": 400_000, "warmup_steps": 10_000}
    curve |= {"timescale_steps": 10_000, "cooldown_steps": 50_000}
    assert learning_rate(10_000, **curve) == 8e-4
    assert learning_rate(40_000, **curve) == pytest.approx(4e-4, rel=1e-12)
    assert learning_rate(375_000, **curve) == pytest.approx(8e-4 / math.sqrt(37.5) / 2, rel=1e-12)


@given(st.integers(1, 400), st.integers(0, 300), st.integers(1, 99))
def test_a_cool_down_begun_at_a_checkpoint_continues_the_rsqrt_curve(cooldown, start, timescale):
    long = {"kind": "rsqrt", "peak_lr": 1e-3, "total_steps": 10_000, "warmup_steps": 5, "timescale_steps": timescale}
    short = long | {"total_steps": start + cooldown + 6, "cooldown_steps": cooldown}
    first = short["total_steps"] - cooldown
    assert learning_rate(first, **short) == learning_rate(first, **long)
    lrs = [learning_rate(step, **short) / learning_rate(step, **long) for step in range(first, short["total_steps"])]
    assert lrs == pytest.approx([(cooldown - done) / cooldown for done in range(cooldown)])
