"""Runs of two ranks of which one stops, hangs or is killed: the other says so and ends, and the run goes on later.

And starts that are refused: after too many that came to nothing, and from step 0 where something was saved once.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
from distributed_runner import run_distributed_test
from forked_command import vitscale
from micro_run import REPOSITORY
from test_train_launchers import ENDLESS, ENVIRONMENT, TORCHRUN, ranks_below, steps, wait_for

from vitscale.cli.main import _run
from vitscale.config import load_config
from vitscale.errors import ExitStatus
from vitscale.train import loop
from vitscale.train.build import build_engine
from vitscale.train.feed import Feed
from vitscale.train.run import run_training

SHORT = "watchdog={data_s: 8, step_s: 8, beat_s: 0.5, answer_s: 3}"


def _rank(process: psutil.Process) -> int:
    return int(process.environ()["RANK"])


@pytest.mark.fault(1)
def test_a_rank_that_is_killed_ends_the_run_and_a_start_goes_on(micro_config, tmp_path):
    run_dir = tmp_path / "run"
    command = [*TORCHRUN, "train", str(micro_config), *ENDLESS, "checkpoint.every_steps=5", SHORT]
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=REPOSITORY, start_new_session=True) as process:
        try:
            wait_for(lambda: len(steps(run_dir)) >= 7)
            ranks = sorted(ranks_below(psutil.Process(process.pid)), key=_rank)
            ranks[1].kill()
            started_s = time.monotonic()
            _, alive = psutil.wait_procs(ranks, timeout=60)
            assert not alive, "a rank hangs"
            assert process.wait(60) == 1
            assert time.monotonic() - started_s < 60
        finally:
            for leftover in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                leftover.kill()
            if process.poll() is None:
                process.kill()
    assert not list((run_dir / "watchdog").glob("stacks*")), "a lost connection needs no watchdog"
    last = json.loads((run_dir / "starts.json").read_text())[-1]["saved_step"]
    assert last >= 5
    again = ["train", micro_config, f"schedule.length={last + 2}", "checkpoint.every_steps=5", SHORT]
    done = vitscale(*again, "--allow-change", "schedule.length")
    assert done.returncode == 0, done.stderr
    assert steps(run_dir)[-2:] == [last + 1, last + 2]
    failed = json.loads((run_dir / "starts.json").read_text())[0]["end"]
    assert failed["status"] in (ExitStatus.TRANSIENT, None)  # torchrun may kill rank 0 before it can tell


def _hang_in_data(rank, world_size, path, pids, number):
    """Rank 1 hangs in its fifth step, or sends itself a signal there."""
    Path(pids, str(rank)).write_text(str(os.getpid()))
    take = Feed.take
    taken = []

    def hang(feed):
        taken.append(rank)
        if rank == 1 and len(taken) == 9:
            if number is not None:
                os.kill(os.getpid(), number)
            threading.Event().wait()
        return take(feed)

    Feed.take = hang
    return int(run_training(load_config(path, [SHORT])))


def hung(path, folder, number=None):
    """How the run of two ranks ended that hangs so, what its end and its ranks' stacks say, and who each rank was."""
    with pytest.raises(pytest.fail.Exception) as failed:
        run_distributed_test(_hang_in_data, 2, path, folder, number, init=False)
    end = json.loads((folder / "run" / "exit.json").read_text())
    assert (end["status"], end["step"], end["generation"]) == (ExitStatus.TRANSIENT, 4, 1)
    files = (folder / "run" / "watchdog").glob("stacks*")
    host = os.uname().nodename
    ranks = [f"rank {rank} ({host}, pid {(folder / str(rank)).read_text()}, " for rank in (0, 1)]
    return str(failed.value), end["reason"], {path.name: path.read_text() for path in files}, ranks


@pytest.mark.fault(23)
def test_a_rank_that_is_stopped_is_named_as_the_one_that_does_not_answer(micro_config, tmp_path):
    ending, reason, stacks, ranks = hung(micro_config, tmp_path, signal.SIGSTOP)
    assert "---- rank 0 ----\nended without a result, exit code 1\n" in ending, "it ended hard"
    assert ending.endswith("---- rank 1 ----\nended without a result, exit code -9\n"), "rank 0 killed it"
    assert f"no answer from {ranks[1]}last seen in section " in reason
    assert f"in section step {ranks[0]}for " in reason
    assert list(stacks) == ["stacks-1-rank-00000.txt"]
    assert "in train_step" in stacks["stacks-1-rank-00000.txt"]


@pytest.mark.fault(23)
def test_a_rank_that_hangs_in_its_data_is_named_with_its_section(micro_config, tmp_path):
    ending, reason, stacks, ranks = hung(micro_config, tmp_path)
    assert ending.count("ended without a result, exit code 1") == 2, "both ended hard"
    assert f"past its limit of 8 s: in section data {ranks[1]}for " in reason
    assert f"; in section step {ranks[0]}for " in reason
    assert "no answer" not in reason
    first, second = (stacks[f"stacks-1-rank-0000{rank}.txt"] for rank in (0, 1))
    assert "in hang" in second
    assert "in section data for " in second
    assert "in hang" not in first
    assert "in section step for " in first


def _command(rank, world_size, arguments):
    """Status of the command, what it said, and whether it built an engine."""
    built = []
    loop.build_engine = lambda *args: built.append(rank) or build_engine(*args)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = _run(["train", *arguments])
    return int(status), said.getvalue(), bool(built)


def command(*arguments):
    return run_distributed_test(_command, 1, [str(argument) for argument in arguments], init=False)[0]


@pytest.mark.fault(9, 20)
def test_a_start_that_should_not_be_is_refused_until_told_otherwise(micro_config, tmp_path):
    run_dir = tmp_path / "run"
    short = [micro_config, "schedule.length=3"]
    assert command(*short)[::2] == (0, True)
    status, said, built = command(*short, "--fresh")
    assert (status, built) == (2, False)
    assert "holds step-00000003: --fresh is for a run directory without checkpoints" in said
    (run_dir / "checkpoints").rename(tmp_path / "lost")
    status, said, built = command(*short)
    assert (status, built) == (2, False)
    assert said.startswith(f"error: {run_dir}: step 3 was saved here, and {run_dir}/checkpoints holds no checkpoint")
    assert said.count("\n") == 1
    assert command(*short, "--fresh")[::2] == (0, True)
    assert steps(run_dir) == [1, 2, 3]
    assert (run_dir / "checkpoints" / "step-00000003" / "manifest.json").exists()

    record = run_dir / "starts.json"
    end = {"reason": "RuntimeError: broken", "step": 4, "status": 1}
    last = json.loads(record.read_text())[-1]
    failed = [{**last, "generation": 9 + i, "found_step": 3, "saved_step": None, "fresh": False} for i in range(3)]
    record.write_text(json.dumps([{**last, "end": end}, *({**start, "end": end} for start in failed)]))
    status, said, built = command(*short)
    assert (status, built) == (2, False)
    assert "no new checkpoint since step 3 in 3 starts that failed one after the other (start 9 at step 4: " in said
    assert f"remove {record} to try again" in said
    assert said.count("\n") == 1
    record.unlink()
    assert command(*short)[0] == 0
