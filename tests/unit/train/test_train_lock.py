"""Who holds a run directory: with other processes that really hold it, and with file systems that have no flock."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import socket
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from vitscale.errors import ExitStatus, RunDirectoryError
from vitscale.train import lock as lock_module
from vitscale.train.lock import Owner, ProcessMark, RunLock

BEAT_S = 0.05


def no_flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture
def short(monkeypatch):
    """Waits that a test can afford, all of them well above a beat."""
    for name, value in (("LEASE_S", 1.0), ("SETTLE_S", 0.1), ("REQUEUE_WAIT_S", 1.5), ("_LOOK_S", 0.05)):
        monkeypatch.setattr(lock_module, name, value)


def hold(pipe, path, flock, kernel, job, restart, beats):
    """Another process: holds the lock and shows it until it is told to let go."""
    os.environ.update({"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restart} if job else {})
    lock_module.SETTLE_S = 0.1
    with contextlib.ExitStack() as patches:
        if not flock:
            patches.enter_context(mock.patch.object(fcntl, "flock", no_flock))
        if kernel:
            patches.enter_context(mock.patch.object(lock_module, "_kernel", return_value=kernel))
        lock = RunLock(path)
        lock.take()
        lock.sign(3)
        pipe.send("held")
        while not pipe.poll(BEAT_S):
            if beats:
                lock.beat()
        lock.release()


@contextlib.contextmanager
def held(path, flock=True, kernel=None, job=None, restart="0", beats=True):
    context = multiprocessing.get_context("fork")  # it only touches files
    pipe, other = context.Pipe()
    process = context.Process(target=hold, args=(other, path, flock, kernel, job, restart, beats))
    process.start()
    other.close()
    try:
        assert pipe.recv() == "held"
        yield process, pipe
    finally:
        process.kill()
        process.join()
        pipe.close()


@pytest.mark.parametrize("flock", [True, False])
@pytest.mark.fault(14)
def test_a_second_owner_is_refused_and_told_who_the_first_is(tmp_path, monkeypatch, short, flock):
    if not flock:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    path = tmp_path / "lock"
    with held(path, flock, job="4711") as (process, pipe):
        with pytest.raises(RunDirectoryError) as caught:
            RunLock(path).take()
        text = str(caught.value)
        assert text.startswith(f"{tmp_path}: held by pid {process.pid} on {socket.gethostname()} (since ")
        assert "Slurm job 4711, generation 3)" in text
        assert text.endswith("wait for it, stop it, or choose another run.dir")
        assert caught.value.status == ExitStatus.USER_ERROR
        pipe.send("let go")
        process.join()
        lock = RunLock(path)
        lock.take()
        assert lock.held
        lock.release()
        assert not path.read_text()


@pytest.mark.parametrize("flock", [True, False])
@pytest.mark.fault(13)
def test_the_lock_of_a_killed_owner_is_free(tmp_path, monkeypatch, short, flock):
    if not flock:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    with held(tmp_path / "lock", flock) as (process, _):
        process.kill()
        process.join()
    lock = RunLock(tmp_path / "lock")
    lock.take()
    assert json.loads((tmp_path / "lock").read_text())["mark"]["pid"] == os.getpid()


def test_a_zombie_is_dead_and_a_number_given_again_is_another_process():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    own = ProcessMark.own()
    assert own.is_local()
    assert own.is_alive()
    assert not ProcessMark(own.kernel, pid, lock_module._started(os.getppid())).is_alive()
    os.waitpid(pid, 0)
    assert not ProcessMark(own.kernel, own.pid, own.started - 1).is_alive()
    assert not ProcessMark("another boot or container", own.pid, own.started).is_local()
    assert not ProcessMark("", own.pid, own.started).is_local()


@pytest.mark.fault(13)
def test_without_flock_a_foreign_owner_lives_as_long_as_it_beats(tmp_path, monkeypatch, short):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    beating = held(tmp_path / "beating", flock=False, kernel="another node")
    with beating, pytest.raises(RunDirectoryError, match="held by pid"):
        RunLock(tmp_path / "beating").take()
    path = tmp_path / "silent"
    with held(path, flock=False, kernel="a third node", beats=False) as (process, pipe):
        lock = RunLock(path)
        lock.take()
        assert lock_module.read_owner(lock._path).mark.pid == os.getpid()
        pipe.send("let go")
        process.join()
        # The old owner was only slow: what it lets go of now is not the new one's.
        assert lock_module.read_owner(lock._path).mark.pid == os.getpid()
        before_ns = path.stat().st_mtime_ns
        time.sleep(0.02)
        lock.beat()
        assert path.stat().st_mtime_ns > before_ns
        lock.release()
        assert not path.read_text()


def test_without_flock_what_nobody_understands_is_watched_too(tmp_path, monkeypatch, short):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    (tmp_path / "lock").write_text("pid 1 on some host\n")
    started_s = time.monotonic()
    RunLock(tmp_path / "lock").take()
    assert time.monotonic() - started_s >= lock_module.LEASE_S


def test_of_two_that_sign_a_free_lock_without_flock_the_last_has_it(tmp_path, monkeypatch, short):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    other = Owner(ProcessMark("another node", 1, 1), "node2", "now", None, None)
    path = tmp_path / "lock"

    def sign_after_me(_):
        path.write_text(json.dumps(lock_module.asdict(other)))

    monkeypatch.setattr(lock_module.time, "sleep", sign_after_me)
    with pytest.raises(RunDirectoryError, match="held by pid 1 on node2"):
        RunLock(path).take()


def test_one_that_is_about_to_sign_or_has_just_let_go_is_looked_at_again(tmp_path, monkeypatch, short):
    path = tmp_path / "lock"
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunDirectoryError, match="held by an unknown process"):
            RunLock(path).take()
        monkeypatch.setattr(lock_module, "SETTLE_S", 5.0)
        threading.Timer(0.1, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        lock = RunLock(path)
        lock.take()
        lock.release()


def test_a_lock_that_somebody_removed_is_let_go_of(tmp_path):
    lock = RunLock(tmp_path / "lock")
    lock.take()
    (tmp_path / "lock").unlink()
    lock.release()
    assert not lock.held
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("flock", [True, False])
def test_a_requeued_job_waits_for_its_earlier_start(tmp_path, monkeypatch, short, flock):
    if not flock:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    path = tmp_path / "lock"
    with held(path, flock, job="4711") as (process, pipe):
        with pytest.raises(RunDirectoryError) as caught:
            RunLock(path).take()
        assert caught.value.status == ExitStatus.TRANSIENT, "Slurm may try once more"
        pipe.send("let go")
        RunLock(path).take()
        process.join()


def test_a_second_run_within_one_job_does_not_wait(tmp_path, monkeypatch, short):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with held(tmp_path / "lock", job="4711", restart="1"):
        with pytest.raises(RunDirectoryError) as caught:
            RunLock(tmp_path / "lock").take()
        assert caught.value.status == ExitStatus.USER_ERROR


def test_a_lock_that_cannot_be_is_named(tmp_path, monkeypatch):
    (tmp_path / "lock").mkdir()
    with pytest.raises(RunDirectoryError, match=r"lock: cannot be locked: Is a directory: choose another run\.dir"):
        RunLock(tmp_path / "lock").take()

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(RunDirectoryError, match="cannot be locked: Input/output error") as caught:
        RunLock(tmp_path / "other").take()
    assert caught.value.status == ExitStatus.TRANSIENT


def test_where_the_system_tells_nothing_of_its_processes_nobody_is_local(monkeypatch):
    class NoProc(type(Path())):
        def read_text(self, *_, **__):
            raise FileNotFoundError

    monkeypatch.setattr(lock_module, "Path", NoProc)
    assert ProcessMark.own() == ProcessMark("", os.getpid(), 0)
