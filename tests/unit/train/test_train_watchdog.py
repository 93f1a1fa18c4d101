"""The watchdog of one rank, in real processes that hang or are suspended."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed_runner import forkserver_context
from micro_run import micro_tree
from pydantic import ValidationError

from vitscale.config import Config, WatchdogSection
from vitscale.errors import ExitStatus, RunDirectoryError
from vitscale.ranks.groups import Ranks
from vitscale.train import lock as lock_module
from vitscale.train.beats import BEAT_BYTES, Beat, Part, all_asked, beat_file, read_beat, verdict
from vitscale.train.lock import ProcessMark
from vitscale.train.run_directory import RunDirectory
from vitscale.train.stop import StopRequest
from vitscale.train.watchdog import Watchdog

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
BEAT_S = 0.1
LIMITS = {"beat_s": BEAT_S, "answer_s": 2.0}
DEFAULTS = WatchdogSection()


@pytest.fixture
def config(tmp_path):
    return Config.model_validate(micro_tree(tmp_path / "data", tmp_path / "run"))


@pytest.fixture
def directory(config):
    opened = RunDirectory.open(config, ALONE)
    yield opened
    opened.close(ExitStatus.FINISHED, "", 0)


def watch(directory, stop=None, **limits):
    return Watchdog(WatchdogSection(**{**LIMITS, **limits}), ALONE, directory, stop or StopRequest()).start()


def in_child(fn, *args):
    process = forkserver_context().Process(target=fn, args=args)
    process.start()
    return process


def hang_here(config, **limits):
    """A run of one rank that hangs in its data after 12 steps."""
    watchdog = watch(RunDirectory.open(config, ALONE), data_s=0.5)
    watchdog.enter(Part.STEP, 12)
    with watchdog.within(Part.DATA):
        time.sleep(60)


def test_a_rank_that_hangs_ends_with_its_stacks_and_a_verdict(config):
    process = in_child(hang_here, config)
    process.join(20)
    assert process.exitcode == ExitStatus.TRANSIENT
    run_dir = config.run.dir
    end = json.loads((run_dir / "exit.json").read_text())
    assert (end["status"], end["step"], end["generation"]) == (1, 12, 1)
    assert end["reason"].startswith("the run stands still past its limit of 0.5 s: in section data rank 0 (")
    assert end["reason"].endswith(f"stacks in {run_dir}/watchdog/stacks-1-rank-*.txt")
    stacks = (run_dir / "watchdog" / "stacks-1-rank-00000.txt").read_text()
    assert stacks.startswith("rank 0 on ")
    assert "in section data for " in stacks
    assert "in hang_here" in stacks
    assert read_beat(run_dir, 0, 1).answered


def hang_without_a_folder(config, stderr):
    """The folder of alarm and stacks goes away before the limit has passed."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    directory = RunDirectory.open(config, ALONE)
    watch(directory, start_s=0.5)
    (directory.path / "watchdog").rename(directory.path / "gone")
    time.sleep(60)


def test_a_rank_that_cannot_write_its_stacks_ends_all_the_same(config, tmp_path):
    process = in_child(hang_without_a_folder, config, tmp_path / "stderr")
    process.join(20)
    assert process.exitcode == ExitStatus.TRANSIENT
    assert not list(config.run.dir.glob("*/stacks*"))


def work(config, pipe):
    watchdog = watch(RunDirectory.open(config, ALONE), start_s=1.0)
    time.sleep(0.5)
    pipe.send("half of the limit has passed")
    time.sleep(0.3)
    watchdog.close()
    os._exit(0)


def test_a_suspended_process_does_not_hang(config):
    own, other = multiprocessing.Pipe()
    process = in_child(work, config, other)
    own.recv()
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.0)
    os.kill(process.pid, signal.SIGCONT)
    process.join(20)
    assert process.exitcode == 0
    assert not (config.run.dir / "watchdog" / "stacks-1-rank-00000.txt").exists()


def test_a_run_that_moves_is_left_alone(directory):
    watchdog = watch(directory, start_s=0.5, data_s=0.5, step_s=0.5, validation_s=None)
    deadline_s, step = time.monotonic() + 1.5, 0
    while time.monotonic() < deadline_s:
        watchdog.enter(Part.STEP, step)
        assert list(watchdog.each(Part.DATA, iter("ab"))) == ["a", "b"]
        time.sleep(0.2)
        step += 1
    with watchdog.within(Part.VALIDATION):  # which has no limit
        time.sleep(1.0)
        beat = read_beat(directory.path, 0, directory.generation)
    assert (beat.section, beat.step, beat.answered) == ("validation", step - 1, False)
    assert 0.5 < beat.stay_s < 1.5
    assert time.time() - beat.time < 1.0
    assert beat_file(directory.path, 0).stat().st_size == BEAT_BYTES
    watchdog.close()
    assert read_beat(directory.path, 0, directory.generation + 1) is None
    assert not directory.has_ended()


def pass_through_a_section_without_limit(config, stderr):
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    watchdog = watch(RunDirectory.open(config, ALONE), start_s=0.5, validation_s=None)
    time.sleep(3 * BEAT_S)
    with watchdog.within(Part.VALIDATION):
        time.sleep(1.5)
    watchdog.close()
    os._exit(0)


def test_a_section_without_a_limit_has_no_stacks_dumped(config, tmp_path):
    process = in_child(pass_through_a_section_without_limit, config, tmp_path / "stderr")
    process.join(20)
    assert process.exitcode == 0
    assert not (tmp_path / "stderr").read_text()


def start_in_cpp(config, port):
    """A start that hears signals, and then hangs in C++."""
    stop = StopRequest()
    stop.install()
    watch(RunDirectory.open(config, ALONE), stop, beat_s=20.0, answer_s=60.0)
    torch.distributed.TCPStore("127.0.0.1", port).wait(["never"])


@pytest.mark.fault(20)
def test_a_start_that_is_preempted_before_it_can_stop_is_no_failure(config):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    for generation in (1, 2, 3):
        process = in_child(start_in_cpp, config, store.port)
        wait_for(lambda: read_beat(config.run.dir, 0, generation))  # noqa: B023
        time.sleep(0.5)
        assert not read_beat(config.run.dir, 0, generation).asked
        os.kill(process.pid, signal.SIGTERM)
        wait_for(lambda: all_asked(config.run.dir, generation), limit_s=5.0)  # noqa: B023
        process.kill()
        process.join()
    RunDirectory.open(config, ALONE).close(ExitStatus.FINISHED, "", 0)
    records = json.loads((config.run.dir / "starts.json").read_text())
    assert [record["end"] for record in records[:3]] == 3 * [
        {
            "reason": "asked to stop, and killed before it could, last seen in its section start",
            "step": 0,
            "status": ExitStatus.RUN_AGAIN,
        }
    ]


def wait_for(condition, limit_s=20.0):
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


class Stumbling:
    """The alarm's path on a server that has lost its handle."""

    looks = 0

    def exists(self):
        self.looks += 1
        raise OSError(errno.ESTALE, "Stale file handle")


def test_a_server_that_stumbles_ends_no_watch(directory):
    watchdog = watch(directory)
    watchdog._alarm = alarm = Stumbling()
    wait_for(lambda: alarm.looks > 1)
    watchdog.enter(Part.STEP, 12)
    wait_for(lambda: read_beat(directory.path, 0, directory.generation).step == 12)
    watchdog.close()


def test_a_lock_that_lives_by_its_beats_keeps_them_when_no_other_can_be_written(config, monkeypatch):
    def no_flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    monkeypatch.setattr(lock_module, "SETTLE_S", 0.1)
    directory = RunDirectory.open(config, ALONE)
    watchdog = watch(directory)
    with Path("/dev/full").open("wb", buffering=0) as full:
        os.dup2(full.fileno(), watchdog._file.fileno())
    lock = directory.path / "lock"
    before_ns = lock.stat().st_mtime_ns
    time.sleep(3 * BEAT_S)
    wait_for(lambda: lock.stat().st_mtime_ns > before_ns + 1e9 * BEAT_S, limit_s=2.0)
    watchdog.close()
    directory.close(ExitStatus.FINISHED, "", 0)


def test_sections_nest_and_an_error_leaves_them(directory):
    watchdog = Watchdog(DEFAULTS, ALONE, directory, StopRequest())
    watchdog.enter(Part.STEP, 3)
    within = []
    with contextlib.suppress(KeyError), watchdog.within(Part.VALIDATION), watchdog.within(Part.DATA):
        within.append(watchdog._at)
        raise KeyError
    assert within == [(Part.DATA, 3)]
    assert watchdog._at == (Part.STEP, 3)
    items = watchdog.each(Part.DATA, (watchdog._at for _ in range(2)))
    for inside in items:
        assert inside == (Part.DATA, 3)
        assert watchdog._at == (Part.STEP, 3)
    watchdog.close()  # it never started


def test_what_earlier_starts_left_is_cleared_but_for_the_last_stacks(directory):
    folder = directory.path / "watchdog"
    folder.mkdir()
    for name in ("rank-00007.json", "alarm-3.json", "stacks-3-rank-00000.txt", "stacks-10-rank-00001.txt"):
        (folder / name).touch()
    watch(directory).close()
    assert {path.name for path in folder.iterdir()} == {"rank-00000.json", "stacks-10-rank-00001.txt"}
    (folder / "not ours").mkdir()
    with pytest.raises(RunDirectoryError, match=r"watchdog: cannot be cleared: .* remove it"):
        watch(directory)


def test_a_rank_that_does_not_see_the_folder_stops_the_start(directory, monkeypatch):
    monkeypatch.setattr(Watchdog, "_clear", lambda _: None)  # rank 0 made it, on another node's disk
    with pytest.raises(RunDirectoryError) as caught:
        watch(directory)
    assert "not every rank can write there (rank 0 on " in str(caught.value)
    assert str(caught.value).endswith("No such file or directory): run.dir must be one directory that all nodes see")


def beat(rank, section="step", stay_s=500.0, answered=True):
    return Beat(3, rank, "node1", ProcessMark("boot", 100 + rank, 1), section, 12, stay_s, 0.0, answered)


def test_the_verdict_names_the_silent_then_the_fewest(tmp_path):
    text = verdict({0: beat(0), 1: beat(1, answered=False), 2: None, 3: beat(3, "data", 490)}, 480.0, tmp_path, 3)
    assert text == (
        "the run stands still past its limit of 480 s: no answer from rank 1 (node1, pid 101, last seen in section "
        "step after step 12), rank 2 (never heard of); in section data rank 3 (node1, pid 103, for 490 s after step 12)"
        f"; in section step rank 0 (node1, pid 100, for 500 s after step 12); stacks in {tmp_path}/stacks-3-rank-*.txt"
    )


def test_the_verdict_of_thousands_is_still_one_line(tmp_path):
    beats = {rank: beat(rank, "data" if rank == 77 else "step", stay_s=rank) for rank in range(4096)}
    text = verdict(beats, None, tmp_path, 3)
    assert text.startswith("the run stands still: in section data rank 77 (node1, pid 177, for 77 s after step 12); in")
    assert "in section step rank 4095 (" in text
    assert "and 4087 more; stacks in" in text
    assert len(text) < 1000


def test_a_beat_is_read_back_and_a_torn_one_is_none(tmp_path):
    (tmp_path / "watchdog").mkdir()
    assert read_beat(tmp_path, 1, 3) is None
    written = beat(1, Part.VALIDATION, answered=False)
    file = beat_file(tmp_path, 1)
    file.write_bytes(written.encode())
    assert len(written.encode()) == BEAT_BYTES
    assert read_beat(tmp_path, 1, 3) == written
    for torn in (b"", written.encode()[:100], b"[]", b"{}", b"\xff"):
        file.write_bytes(torn)
        assert read_beat(tmp_path, 1, 3) is None


def test_a_start_was_asked_to_stop_when_all_its_ranks_were(tmp_path):
    """Launchers ask the others to stop when one rank dies, and kill them then."""
    (tmp_path / "watchdog").mkdir()
    assert not all_asked(tmp_path, 3)
    for rank in (0, 1):
        beat_file(tmp_path, rank).write_bytes(replace(beat(rank), asked=True).encode())
    assert all_asked(tmp_path, 3)
    assert not all_asked(tmp_path, 4)
    beat_file(tmp_path, 2).write_bytes(replace(beat(2), asked=True, generation=2).encode())
    assert all_asked(tmp_path, 3), "an older start's"
    for rank in (1, 0):
        beat_file(tmp_path, rank).write_bytes(beat(rank).encode())
        assert not all_asked(tmp_path, 3), rank


@pytest.mark.parametrize(
    ("limits", "mend"),
    [
        ({"step_s": 300}, "step_s=300 is less than data_s=360: ranks that wait in a step .* raise step_s"),
        ({"answer_s": 15}, "answer_s=15 leaves no time to answer .* give it at least twice as much"),
        ({"beat_s": 30}, "less than or equal to 20"),
        ({"save_s": 0}, "greater than 0"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(limits, mend):
    with pytest.raises(ValidationError, match=mend):
        WatchdogSection(**limits)


def test_the_default_limits_come_before_those_of_the_collectives(config):
    assert config.data.remote.patience_s < DEFAULTS.data_s < DEFAULTS.step_s
    assert DEFAULTS.step_s + DEFAULTS.beat_s + DEFAULTS.answer_s < 600
    assert WatchdogSection(step_s=None, data_s=900).step_s is None
