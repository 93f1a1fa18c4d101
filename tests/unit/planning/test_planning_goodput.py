"""Goodput: the formula against drawn failures, and these against a clock that goes second by second."""

import math
from dataclasses import astuple, fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.planning import (
    BEST,
    ORIGINS,
    WORST,
    ClusterCosts,
    FailureRate,
    RestartTimes,
    SaveTimes,
    SmallRun,
    UpdateBytes,
    best_interval_s,
    checkpoint_bytes,
    daly_interval_s,
    expected_shares,
    predict,
    simulate,
    under_failures,
    young_interval_s,
)
from vitscale.planning.updates import ADAMW

DAY_S = 86_400
MONTH_S = 30 * DAY_S


def outcome(save, restart_s, failures_s, horizon_s):
    """(kept, stalled, lost, down) of one run."""
    return tuple(
        float(seconds[0]) for seconds in astuple(under_failures(save, restart_s, np.array([failures_s]), horizon_s))
    )


def by_the_second(save, restart_s, failures_s, horizon_s, *, start_s=0, work_s=math.inf):
    """The same, all times being whole: what the run does in each second. With `work_s` the time when that is saved."""
    stalled = lost = down = 0
    work = tagged = trained = stalling = 0
    copied = writing = None  # the state that is written, and how long still
    waiting_s = start_s
    for now in range(horizon_s):
        if writing == 0:
            tagged, writing = copied, None
        if tagged == work_s:
            return now
        if now in failures_s:
            lost += work - tagged
            work, trained, stalling, writing, waiting_s = tagged, 0, 0, None, restart_s
        if waiting_s:
            waiting_s, down = waiting_s - 1, down + 1
            continue
        save_due = trained == save.interval_s or work == work_s
        waits = save_due and not stalling and writing is not None
        writing = None if writing is None else writing - 1
        if not save_due:
            trained, work = trained + 1, work + 1
            continue
        stalled += 1
        stalling += 0 if waits else 1
        if stalling == save.stall_s:
            copied, writing, trained, stalling = work, save.write_s, 0, 0
    return work, stalled, lost, down


TAGS = SaveTimes(interval_s=100, stall_s=10, write_s=30)


@pytest.mark.parametrize(
    ("save", "failures", "expected"),
    [
        (TAGS, [], (460.0, 40.0, 0.0, 0.0)),
        # Tags at 140 and 250; 240 s are trained by 260, 180 s from 310 on.
        (TAGS, [260], (380.0, 30.0, 40.0, 50.0)),
        # The second tag is still being written.
        (TAGS, [245], (295.0, 30.0, 125.0, 50.0)),
        # In the stall of the first save.
        (TAGS, [105], (315.0, 35.0, 100.0, 50.0)),
        # Again in the restart, which begins anew.
        (TAGS, [260, 300], (340.0, 30.0, 40.0, 90.0)),
        # At the very end.
        (TAGS, [480], (400.0, 40.0, 40.0, 20.0)),
        # The second save waits from 210 to 260: tags at 260 and 420.
        (replace(TAGS, write_s=150), [430], (220.0, 130.0, 100.0, 50.0)),
    ],
)
def test_failures_at_known_times(save, failures, expected):
    assert sum(expected) == 500
    assert outcome(save, 50, [*failures, math.inf], 500) == expected


@given(
    save=st.builds(SaveTimes, interval_s=st.integers(1, 40), stall_s=st.integers(1, 9), write_s=st.integers(0, 60)),
    restart_s=st.integers(0, 30),
    failures=st.sets(st.integers(0, 399), max_size=8),
    horizon_s=st.integers(1, 400),
)
def test_failures_second_by_second(save, restart_s, failures, horizon_s):
    expected = by_the_second(save, restart_s, failures, horizon_s)
    assert outcome(save, restart_s, [*sorted(failures), math.inf], horizon_s) == expected


def test_without_failures_only_stalls_cost():
    save, never = SaveTimes(interval_s=990, stall_s=10, write_s=200), FailureRate(0.0, 1024)
    shares = expected_shares(save, RestartTimes(detect_s=1000), never.mean_between_s)
    assert shares.kept == pytest.approx(1 - 10 / 1000)
    assert (shares.lost, shares.down) == (0, 0)
    drawn = simulate(save, RestartTimes(), never, horizon_s=1e6, runs=3, generator=np.random.default_rng(0))
    assert drawn.goodput == pytest.approx([0.99] * 3)


RESTART = RestartTimes(detect_s=60, requeue_s=30, import_s=10, rendezvous_s=5, read_s=15, compile_s=60, first_step_s=20)
FREQUENT = FailureRate(per_gpu_day=5e-3, gpus=16_384)  # every 18 minutes


@pytest.mark.parametrize(
    ("save", "restart"),
    [
        (SaveTimes(interval_s=120, stall_s=6, write_s=40), RESTART),
        (SaveTimes(interval_s=120, stall_s=6, write_s=200), RESTART),
        (SaveTimes(interval_s=400, stall_s=0.5, write_s=0), RestartTimes()),
        (SaveTimes(interval_s=120, stall_s=6, write_s=40), replace(RESTART, node_wait_s=900, node_share=0.3)),
    ],
)
def test_the_formula_is_what_drawn_failures_come_to(save, restart):
    expected = expected_shares(save, restart, FREQUENT.mean_between_s)
    # From the first to the second horizon, so that how a run begins and ends falls out.
    short, long = (
        simulate(save, restart, FREQUENT, horizon_s=days * DAY_S, runs=10_000, generator=np.random.default_rng(days))
        for days in (1, 4)
    )
    for share, early, late in zip(astuple(expected), astuple(short), astuple(long), strict=True):
        found = (late.mean() - early.mean()) / (3 * DAY_S)
        error = math.hypot(late.std(), early.std()) / math.sqrt(10_000) / (3 * DAY_S)
        assert abs(found - share) <= 4 * error
        assert error < 4e-4


@pytest.mark.parametrize("costs", [BEST, WORST])
def test_a_month_on_1024_gpus(costs):
    """g/14's state, 10,000 runs: as the formula says, but for what is not yet saved at the end, which counts."""
    failures = costs.failures(1024)
    state_bytes = 12 * 1_043_963_091
    interval_s = best_interval_s(
        costs.stall_s(state_bytes, 1024), costs.write_s(state_bytes, 1024), failures.mean_between_s
    )
    save, restart = costs.save(state_bytes, 1024, interval_s), costs.restart(state_bytes, 1024)
    expected = expected_shares(save, restart, failures.mean_between_s).kept
    runs = simulate(save, restart, failures, horizon_s=MONTH_S, runs=10_000, generator=np.random.default_rng(7)).goodput
    error = 4 * runs.std() / math.sqrt(len(runs))
    at_the_end = (save.first_commit_s + restart.mean_s) / MONTH_S
    assert expected - error <= runs.mean() <= expected + at_the_end + error
    assert at_the_end < 8e-4


seconds = st.floats(0, 2000)
saves = st.builds(SaveTimes, interval_s=st.floats(1, 1e5), stall_s=st.floats(0.01, 100), write_s=seconds)
restarts = st.builds(
    RestartTimes, detect_s=seconds, compile_s=seconds, node_wait_s=st.floats(0, 1e5), node_share=st.floats(0, 1)
)


@given(saves, restarts, st.floats(1e3, 1e8))
def test_shares_make_up_the_whole(save, restart, mean_between_s):
    shares = expected_shares(save, restart, mean_between_s)
    assert sum(astuple(shares)) == pytest.approx(1)
    assert min(astuple(shares)) >= -1e-12
    for worse in (replace(save, stall_s=2 * save.stall_s), replace(save, write_s=save.write_s + 100)):
        assert expected_shares(worse, restart, mean_between_s).kept < shares.kept + 1e-15
    slower = replace(restart, detect_s=restart.detect_s + 100)
    assert expected_shares(save, slower, mean_between_s).kept < shares.kept + 1e-15
    assert expected_shares(save, restart, 2 * mean_between_s).kept > shares.kept - 1e-15


def exact_interval_s(stall_s, mean_between_s):
    """Where the goodput's derivative by the interval t is zero: (1 - t / M) exp((t + s) / M) = 1, halved down."""
    low, high = 0.0, mean_between_s
    for _ in range(200):
        middle = (low + high) / 2
        rising = (1 - middle / mean_between_s) * math.exp((middle + stall_s) / mean_between_s) > 1
        low, high = (middle, high) if rising else (low, middle)
    return low


@given(st.floats(0.01, 100), st.floats(3e3, 1e7))
def test_dalys_interval_is_the_best_one(stall_s, mean_between_s):
    exact = exact_interval_s(stall_s, mean_between_s)
    ratio = stall_s / mean_between_s
    assert abs(daly_interval_s(stall_s, mean_between_s) - exact) <= 0.02 * ratio**1.5 * mean_between_s + 1e-6 * exact
    assert abs(young_interval_s(stall_s, mean_between_s) - exact) <= stall_s

    def goodput(interval_s):
        return expected_shares(SaveTimes(interval_s, stall_s), RestartTimes(), mean_between_s).kept

    assert goodput(exact) >= max(goodput(0.97 * exact), goodput(1.03 * exact))
    assert goodput(daly_interval_s(stall_s, mean_between_s)) >= goodput(exact) * (1 - 1e-6)


def test_intervals_at_their_ends():
    assert young_interval_s(50, 10_000) == 1000
    assert daly_interval_s(50, 10_000) == pytest.approx(1000 * (1 + 0.05 / 3 + 0.0025 / 9) - 50)
    assert daly_interval_s(300, 100) == 100
    assert best_interval_s(0.05, 30, 10_000) == daly_interval_s(0.05, 10_000) > 30
    assert best_interval_s(0.05, 400, 10_000) == 400


def test_failures_of_llama_3():
    failures = BEST.failures(1024)
    assert failures.per_gpu_day == pytest.approx(5.267e-4, rel=1e-3)
    assert failures.mean_between_s / 3600 == pytest.approx(44.5, abs=0.1)
    unexpected = FailureRate(419 / (54 * 16_384), 1024)
    assert unexpected.per_gpu_day == pytest.approx(4.736e-4, rel=1e-3)
    assert unexpected.mean_between_s / 3600 == pytest.approx(49.5, abs=0.1)


@pytest.mark.parametrize(("shape", "deviation"), [(1.0, 1.0), (0.7, 1.4624)])
def test_times_between_failures(shape, deviation):
    failures = FailureRate(1e-3, 1000, shape)
    assert failures.mean_between_s == DAY_S
    times = failures.draw(500, 60 * DAY_S, np.random.default_rng(3))
    assert times[:, -1].min() >= 60 * DAY_S
    gaps = np.diff(times, axis=1, prepend=0.0)
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(DAY_S, abs=4 * gaps.std() / math.sqrt(gaps.size))
    assert gaps.std() / gaps.mean() == pytest.approx(deviation, rel=0.03)
    assert np.array_equal(times, failures.draw(500, 60 * DAY_S, np.random.default_rng(3)))


def test_as_many_failures_are_drawn_as_it_takes():
    """Where they cluster so much that the first draw does not reach the horizon in every run."""
    failures = FailureRate(1e-3, 1000, 0.3)
    times = failures.draw(200, 20 * DAY_S, np.random.default_rng(1))
    assert times[:, -1].min() >= 20 * DAY_S
    assert np.diff(times, axis=1).min() >= 0
    assert (times < 20 * DAY_S).sum(axis=1).max() > 42  # of the first draw


SMALL = SmallRun(
    steps=25, every_steps=10, step_s=2, stall_s=1, write_s=4, start_s=30, detect_s=3, restart_s=20
)  # tags at 55 and 76


def test_a_small_run_by_hand():
    whole = predict(SMALL, [])
    assert whole.wall_s == 30 + 20 + 1 + 20 + 1 + 10 + 1 + 4
    assert whole.goodput == 50 / 87
    assert predict(SMALL, [90]) == whole
    # From tag 10 on: 15 steps and a save between them.
    assert predict(SMALL, [75]).wall_s == 75 + 23 + 20 + 1 + 10 + 1 + 4
    # From tag 20 on.
    assert predict(SMALL, [77]).wall_s == 77 + 23 + 10 + 1 + 4
    # Before the first tag, and again in the restart.
    assert predict(SMALL, [54, 60]).wall_s == 60 + 23 + 57
    # The last save waits for the one before it.
    assert predict(replace(SMALL, write_s=14), [80]).wall_s == 80 + 23 + 20 + 1 + 14 + 1 + 14


@given(
    run=st.builds(
        SmallRun, steps=st.integers(1, 40), every_steps=st.integers(1, 12), step_s=st.integers(1, 5),
        stall_s=st.integers(1, 4), write_s=st.integers(0, 30), start_s=st.integers(0, 9), detect_s=st.integers(0, 9),
        restart_s=st.integers(0, 20),
    ),
    kills=st.lists(st.integers(0, 300), max_size=6).map(sorted),
)  # fmt: skip
def test_a_small_run_second_by_second(run, kills):
    work_s = run.steps * run.step_s
    again_s = run.detect_s + run.restart_s
    wall_s = by_the_second(run.save, again_s, set(kills), 10_000, start_s=run.start_s, work_s=work_s)
    predicted = predict(run, kills)
    assert predicted.wall_s == wall_s
    assert predicted.goodput == work_s / wall_s


def test_a_tag_of_giant_by_optimizer():
    parameters = 1_043_963_091
    assert checkpoint_bytes(parameters, ADAMW, average=False) == 12 * parameters
    assert checkpoint_bytes(parameters, ADAMW, average=True) == 16 * parameters
    factored = UpdateBytes(2, whole=4000, plain=100)
    assert checkpoint_bytes(parameters, factored, average=False) == 6 * parameters + 4400


@pytest.mark.parametrize("costs", [BEST, WORST])
def test_costs_grow_with_the_state_and_share_it_among_ranks(costs):
    state_bytes, more = 12_000_000_000, 24_000_000_000
    for gpus in (64, 1024):
        copied, twice = (costs.stall_s(size, gpus) - costs.agree_s for size in (state_bytes, more))
        assert twice == pytest.approx(2 * copied)
        assert copied == pytest.approx(state_bytes / gpus / (costs.copy_gb_per_gpu_s * 1e9))
        grown = costs.write_s(more, gpus) - costs.write_s(state_bytes, gpus)
        assert grown == pytest.approx(state_bytes / gpus / (costs.storage_gb_per_gpu_s * 1e9))
        read, reread = (costs.restart(size, gpus).read_s for size in (state_bytes, more))
        assert reread - read == pytest.approx(grown + state_bytes / (costs.check_gb_per_s * 1e9))
    few, many = costs.restart(state_bytes, 64), costs.restart(state_bytes, 1024)
    assert many.rendezvous_s == pytest.approx(16 * few.rendezvous_s)
    assert (few.detect_s, few.compile_s) == (many.detect_s, many.compile_s)
    assert costs.save(state_bytes, 64, 300) == SaveTimes(
        300, costs.stall_s(state_bytes, 64), costs.write_s(state_bytes, 64)
    )


def test_every_figure_says_where_it_comes_from():
    assert list(ORIGINS) == [field.name for field in fields(ClusterCosts)]
    for gpus in (64, 16_384):
        best, worst = (costs.restart(10**10, gpus) for costs in (BEST, WORST))
        assert all(b <= w for b, w in zip(astuple(best), astuple(worst), strict=True))
        assert BEST.stall_s(10**10, gpus) < WORST.stall_s(10**10, gpus)
        assert BEST.write_s(10**10, gpus) < WORST.write_s(10**10, gpus)
