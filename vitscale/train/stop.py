"""Requests to stop: signals, and a launcher that is gone.

SIGTERM, SIGINT and SIGUSR2 all mean "save at the step boundary and exit with 75". They only set a flag,
because a save is collective and a signal may reach one rank alone: the ranks agree at each boundary.

Python runs a handler in the main thread and between two of its own instructions: never, while that thread hangs in a
collective, and late, while it builds an engine. So the signals' numbers also go through a pipe to a listening thread.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import psutil

from vitscale.errors import STOP_SIGNALS

# Words in the command line of a process that starts ranks and should outlive them.
LAUNCHER_MARKS = (
    *("torchrun", "torch.distributed.run", "torch/distributed/run", "deepspeed", "forward_signals"),
    *("mpirun", "mpiexec", "orted", "hydra_pmi_proxy"),
    "@notty",  # sshd, for a session that runs a command: it ends with the connection, what it started does not
)


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
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # A forked child would write its own signals into the same pipe.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
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
        """While a save runs, further signals are ignored; the listening thread hears nothing of them either."""
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        if number == signal.SIGINT:
            # From here on the kernel itself ends the process at the second Ctrl-C, whoever holds Python's lock.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _listen(self, reader: int) -> None:
        interrupts = 0
        while True:
            for number in os.read(reader, 512):
                if number in STOP_SIGNALS:
                    self._note(number)
                interrupts += number == signal.SIGINT
            if interrupts > 1:  # the handler of the first has not run yet: the main thread hangs
                os._exit(128 + signal.SIGINT)  # as shells and srun call a death by SIGINT

    def _note(self, number: int) -> None:
        self.reason = self.reason or f"received {signal.Signals(number).name}"


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
