"""Requests to stop: signals, and a launcher that is gone.

SIGTERM, SIGINT and SIGUSR2 all mean "save at the step boundary and exit with 75". Handlers only set a flag,
because a save is collective and a signal may reach one rank alone: the ranks agree at each boundary.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import psutil

from vitscale.errors import STOP_SIGNALS

# Words in the command line of a process that starts ranks and should outlive them.
LAUNCHER_MARKS = ("torchrun", "torch.distributed.run", "torch/distributed/run", "deepspeed", "forward_signals")


class StopRequest:
    """Whether this rank was asked to stop, and why."""

    def __init__(self) -> None:
        """Nothing is asked yet, and no handler installed."""
        self.reason: str | None = None
        self._launchers: list[psutil.Process] = []

    def install(self) -> None:
        """Take over the stop signals and remember the launchers this process hangs on. Main thread only."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        self._launchers = _launchers_above(psutil.Process())

    def poll(self) -> bool:
        """Whether to stop. Call at step boundaries: it also looks whether the launcher is still there."""
        if self.reason is None:
            gone = next((process for process in self._launchers if not _alive(process)), None)
            if gone is not None:
                self.reason = f"the launcher (pid {gone.pid}) is gone"
        return self.reason is not None

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """While a save runs, further signals are ignored."""
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or f"received {signal.Signals(number).name}"
        if number == signal.SIGINT:
            # The kernel itself ends the process at the second Ctrl-C, even inside a hung collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _launchers_above(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for ancestor in process.parents():
        try:
            command = " ".join(ancestor.cmdline()[:4])
        except psutil.Error:
            break
        if not any(mark in command for mark in LAUNCHER_MARKS):
            break
        found.append(ancestor)
    return found


def _alive(process: psutil.Process) -> bool:
    try:
        # A killed launcher stays a zombie until its own parent has looked at it.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
