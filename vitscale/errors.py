"""How a run ends: the errors a user can meet, the exit statuses, and the signals that ask for an end.

Every `VitscaleError` is written to be read by the person who started the command: one line that says what
is wrong, where (file, key, flag, shard or tag), and the mend. The command line prints that line, without a
traceback, and ends with the error's `status`.
"""

import errno
import signal
from enum import IntEnum
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""Signals that ask a run to save at the step boundary and to exit with RUN_AGAIN."""

EXIT_FILE_VARIABLE = "VITSCALE_EXIT_FILE"
"""Environment variable: a second place to write exit.json to, for a launcher that does not know the run."""


PASSING_FAULTS = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ESHUTDOWN,
        errno.ENOTCONN,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EREMOTEIO,
    }
)
"""What a network file system says while its server is away or has thrown a client out (Lustre: ESHUTDOWN, ENOTCONN),
and a disk of a fault that another node does not have."""


class ExitStatus(IntEnum):
    """Exit statuses of every vitscale command. Only `RUN_AGAIN` and `TRANSIENT` are worth another try."""

    FINISHED = 0
    TRANSIENT = 1
    USER_ERROR = 2
    DIVERGED = 3
    RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: checkpointed on request


class VitscaleError(Exception):
    """An error its reader can mend. The message is one line: what, where, the mend."""

    status = ExitStatus.USER_ERROR
    told = False
    """Whether another rank tells the user already, because all of them raise the same error."""

    @classmethod
    def of_system(cls, fault: OSError, message: str) -> Self:
        """The error for a fault of the system, worth another try where that is one of `PASSING_FAULTS`."""
        error = cls(message)
        if fault.errno in PASSING_FAULTS:
            error.status = ExitStatus.TRANSIENT
        return error


class ConfigError(VitscaleError):
    """A config file, an override or a combination of settings that cannot be used."""


class ShardError(VitscaleError):
    """Shards, an index or a dataset.json that are missing, damaged or do not belong together."""


class CheckpointError(VitscaleError):
    """A checkpoint or an exported model that is missing, damaged or does not fit."""


class RunDirectoryError(VitscaleError):
    """A run directory that another run holds, or that belongs to another config."""


class LaunchError(VitscaleError):
    """A launcher, a cluster or an environment variable that the run cannot work with."""


class DivergenceError(VitscaleError):
    """Training that can no longer be trusted: a non-finite loss or gradient."""

    status = ExitStatus.DIVERGED
