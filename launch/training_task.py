"""What every task of a job runs. Its module is found in the job's own copy of the code."""

import os
import signal
import threading
from types import FrameType

from vitscale.cli.main import main as vitscale

AGAIN_S = 0.5


def train_in_task(arguments: list[str]) -> None:
    """Run `vitscale train` in this very process, which ends with its status; submitit calls this."""
    # submitit's own handlers act on one rank alone.
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, _send_again)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    vitscale(["train", *arguments])


def _send_again(signum: int, frame: FrameType | None) -> None:
    """Keep a signal for the trainer's own handler, which is installed some seconds later: Slurm sends it only once."""
    timer = threading.Timer(AGAIN_S, os.kill, (os.getpid(), signum))
    timer.daemon = True
    timer.start()
