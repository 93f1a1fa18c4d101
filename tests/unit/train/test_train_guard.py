import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vitscale.config import GuardSection
from vitscale.train.guard import StepGuard


def judged(guard, norms, first=0):
    verdicts = []
    for step, norm in enumerate(norms, first):
        guard.begin(step)
        verdicts.append(guard.accept(norm))
    return verdicts


def test_only_what_is_not_finite_is_skipped_by_default():
    guard = StepGuard(GuardSection())
    assert judged(guard, [1.0, math.nan, 1e9, math.inf, 1.0]) == [True, False, True, False, True]
    assert (guard.skipped, guard.spikes, guard.streak) == (2, 0, 0)


def test_a_spike_is_skipped_once_the_mean_is_warm_and_does_not_move_it():
    guard = StepGuard(GuardSection(norm_factor=3, window_steps=4))
    assert judged(guard, [9.0, 1, 1, 1]) == [True] * 4, "no spike is told before a whole window"
    guard = StepGuard(GuardSection(norm_factor=3, window_steps=4))
    assert judged(guard, [1, 1, 1, 1, 3.1, 2.9]) == [True] * 4 + [False, True]
    assert (guard.skipped, guard.spikes) == (1, 1)


def test_many_skipped_updates_in_a_row_are_a_divergence():
    guard = StepGuard(GuardSection(patience_steps=3))
    judged(guard, [1.0, math.nan, math.nan, 1.0, math.nan, math.nan])
    assert guard.diverged() is None
    assert guard.diverged(at_end=True) is not None
    judged(guard, [math.nan])
    assert guard.diverged() == "3 updates in a row were skipped, the last one's gradient is not finite"


def test_a_loss_far_above_its_mean_is_a_divergence():
    guard = StepGuard(GuardSection(loss_factor=2, window_steps=3))
    assert [guard.record(loss) for loss in (9.0, 1.0, 1.0)] == [None] * 3
    mean = guard.state()["loss"][1] / (1 - (2 / 3) ** 3)
    assert guard.record(1.9 * mean) is None
    assert "is over 2 times its running mean" in guard.record(100.0)


def test_a_loss_without_a_number_is_one_unless_its_update_was_skipped():
    guard = StepGuard(GuardSection())
    judged(guard, [1.0])
    assert guard.record(math.nan) == "the loss is nan, and its gradient is finite"
    judged(guard, [math.nan])
    assert guard.record(math.nan) is None


@given(st.lists(st.one_of(st.floats(0.1, 10), st.just(math.nan), st.just(1e6)), max_size=40), st.integers(0, 40))
def test_a_guard_goes_on_from_its_state_as_if_it_had_never_stopped(norms, cut):
    section = GuardSection(norm_factor=4, window_steps=5)
    whole, first = StepGuard(section), StepGuard(section)
    verdicts = judged(whole, norms)
    begun = judged(first, norms[:cut])
    second = StepGuard(section, json.loads(json.dumps(first.state())))
    assert begun + judged(second, norms[cut:], cut) == verdicts
    assert second.state() == whole.state()


def test_the_report_holds_the_last_steps(tmp_path):
    guard = StepGuard(GuardSection())
    judged(guard, [1.0, 2.0, math.inf], first=7)
    guard.record(math.nan)
    guard.write_report(tmp_path / "report.json", "because", {"step": 10})
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["why"], report["step"]) == ("because", 10)
    assert report["last_steps"][-1] == {"step": 9, "grad_norm": "inf", "skipped": True, "loss": "nan"}
    assert [step["step"] for step in report["last_steps"]] == [7, 8, 9]


def test_a_window_without_a_limit_is_refused():
    with pytest.raises(ValidationError, match="window_steps is for norm_factor and loss_factor"):
        GuardSection(window_steps=10)
