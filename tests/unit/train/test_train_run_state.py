"""What a run directory says of its run, sound or damaged."""

import json
import os
import shutil
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.errors import RunDirectoryError
from vitscale.train.lock import Owner, ProcessMark, RunLock
from vitscale.train.run_state import (
    SILENT_S,
    Signs,
    SlurmJob,
    State,
    find_runs,
    job_of,
    read_signs,
    state_of,
    summarise,
)

OWNER = "pid 7 on n1 (since then)"
WAITS, IS_ON = SlurmJob("PENDING", "Priority"), SlurmJob("RUNNING")


@pytest.mark.parametrize(
    ("signs", "state"),
    [
        (Signs(), State.NEW),
        (Signs(job=WAITS), State.QUEUED),
        (Signs(started=True, end=(75, "SIGTERM"), job=WAITS), State.QUEUED),
        (Signs(started=True, owner=OWNER, owner_lives=True, job=WAITS), State.RUNNING),
        (Signs(started=True, owner=OWNER, silent_s=600, job=WAITS), State.QUEUED),
        (Signs(job=IS_ON), State.STARTING),
        (Signs(job=SlurmJob("CONFIGURING")), State.STARTING),
        (Signs(started=True, end=(75, "SIGTERM"), job=SlurmJob("COMPLETING")), State.STARTING),
        (Signs(started=True, end=(1, "the run stands still"), job=IS_ON), State.STARTING),
        (Signs(started=True, job=IS_ON), State.STARTING),
        (Signs(started=True, owner=OWNER, owner_lives=False, job=IS_ON), State.STARTING),
        (Signs(started=True, owner=OWNER, job=IS_ON), State.RUNNING),
        (Signs(started=True, owner=OWNER, silent_s=600, job=IS_ON), State.HUNG),
        (Signs(started=True, end=(0, "finished"), job=IS_ON), State.FINISHED),
        (Signs(started=True, end=(2, "no shards"), job=IS_ON), State.FAILED),
        (Signs(started=True, owner=OWNER, owner_lives=True), State.RUNNING),
        (Signs(started=True, owner=OWNER, silent_s=SILENT_S), State.RUNNING),
        (Signs(started=True, owner=OWNER, silent_s=600), State.HUNG),
        (Signs(started=True, owner=OWNER, owner_lives=True, silent_s=600), State.HUNG),
        (Signs(started=True, owner=OWNER, owner_lives=False), State.FAILED),
        (Signs(started=True), State.FAILED),
        (Signs(started=True, end=(0, "finished")), State.FINISHED),
        (Signs(started=True, end=(0, "finished"), owner=OWNER), State.FINISHED),
        (Signs(started=True, end=(75, "SIGTERM")), State.STOPPED),
        (Signs(started=True, end=(3, "loss is nan")), State.FAILED),
        (Signs(started=True, end=(1, "the run stands still")), State.FAILED),
    ],
)
def test_the_state_follows_from_the_signs(signs, state):
    assert state_of(signs)[0] == state


def test_what_went_wrong_is_told():
    assert state_of(Signs(started=True, end=(2, "no shards: build some")))[1] == "no shards: build some"
    assert state_of(Signs(started=True, owner=OWNER, silent_s=720))[1] == f"no sign of life for 12 min from {OWNER}"
    assert state_of(Signs(started=True, owner=OWNER, owner_lives=False))[1] == f"ended without a word: {OWNER} is gone"
    assert state_of(Signs(job=SlurmJob("PENDING", "JobHeldUser"))) == (State.QUEUED, "JobHeldUser")
    assert state_of(Signs(job=WAITS)) == (State.QUEUED, "")


JOBS = st.builds(SlurmJob, st.sampled_from(["PENDING", "CONFIGURING", "RUNNING", "COMPLETING"]), st.text())


@given(
    st.builds(
        Signs,
        job=st.none() | JOBS,
        owner=st.sampled_from(["", OWNER]),
        end=st.none() | st.tuples(st.integers(), st.text()),
    )
)
def test_every_mixture_of_signs_is_some_state(signs):
    state, reason = state_of(signs)
    assert state in State
    assert isinstance(reason, str)


def test_the_lock_says_whether_its_owner_lives(tmp_path):
    lock = RunLock(tmp_path / "lock")
    lock.take()
    signs = read_signs(tmp_path, True, None, time.time())
    assert str(os.getpid()) in signs.owner
    assert signs.owner_lives
    assert signs.silent_s < 60
    here = ProcessMark.own()
    for mark, lives in ((replace(here, started=here.started + 1), False), (replace(here, kernel="another"), None)):
        record = json.loads((tmp_path / "lock").read_text()) | {"mark": vars(mark)}
        (tmp_path / "lock").write_text(json.dumps(record))
        assert read_signs(tmp_path, True, None, time.time()).owner_lives is lives
    assert read_signs(tmp_path, True, None, time.time() + 600).silent_s == pytest.approx(600, abs=60)
    assert isinstance(Owner.own().mark, ProcessMark)


def test_runs_are_found_a_few_levels_down_and_not_inside_of_runs(tmp_path):
    for run, sign in (("a", "lock"), ("sweep/lr-2", "starts.json"), ("sweep/lr-1", "metrics.jsonl")):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / sign).touch()
    (tmp_path / "queued" / "slurm").mkdir(parents=True)
    (tmp_path / "queued" / "slurm" / "job.json").write_text('{"job_id": "12_3"}')
    (tmp_path / "a" / "old").mkdir()
    (tmp_path / "a" / "old" / "lock").touch()
    (tmp_path / "deep/er/and/deeper/still").mkdir(parents=True)
    (tmp_path / "deep/er/and/deeper/still/lock").touch()
    (tmp_path / "sweep" / "slurm" / "config-1").mkdir(parents=True)
    (tmp_path / "note.txt").touch()
    names = ["a", "queued", "sweep/lr-1", "sweep/lr-2"]
    assert find_runs(tmp_path) == [tmp_path / name for name in names]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    assert (job_of(tmp_path / "queued"), job_of(tmp_path / "a")) == ("12_3", None)
    for nothing in ("deep", "note.txt", "not-there"):
        with pytest.raises(RunDirectoryError, match="no run directory here: give one"):
            find_runs(tmp_path / nothing)


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\0", '{"status": "x"}', "udcff"])
def test_damaged_files_are_not_known_and_no_error(tmp_path, content):
    for name in ("config.yaml", "metrics.jsonl", "exit.json", "starts.json", "lock", "slurm/job.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode() if content != "udcff" else b"\xff\xfe")
    found = summarise(tmp_path, job=None, now_s=time.time())
    assert (found.state, found.step, found.total_steps, found.restarts) == (State.NEW, None, None, 0)
    assert job_of(tmp_path) is None
    shutil.rmtree(tmp_path)
    assert summarise(tmp_path, job=None, now_s=time.time()).state == State.NEW
