"""A save beside the training, rank by rank in one process: what it takes, when it is on disk, and how ranks meet."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from micro_run import micro_tree
from saved_tags import manifest_of, save

from vitscale.checkpoint import (
    BackgroundTask,
    CheckpointStore,
    FileRecord,
    Snapshot,
    collect_records,
    leave_record,
    rank_file_name,
    read_fragments,
    write_fragments,
)
from vitscale.config import Config
from vitscale.engine import Fragment
from vitscale.errors import CheckpointError, ExitStatus, RunDirectoryError
from vitscale.ranks.groups import Ranks
from vitscale.train.run_directory import RunDirectory
from vitscale.train.saving import Saver

CPU = torch.device("cpu")


def fragment(rank: int) -> Fragment:
    return Fragment("w", 64 * rank, {"master": torch.full((64,), float(rank))}, saved_here=True)


@pytest.fixture
def directory(tmp_path) -> Iterator[RunDirectory]:
    config = Config.model_validate(micro_tree(tmp_path / "data", tmp_path / "run"))
    opened = RunDirectory.open(config, Ranks(0, 1, 0, 1, CPU))
    yield opened
    opened.close(ExitStatus.RUN_AGAIN, "", 0)


@pytest.fixture
def savers(directory, tmp_path) -> list[Saver]:
    """One of each of two ranks, each with its copy of the state."""
    config = Config.model_validate(micro_tree(tmp_path / "data", tmp_path / "run"))
    found = []
    for rank in range(2):
        ranks = Ranks(rank, 2, rank, 2, CPU)
        saver = Saver(config, None, ranks, CheckpointStore(directory.path), directory, {}, (), {"w": [2, 64]})
        saver.snapshot.take([fragment(rank)])
        found.append(saver)
    return found


def test_ranks_commit_a_save_without_any_process_group(savers, directory):
    """So it cannot mix with, or wait for, the collectives of training."""
    assert not dist.is_initialized()
    main, other = savers
    main.task.start(lambda: main._write(10, manifest_of(10), time.perf_counter()))
    time.sleep(0.1)
    assert main.task.running, "rank 0 waits for the file of rank 1"
    assert main.store.tags() == []
    other.task.start(lambda: other._write(10, None, time.perf_counter()))
    for saver in (other, main):
        saver.task.wait()
    assert main.store.tags() == ["step-00000010"]
    assert main.store.faults("step-00000010") == []
    found = Fragment("w", 0, {"master": torch.empty(128)}, saved_here=True)
    read_fragments([found], main.store.path("step-00000010"), main.store.manifest("step-00000010"))
    assert found.values["master"].tolist() == [0.0] * 64 + [1.0] * 64


def test_a_peer_that_died_ends_the_save_and_not_the_tags_before_it(savers):
    main = savers[0]
    main.task.start(lambda: main._write(10, manifest_of(10), time.perf_counter()))
    main.task.abandoned.set()
    with pytest.raises(CheckpointError, match=r"1 of 2 files are missing \(rank-00001\.safetensors .*, the run ends"):
        main.task.wait()
    assert main.store.tags() == []


def test_what_is_written_is_what_was_copied_however_training_goes_on(tmp_path):
    live, snapshot = fragment(1), Snapshot()
    snapshot.take([live])
    live.values["master"].fill_(7.0)
    snapshot.write(tmp_path / "late")
    write_fragments([fragment(1)], tmp_path / "then")
    assert (tmp_path / "late").read_bytes() == (tmp_path / "then").read_bytes()


def test_a_ranks_file_is_flushed_whole_before_its_record_says_so(savers, monkeypatch):
    flushed = []

    def fsync(descriptor):
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    savers[1]._write(10, None, time.perf_counter())
    staging = savers[1].store.staging(10, 1)
    name = rank_file_name(1)
    assert flushed == [(name, (staging / name).stat().st_size)]
    assert (staging / f"{name}.record.json").exists()


def test_one_save_at_a_time_and_its_failure_is_told_once():
    task, go_on = BackgroundTask("save"), threading.Event()

    def fail():
        go_on.wait()
        raise CheckpointError("the disk is gone")

    task.start(fail)
    assert (task.busy, task.running, task.failed) == (True, True, False)
    with pytest.raises(AssertionError):
        task.start(fail)
    go_on.set()
    task.join(5)
    assert (task.busy, task.running, task.failed) == (True, False, True)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        task.wait()
    assert (task.busy, task.running, task.failed) == (False, False, False)


def test_records_that_do_not_come_or_cannot_be_read_are_named(tmp_path):
    leave_record(tmp_path, FileRecord(name="one", size_bytes=1, sha256=""))
    with pytest.raises(CheckpointError, match=r"1 of 2 files are missing \(two .*not written within 0\.1 s"):
        collect_records(tmp_path, ["one", "two"], 0.1, threading.Event())
    (tmp_path / "two.record.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"two\.record\.json: not readable: "):
        collect_records(tmp_path, ["one", "two"], 0.1, threading.Event())


def test_an_overtaken_start_commits_nothing(savers, directory):
    (directory.path / "generation").write_text("2\n")
    main, other = savers
    other._write(10, None, time.perf_counter())
    with pytest.raises(CheckpointError, match=r"a newer start of this run took over, so this one \(generation 1\)"):
        main._write(10, manifest_of(10), time.perf_counter())
    (directory.path / "generation").write_text("many")
    other._write(15, None, time.perf_counter())
    with pytest.raises(RunDirectoryError, match="generation: holds no number"):
        main._write(15, manifest_of(15), time.perf_counter())
    assert main.store.tags() == []


def test_a_checkpoint_of_another_model_is_refused_with_the_first_difference(directory, tmp_path):
    config = Config.model_validate(micro_tree(tmp_path / "data", tmp_path / "run"))
    store, ranks = CheckpointStore(directory.path), Ranks(0, 1, 0, 1, CPU)
    save(store, 10)
    for shapes, difference in (
        ({"w": [3, 64]}, r"w is \[2, 64\] in it and \[3, 64\] in"),
        ({"w": [2, 64], "a": [1]}, r"a is not there in it and \[1\] in"),
    ):
        saver = Saver(config, None, ranks, store, directory, {}, (), shapes)
        with pytest.raises(CheckpointError, match=f"step-00000010: is of another model: {difference} this run's"):
            saver.restore()
