"""How many files and sockets a rank may have open at a time."""

import resource

from vitscale.errors import LaunchError

OWN_FILES, FEWEST_OWN_FILES = 1024, 256
"""Shards, logs, what loader workers hand over, libraries: as many as a login shell allows, and what a rank needs."""


def allow_open_files(rank: int, world_size: int) -> None:
    """Let a rank have a socket for each rank beside its own files, as rank 0 has, which all others ask.

    A login shell's limit is mostly 1,024, and Slurm hands it on to every task.

    Raises:
        LaunchError: the system allows rank 0 too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    most = hard if hard != resource.RLIM_INFINITY else world_size + OWN_FILES
    if rank == 0 and most < world_size + FEWEST_OWN_FILES:
        raise LaunchError(
            f"{world_size} ranks need {world_size + FEWEST_OWN_FILES} open files in rank 0, the system allows {hard}: "
            "raise the hard limit (LimitNOFILE of slurmd's service, nofile in /etc/security/limits.conf)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(most, world_size + OWN_FILES)), hard))
