"""launch/forward_signals.py: with real launchers and ranks that write down every signal they get."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from forward_signals import find_ranks
from free_port import free_port

WRAPPER = Path(__file__).parents[3] / "launch" / "forward_signals.py"
LAUNCHERS = {
    "torchrun": ["--nproc-per-node", "2", "--master-port", "0"],
    "deepspeed": ["--num_gpus", "2", "--master_port", str(free_port()), "--no_local_rank"],
}

# A rank with a worker that inherits its environment, as vitscale's have. Told to stop, it ends with 75, which
# rank 0 also writes down.
RANK = """
import json, os, signal, sys, time
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
got = []
names = {signal.SIGTERM: "TERM", signal.SIGINT: "INT", signal.SIGUSR2: "USR2"}

def note(signum, frame):
    got.append(signum)
    draft = folder / f"draft{rank}"
    draft.write_text(json.dumps([names[signum], time.time()]))
    draft.rename(folder / f"got{rank}.{len(got)}")

def work():
    for signum in names:
        signal.signal(signum, lambda *_: (folder / f"worker{rank}").touch())
    (folder / f"ready{rank}").touch()
    time.sleep(60)

for signum in names:
    signal.signal(signum, note)
worker = os.fork()
if worker == 0:
    work()
while not (folder / "stop").exists():
    time.sleep(0.01)
os.kill(worker, signal.SIGKILL)
if rank == "0" and sys.argv[2] == "write":
    Path(os.environ["VITSCALE_EXIT_FILE"]).write_text(json.dumps({"status": 75, "reason": "asked to stop"}))
sys.exit(75)
"""


def await_files(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not appear"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def inside_another_rank(monkeypatch):
    """As in a Slurm task or a notebook that trained before: the launcher itself must not pass for a rank."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")


@contextlib.contextmanager
def running(launcher: str, folder: Path, word: str) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks under the wrapper; told to stop at the end of the block."""
    script = folder / "rank.py"
    script.write_text(RANK)
    command = [Path(sys.executable).with_name(launcher), *LAUNCHERS[launcher], script, folder, word]
    process = subprocess.Popen([sys.executable, WRAPPER, *command], stderr=subprocess.DEVNULL)
    try:
        await_files(folder / "ready0", folder / "ready1")
        yield process
    finally:
        (folder / "stop").touch()
        process.wait(timeout=60)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_rank_gets_each_signal_once_and_the_status_comes_back(launcher, tmp_path):
    with running(launcher, tmp_path, "write") as process:
        for count, signum in enumerate((signal.SIGUSR2, signal.SIGINT, signal.SIGTERM), start=1):
            process.send_signal(signum)
            await_files(*(tmp_path / f"got{rank}.{count}" for rank in (0, 1)))
        time.sleep(0.2)  # a second copy of a signal would come about now
        logs = [sorted(tmp_path.glob(f"got{rank}.*")) for rank in (0, 1)]
    first, second = ([json.loads(log.read_text()) for log in rank_logs] for rank_logs in logs)
    assert [name for name, _ in first] == [name for name, _ in second] == ["USR2", "INT", "TERM"]
    assert max(abs(a - b) for (_, a), (_, b) in zip(first, second, strict=True)) < 0.2
    assert not list(tmp_path.glob("worker*"))
    assert process.returncode == 75


def test_without_an_exit_file_the_launchers_status_counts(tmp_path):
    with running("torchrun", tmp_path, "keep silent") as process:
        pass
    assert process.returncode == 1  # what torchrun makes of 75


@pytest.mark.parametrize(("command", "status"), [("exit 7", 7), ("kill -KILL $$", 137)])
def test_status_of_a_launcher_without_ranks(command, status):
    assert subprocess.run([sys.executable, WRAPPER, "bash", "-c", command], timeout=20).returncode == status


def test_signal_before_there_are_ranks_ends_the_launcher(tmp_path):
    ready = tmp_path / "ready"
    launcher = ["bash", "-c", f"touch {ready}; sleep 60 & wait"]
    process = subprocess.Popen([sys.executable, WRAPPER, *launcher])
    await_files(ready)
    time.sleep(0.1)  # the wrapper installs its handlers just after it starts the launcher
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=20) == 143


def test_ranks_of_mpi_are_known_too():
    ranks = ["OMPI_COMM_WORLD_RANK=0 sleep 60", "PMI_RANK=1 MPI_LOCALRANKID=1 sleep 60", "PMI_RANK=2 sleep 60"]
    launcher = subprocess.Popen(["bash", "-c", f"{' & '.join(ranks)} & wait"], env={"PATH": os.environ["PATH"]})
    try:
        below = psutil.Process(launcher.pid)
        while [child.name() for child in below.children()] != ["sleep"] * 3:
            time.sleep(0.02)
        # Slurm's own PMI sets PMI_RANK for whatever srun starts.
        assert sorted(rank.pid for rank in find_ranks(launcher.pid)) == sorted(p.pid for p in below.children()[:2])
    finally:
        for child in below.children():
            child.kill()
        launcher.wait(timeout=20)


def test_missing_launcher_is_one_clear_line():
    done = subprocess.run([sys.executable, WRAPPER, "no-such-launcher"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "Error: no-such-launcher: No such file or directory: name a launcher such as torchrun"
    ]
