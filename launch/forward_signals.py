"""Runs a launcher so that signals reach the ranks, and the run's exit status reaches the caller.

    python launch/forward_signals.py torchrun --nproc-per-node 2 -m vitscale train configs/demo-pretrain.yaml

Launchers do neither by themselves. SIGTERM to `deepspeed` ends it and leaves its ranks behind; SIGUSR2 does the
same to `torchrun`, whose exit status is 1 whatever the ranks' was. This wrapper keeps signals from the launcher,
hands them to all ranks at once, and takes the status from the copy of RUN/exit.json that rank 0 leaves in the
file named by VITSCALE_EXIT_FILE. On each of several nodes it serves the ranks of its own node.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import click
import psutil

from vitscale.errors import EXIT_FILE_VARIABLE, STOP_SIGNALS

# What a launcher gives to each of its ranks: torchrun and deepspeed, Open MPI, MPICH and Intel MPI.
RANK_MARKS = ({"RANK", "LOCAL_RANK"}, {"OMPI_COMM_WORLD_RANK"}, {"PMI_RANK", "MPI_LOCALRANKID"})


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(command: Sequence[str]) -> None:
    """Run COMMAND, a launcher with all its arguments; forward TERM, INT and USR2 to its ranks.

    \b
    Example:
      python launch/forward_signals.py deepspeed --num_gpus 8 --module vitscale train CONFIG.yaml
    """
    with tempfile.TemporaryDirectory(prefix="vitscale-exit-") as folder:
        exit_file = Path(folder) / "exit.json"
        sys.exit(run(command, exit_file))


def run(command: Sequence[str], exit_file: Path, patience_s: float = 0.0) -> int:
    """Run the launcher to its end; the status that rank 0 wrote to `exit_file`, else the launcher's own.

    Args:
        command: the launcher and its arguments.
        exit_file: not there yet.
        patience_s: how long to wait for that file where the launcher was signalled and left its ranks behind.

    Raises:
        click.ClickException: the launcher is not there.
    """
    # Ranks are known by these variables, so a launcher must not inherit them from a task or a notebook around it.
    inherited = {name: value for name, value in os.environ.items() if name not in set().union(*RANK_MARKS)}
    try:
        launcher = subprocess.Popen(
            command,
            env={**inherited, EXIT_FILE_VARIABLE: str(exit_file)},
            # Away from the terminal, whose Ctrl-C would reach the launcher and its ranks a second time.
            start_new_session=True,
        )
    except OSError as error:
        missing = click.ClickException(f"{command[0]}: {error.strerror}: name a launcher such as torchrun")
        missing.exit_code = 2
        raise missing from None

    asked_s: list[float] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        asked_s.append(time.monotonic())
        ranks = find_ranks(launcher.pid)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signum)
        if not ranks:  # nothing to save yet, or they are on other machines, where the launcher has to reach them
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGTERM)

    for signum in STOP_SIGNALS:
        signal.signal(signum, forward)
    launcher.wait()
    while (status := _written_status(exit_file)) is None and asked_s and time.monotonic() < asked_s[0] + patience_s:
        time.sleep(0.2)
    if status is None:
        status = launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode
    return status


def find_ranks(launcher: int) -> list[psutil.Process]:
    """Training processes below the launcher: the outermost ones that have a rank's variables.

    Their loader workers inherit them, so what lies below a rank is none.
    """
    try:
        below = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    marked = {process.pid: process for process in below if _is_marked(process)}
    return [process for process in marked.values() if _parent(process) not in marked]


def _is_marked(process: psutil.Process) -> bool:
    try:
        names = process.environ().keys()
    except psutil.Error:  # it ended meanwhile
        return False
    return any(names >= mark for mark in RANK_MARKS)


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0


def _written_status(exit_file: Path) -> int | None:
    try:
        return int(json.loads(exit_file.read_text(encoding="utf-8"))["status"])
    except (FileNotFoundError, ValueError):  # not yet, or not yet whole
        return None


if __name__ == "__main__":
    main()
