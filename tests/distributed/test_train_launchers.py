"""The literal commands of the manual, and what the ranks do when their launcher is signalled or killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from free_port import free_port
from micro_run import REPOSITORY

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--standalone", "-m", "vitscale"]
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--module", "vitscale"]
ALONE = [sys.executable, "-m", "vitscale"]
FORWARDED = [sys.executable, "launch/forward_signals.py", *TORCHRUN]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
ENDLESS = ["schedule.length=1000000", "checkpoint.every_steps=1000000"]


def steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record["step"] for record in map(json.loads, lines) if "train/loss" in record]


def wait_for(condition, limit_s: float = 200):
    deadline_s = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.05)
    return value


def ranks_below(launcher: psutil.Process) -> list[psutil.Process]:
    """The training processes: those whose command is vitscale's and that no other such process started."""
    below = launcher.children(recursive=True)
    return [p for p in below if "vitscale" in p.cmdline() and "RANK" in p.environ() and not _launches(p)]


def _launches(process: psutil.Process) -> bool:
    return any(mark in " ".join(process.cmdline()) for mark in ("torchrun", "launcher"))


@pytest.mark.parametrize(
    ("launcher", "world_size"), [(TORCHRUN, 2), (DEEPSPEED, 2), (ALONE, 1)], ids=["torchrun", "deepspeed", "alone"]
)
def test_the_same_arguments_train_under_every_launcher(micro_config, tmp_path, launcher, world_size):
    subprocess.run([*launcher, "train", str(micro_config)], env=ENVIRONMENT, cwd=REPOSITORY, check=True, timeout=120)
    run_dir = tmp_path / "run"
    assert steps(run_dir) == list(range(1, 13))
    assert json.loads((run_dir / "exit.json").read_text())["reason"] == "finished"
    assert len(list((run_dir / "samples").iterdir())) == world_size
    assert json.loads((run_dir / "environment.json").read_text())["versions"]["deepspeed"]


# What the ranks do is the same whatever computes the steps, and this starts sooner.
QUICK = "engine={kind: torch, precision: fp32}"
CASES = {
    "torchrun-TERM": (TORCHRUN, signal.SIGTERM, "received SIGTERM", None),
    "torchrun-KILL": (TORCHRUN, signal.SIGKILL, "is gone", None),
    "torchrun-USR2": (TORCHRUN, signal.SIGUSR2, "is gone", None),
    "deepspeed-TERM": (DEEPSPEED, signal.SIGTERM, "is gone", None),
    "launch.py-KILL": (DEEPSPEED, signal.SIGKILL, "is gone", None),
    "forwarded-USR2": (FORWARDED, signal.SIGUSR2, "received SIGUSR2", 75),
    "forwarded-TERM": (FORWARDED, signal.SIGTERM, "received SIGTERM", 75),
}


def _target(case: str, pid: int) -> psutil.Process:
    """The process to signal: the command itself, or the launch.py that `deepspeed` started for this node."""
    command = psutil.Process(pid)
    if not case.startswith("launch.py"):
        return command
    return next(p for p in command.children(recursive=True) if "deepspeed.launcher.launch" in p.cmdline())


# launch.py-KILL shows ranks whose launcher was killed, torchrun-USR2 those whose torchrun is gone, and
# test_launch_forward_signals that the wrapper hands each signal on.
SLOW = {"torchrun-KILL", "torchrun-USR2", "deepspeed-TERM", "forwarded-TERM"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
@pytest.mark.fault(16, 17)
def test_a_stopped_or_lost_launcher_leaves_a_checkpoint_and_no_process(micro_config, tmp_path, case):
    launcher, number, reason, status = CASES[case]
    run_dir = tmp_path / "run"
    command = [*launcher, "train", str(micro_config), *ENDLESS, QUICK]
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=REPOSITORY, start_new_session=True) as process:
        try:
            wait_for(lambda: len(steps(run_dir)) >= 3)
            ranks = ranks_below(psutil.Process(process.pid))
            assert len(ranks) == 2
            _target(case, process.pid).send_signal(number)
            end = json.loads(wait_for(lambda: (run_dir / "exit.json").exists() and (run_dir / "exit.json").read_text()))
            _, alive = psutil.wait_procs(ranks, timeout=30)
            assert not alive
            assert status is None or process.wait(30) == status
        finally:
            for leftover in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                leftover.kill()
            if process.poll() is None:
                process.kill()
    assert end["status"] == 75
    assert reason in end["reason"]
    assert (run_dir / "checkpoints" / f"step-{end['step']:08d}" / "manifest.json").exists()
    assert steps(run_dir) == list(range(1, end["step"] + 1))
