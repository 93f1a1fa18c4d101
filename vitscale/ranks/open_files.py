"""How many files and sockets a rank may have open at a time."""

import resource

from vitscale.errors import LaunchError

OWN_FILES = 1024
"""Shards, logs, what loader workers hand over, libraries: the usual limit, which is enough for these."""


def allow_open_files(world_size: int) -> None:
    """Let this process have a socket for each rank beside its own files, as rank 0 has, which all others ask.

    A login shell's limit is mostly 1,024, and Slurm hands it on to every task.

    Raises:
        LaunchError: the system allows fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = world_size + OWN_FILES
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LaunchError(
            f"{world_size} ranks need {needed} open files in rank 0, the system allows {hard}: raise the hard limit "
            "(LimitNOFILE of slurmd's service, nofile in /etc/security/limits.conf)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
