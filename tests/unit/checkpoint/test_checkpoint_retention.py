"""Retention as a pure function: what stays, whatever was saved in whatever order."""

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.checkpoint.manifest import Manifest
from vitscale.checkpoint.retention import Saved, lower_is_better, overtaken, standings, steps_to_keep
from vitscale.config import CheckpointSection
from vitscale.config.checkpoint import ValidationMetric
from vitscale.telemetry import tags

METRICS = get_args(ValidationMetric)


def manifest(step: int, generation: int = 1, metrics=None) -> Manifest:
    return Manifest(
        step=step, generation=generation, world_size=1, optimizer_steps=step, cursor={}, config={}, model={},
        labels=[], shapes={}, metrics=metrics or {}, versions={}, saved_at="", files=[],
    )  # fmt: skip


def test_every_validation_metric_can_choose_the_best_and_has_a_direction():
    known = {value for name, value in vars(tags).items() if name.startswith("VAL_")}
    assert set(METRICS) == known
    assert {metric for metric in METRICS if lower_is_better(metric)} == {tags.VAL_LOSS, tags.VAL_AVERAGE_LOSS}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({"keep_last": 1}, {60}),
        ({"keep_last": 3}, {40, 50, 60}),
        ({"keep_last": 1, "keep_every_steps": 20}, {20, 40, 60}),
        ({"keep_last": 1, "keep_best": "val/top1"}, {20, 60}),
        ({"keep_last": 1, "keep_best": "val/loss"}, {30, 60}),
        ({"keep_last": 1, "keep_best": "val/top5"}, {60}),
        ({"keep_last": 9}, {10, 20, 30, 40, 50, 60}),
    ],
)
def test_newest_every_and_best(keep, kept):
    top1 = {10: 0.1, 20: 0.5, 30: 0.5, 40: math.nan, 50: 0.3, 60: 0.2}
    loss = {10: 3.0, 20: 2.0, 30: 1.0, 40: math.inf, 50: 1.5, 60: 1.5}
    saved = [Saved(step, "sound", {"val/top1": top1[step], "val/loss": loss[step]}) for step in top1]
    assert steps_to_keep(saved, CheckpointSection(**keep)) == kept


def test_what_is_not_sound_neither_counts_nor_goes_before_enough_sound_ones_are_newer():
    keep = CheckpointSection(keep_last=2, keep_every_steps=100, keep_best="val/top1")
    saved = [Saved(100, "overtaken"), Saved(200, "damaged"), Saved(250, "damaged"), Saved(300, "sound")]
    assert steps_to_keep(saved, keep) == {100, 200, 250, 300}
    saved += [Saved(350, "damaged"), Saved(400, "sound")]
    assert steps_to_keep(saved, keep) == {200, 300, 350, 400}
    # A damaged one has no metrics to be the best by, an overtaken one is not kept for its step.
    saved.append(Saved(450, "sound", {"val/top1": 0.1}))
    assert steps_to_keep(saved, keep) == {200, 300, 400, 450}


@given(
    generations=st.dictionaries(st.integers(0, 30), st.integers(1, 6), max_size=12),
)
def test_overtaken_by_its_definition(generations):
    expected = {
        step: max(newer)
        for step, own in generations.items()
        if (newer := [g for other, g in generations.items() if other < step and g > own])
    }
    assert overtaken(generations) == expected


def test_a_run_that_goes_on_overtakes_nothing_of_its_own():
    assert overtaken({100: 1, 200: 1, 300: 2, 400: 5}) == {}
    assert overtaken({100: 1, 150: 2, 200: 1, 300: 1, 400: 2}) == {200: 2, 300: 2}


def test_standings_tell_three_kinds():
    manifests = {100: manifest(100, 1), 150: manifest(150, 2, {"val/top1": 0.5}), 200: manifest(200, 1)}
    manifests |= {250: manifest(250, 2), 300: manifest(300, 2)}
    found = standings(manifests, [100, 175], 250)
    assert found == [
        Saved(100, "damaged"),
        Saved(150, "sound", {"val/top1": 0.5}),
        Saved(175, "damaged"),
        Saved(200, "overtaken"),
        Saved(250, "sound"),
        Saved(300, "damaged"),
    ]


KEEPS = st.builds(
    CheckpointSection,
    keep_last=st.integers(1, 4),
    keep_every_steps=st.none() | st.integers(1, 7),
    keep_best=st.none() | st.just("val/loss"),
)


@given(
    losses=st.lists(st.none() | st.integers(0, 5) | st.just(math.nan), min_size=1, max_size=25),
    keep=KEEPS,
    damage=st.lists(st.integers(0, 30), max_size=5),
)
def test_pruning_after_every_save_loses_nothing_that_was_to_be_kept(losses, keep, damage):
    there: dict[int, Saved] = {}
    best: int | None = None
    sound_so_far: list[int] = []
    for step, loss in enumerate(losses, start=1):
        metrics = {} if loss is None else {"val/loss": float(loss)}
        there[step] = Saved(step, "sound", metrics)
        sound_so_far.append(step)
        value = metrics.get("val/loss", math.nan)
        if math.isfinite(value) and (best is None or value < losses[best - 1]):
            best = step
        kept = steps_to_keep(list(there.values()), keep)
        there = {step: entry for step, entry in there.items() if step in kept}
        # The oracle, from all that was ever saved and not damaged.
        newest = set(sound_so_far[-keep.keep_last :])
        expected = set(newest)
        if keep.keep_every_steps:
            expected |= {step for step in range(1, step + 1) if step % keep.keep_every_steps == 0}
        if keep.keep_best and best is not None:
            expected.add(best)
        assert expected <= set(there)
        extra = set(there) - expected
        assert (
            all(there[step].standing == "damaged" and step > min(newest) for step in extra)
            or len(sound_so_far) < keep.keep_last
        )
        sound_so_far = [step for step in sound_so_far if step in there]
        # Some that is not the newest is damaged from now on.
        for victim in damage:
            if victim in there and victim != step and victim != best and there[victim].standing == "sound":
                there[victim] = Saved(victim, "damaged")
                sound_so_far.remove(victim)


@given(
    entries=st.dictionaries(
        st.integers(0, 50),
        st.tuples(st.sampled_from(["sound", "damaged", "overtaken"]), st.floats(allow_nan=True)),
        max_size=15,
    ),
    keep=KEEPS,
)
def test_the_newest_sound_one_always_stays_and_a_second_pruning_removes_nothing(entries, keep):
    saved = [Saved(step, standing, {"val/loss": loss}) for step, (standing, loss) in entries.items()]
    kept = steps_to_keep(saved, keep)
    sound = [entry.step for entry in saved if entry.standing == "sound"]
    assert kept <= entries.keys()
    assert set(sorted(sound)[-keep.keep_last :]) <= kept
    assert steps_to_keep([entry for entry in saved if entry.step in kept], keep) == kept
    if not sound:
        assert kept == entries.keys()
