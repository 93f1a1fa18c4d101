"""Memory of a run on a CPU: what the C library does with blocks that are freed, and what DeepSpeed shares by name."""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where POSIX shared memory has its names)


def keep_freed_memory() -> bool:
    """Have glibc reuse freed blocks of any size instead of handing them back to the kernel; whether it can.

    It maps blocks above 32 MB anew at each allocation, and the kernel clears every page of them. ZeRO makes flat copies
    of gradients in each step: for ViT-S/16 108,000 page faults, a quarter of the step's CPU time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(key, _NEVER) for key in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))


def unlink_collective_buffer(environ: Mapping[str, str], rank: int, folder: Path = _SHARED_MEMORY) -> None:
    """Take the name of this rank's DeepSpeed buffer away once all ranks have mapped it; the memory stays theirs.

    DeepSpeed's collective for ranks of one machine leaves 69 MB a rank in /dev/shm when a rank is killed, and a later
    run at the same port would take that for its own. What has no name goes with its processes.
    """
    address, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    (folder / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)
