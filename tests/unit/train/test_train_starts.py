"""What the record of a run's starts comes to: pure decisions, against plain restatements of their rules."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.errors import ExitStatus, RunDirectoryError
from vitscale.train.starts import (
    FENCED_STARTS,
    End,
    Start,
    diagnosis,
    dump_starts,
    fruitless,
    newest_saved,
    parse_exit,
    parse_starts,
    with_last_end,
)

RUN = Path("runs/g14")
CRASH, SILENCE = End("RuntimeError: NCCL", 7, 1), End("killed, out of memory or its node lost", 8)
ASKED, MISTAKE, DONE = End("received SIGTERM", 5, 75), End("no such shard", 5, 2), End("finished", 9, 0)


def start(generation, end=None, found=5, saved=None, fresh=False):
    return Start(generation, "2026-01-02 03:04:05", "node1", None, fresh, found, saved, end)


ENDS = st.sampled_from([CRASH, SILENCE, ASKED, MISTAKE, DONE, End("diverged", 6, int(ExitStatus.DIVERGED))])
STEPS = st.integers(0, 9)
STARTS = st.lists(
    st.builds(start, st.just(1), ENDS, found=STEPS, saved=st.none() | STEPS, fresh=st.booleans()), max_size=8
)


@given(STARTS)
def test_the_record_is_read_back_as_it_was_written(starts):
    assert parse_starts(dump_starts(starts), RUN) == starts


A_START = '{"generation": %s, "time": "", "host": "", "job": null, "end": %s}'


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "3", "[3]", "{}", "null", b"\xff\xfe", "[" * 100_000, '[{"generation": 1}]', '[{"end": {"a": 1}}]',
        *(f"[{A_START % values}]" for values in (('"x"', "null"), ("1", "5"), ("NaN", "null"))),
    ],
)  # fmt: skip
def test_a_damaged_record_is_named_with_the_mend(text):
    assert len(parse_starts(f"[{A_START % ('1', 'null')}]", RUN)) == 1
    with pytest.raises(RunDirectoryError, match=r"starts\.json: is no record of starts: remove it to go on"):
        parse_starts(text, RUN / "starts.json")


def test_an_end_is_read_of_the_start_that_is_meant():
    text = b'{"status": 2, "reason": "why", "step": 7, "generation": 3, "time": 1.5}'
    assert parse_exit(text, 3) == End("why", 7, 2)
    assert parse_exit(text, 4) is None
    for damaged in (b"", b"[1]", b"\xff", b"[" * 100_000, text.replace(b"7", b'"x"'), text.replace(b"step", b"stop")):
        assert parse_exit(damaged, 3) is None


def test_only_a_start_that_has_not_ended_ends():
    assert with_last_end([], CRASH, 5) == []
    assert with_last_end([start(1, ASKED), start(2)], CRASH, 5) == [start(1, ASKED), start(2, CRASH)]
    assert with_last_end([start(1, ASKED)], CRASH, 10) == [start(1, ASKED)]


def test_a_checkpoint_that_is_there_now_was_saved_by_the_last_start():
    assert with_last_end([start(1)], CRASH, 10) == [start(1, CRASH, saved=10)]
    assert with_last_end([start(1, saved=15)], CRASH, 10) == [start(1, CRASH, saved=15)], "the newer one is gone"
    assert with_last_end([start(1, saved=3)], CRASH, 5) == [start(1, CRASH, saved=3)]


@given(STARTS)
def test_what_was_saved_counts_from_the_last_fresh_start_on(starts):
    since = max((i for i, s in enumerate(starts) if s.fresh), default=0)
    assert newest_saved(starts) == max((max(s.found_step, s.saved_step or 0) for s in starts[since:]), default=0)


@given(STARTS)
def test_the_fence_counts_failures_in_a_row_and_looks_past_requests(starts):
    """Each start as a letter, the rule as a pattern over them, from the newest on."""
    expected = []
    for i, s in reversed(list(enumerate(starts))):
        beyond = [s.found_step, *[e.saved_step for e in starts[:i] if e.saved_step is not None][-1:]]
        advanced = s.saved_step is not None and any(s.saved_step > step for step in beyond)
        if s.end.status == 75 and not advanced:
            continue
        if advanced or s.end.status not in (None, 1):
            break
        expected.append(s)
        if s.fresh:
            break
    assert fruitless(starts) == expected[::-1]
    assert (diagnosis(starts, RUN) is None) == (len(expected) < FENCED_STARTS)


@pytest.mark.fault(20)
def test_three_failures_without_a_new_checkpoint_are_a_diagnosis():
    row = [start(4, CRASH), start(5, ASKED), start(6, SILENCE), start(7, CRASH)]
    assert diagnosis([start(3, CRASH, found=0, saved=5), *row], RUN) == (
        "runs/g14: no new checkpoint since step 5 in 3 starts that failed one after the other (start 4 at step 7: "
        "RuntimeError: NCCL; start 6 at step 8: killed, out of memory or its node lost; start 7 at step 7: "
        "RuntimeError: NCCL): see the job's log, runs/g14/watchdog and checkpoint.every_steps, mend the cause, and "
        "remove runs/g14/starts.json to try again"
    )
    assert diagnosis(row[1:], RUN) is None


@pytest.mark.parametrize(
    "mended",
    [
        start(6, MISTAKE),
        start(6, DONE),
        start(6, CRASH, saved=10),
        start(6, ASKED, saved=10),
        start(6, End("loss", 8, 3)),
    ],
)
def test_a_step_forward_or_a_person_ends_the_row(mended):
    failures = [start(generation, CRASH) for generation in (3, 4, 5)]
    assert diagnosis(failures, RUN) is not None
    assert diagnosis([*failures, mended], RUN) is None
    assert diagnosis([*failures, mended, *failures[:2]], RUN) is None
    assert diagnosis([*failures, mended, *failures], RUN) is not None


def test_the_same_checkpoint_saved_again_is_no_step_forward():
    """A disk that damages every checkpoint: found (by name), passed over, saved again."""
    assert diagnosis([start(generation, CRASH, found=10, saved=10) for generation in (3, 4, 5)], RUN) is not None


def test_below_a_damaged_checkpoint_each_new_one_is_a_step_forward():
    """Found is 1000, by name, and damaged, as is all down to 800; every start saves once and loses its node."""
    climb = [start(2 + i, SILENCE, found=1000, saved=850 + 50 * i) for i in range(3)]
    assert fruitless([start(1, SILENCE, found=950, saved=1000), *climb[:1]]) == climb[:1], "it fell back"
    assert fruitless(climb[:2]) == fruitless(climb) == []
    idle = [start(5 + i, SILENCE, found=1000) for i in range(2)]
    assert fruitless([*climb, *idle]) == idle
    assert fruitless([*climb, *idle, start(7, SILENCE, found=1000, saved=1000)]) == []
    again = start(7, SILENCE, found=1000, saved=950)
    assert diagnosis([*climb, *idle, again], RUN) is not None


def test_the_record_is_for_people_too():
    assert json.loads(dump_starts([start(2, CRASH, saved=10)])) == [
        {
            "generation": 2, "time": "2026-01-02 03:04:05", "host": "node1", "job": None, "fresh": False,
            "found_step": 5, "saved_step": 10, "end": {"reason": "RuntimeError: NCCL", "step": 7, "status": 1},
        }
    ]  # fmt: skip
