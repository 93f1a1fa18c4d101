"""What every task of a job runs. Its module is found in the job's own copy of the code."""

import signal

from vitscale.cli.main import main as vitscale


def train_in_task(arguments: list[str]) -> None:
    """Run `vitscale train` in this very process, which ends with its status; submitit calls this."""
    # submitit's own handlers act on one rank alone. The trainer installs its handlers when it is ready; a signal
    # before that finds nothing to save, and Slurm ends the task in due course.
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    vitscale(["train", *arguments])
