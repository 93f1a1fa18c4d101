"""A node's disks and its clock: can the run write, is there room, does the node agree with the others on the time."""

import math
import os
import shutil
import socket
import time
from pathlib import Path

from vitscale.config import CheckpointSection
from vitscale.train.build import Blueprint
from vitscale.train.preflight.reports import Finding, Standing

CLOCK_TOLERANCE_S = 30.0
SHM = Path("/dev/shm")  # noqa: S108 (where POSIX shared memory has its names)
COLLECTIVE_SHM_BYTES = 70_000_000
"""What collectives within a node may take there for each rank, by DeepSpeed on CPUs or by NCCL."""
_CHANNELS = 3
_PARTS_UNDER_WAY = 2
"""Micro-batches in the workers' hands, beyond those that wait."""


def run_directory(run_dir: Path) -> Finding:
    """Whether a file can be made, flushed and removed in the run directory; raises OSError."""
    _touch(run_dir, "room")
    return Finding("run directory", Standing.SOUND, str(run_dir))


def clock(run_dir: Path) -> Finding:
    """How far the node's clock is from the file system's, where the server stamps files (NFS); raises OSError."""
    before_s, stamped_s, after_s = time.time(), _touch(run_dir, "clock"), time.time()
    return clock_finding(socket.gethostname(), (before_s + after_s) / 2 - stamped_s)


def clock_finding(host: str, ahead_s: float) -> Finding:
    """What a difference between the two clocks means: nothing for the run, but times in its records are not to be
    trusted, and munge and Kerberos refuse a node whose clock is minutes off."""
    if abs(ahead_s) <= CLOCK_TOLERANCE_S:
        return Finding("clock", Standing.SOUND, f"{ahead_s:+.1f} s")
    return Finding(
        "clock",
        Standing.WARNING,
        f"{host}: its clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the file system's: "
        "set it by NTP",
    )


def free_bytes(folder: Path) -> int:
    """What this user may still write on the disk of a folder, quotas aside; raises OSError."""
    return shutil.disk_usage(folder).free


def checkpoint_space(
    run_dir: Path, room_bytes: int, tags: int, tag_bytes: int, keep: CheckpointSection, total_steps: int
) -> Finding:
    """Whether there is room for the checkpoints that are kept, and for the one that is written before an old one goes.

    Args:
        run_dir: where they lie.
        room_bytes: what is free there.
        tags: checkpoints that are there.
        tag_bytes: of one checkpoint.
        keep: what is kept.
        total_steps: length of the run.
    """
    passing = keep.keep_last + (keep.keep_best is not None)
    # Of the tags that are there so many go again and make room; the others stay for ever.
    going = min(tags, passing)
    needed = passing + 1
    for_ever = total_steps // keep.keep_every_steps if keep.keep_every_steps is not None else 0
    for_ever = max(for_ever - (tags - going), 0)
    room_bytes += going * tag_bytes
    fitting = room_bytes // tag_bytes
    told = f"room for {fitting} checkpoints of {gigabytes(tag_bytes)}"
    if fitting < needed:
        return Finding(
            "space",
            Standing.MEND,
            f"{run_dir}: {told}, the run needs {needed} at a time: free {gigabytes(needed * tag_bytes - room_bytes)}, "
            "lower checkpoint.keep_last, or choose another run.dir",
        )
    if fitting < needed + for_ever:
        return Finding(
            "space",
            Standing.WARNING,
            f"{run_dir}: {told}, the run will keep {for_ever} more for ever (checkpoint.keep_every_steps): "
            f"free {gigabytes((needed + for_ever) * tag_bytes - room_bytes)} before it comes to that",
        )
    return Finding("space", Standing.SOUND, told)


def shared_memory(blueprint: Blueprint, ranks_here: int) -> Finding:
    """Whether what the loader's workers hand over fits into the node's shared memory; raises OSError."""
    return shared_memory_finding(free_bytes(SHM), shared_memory_bytes(blueprint, ranks_here), ranks_here)


def shared_memory_finding(room_bytes: int, needed_bytes: int, ranks_here: int) -> Finding:
    """Whether so much room is enough."""
    if room_bytes >= needed_bytes:
        return Finding("shared memory", Standing.SOUND, f"{gigabytes(room_bytes)} free")
    return Finding(
        "shared memory",
        Standing.MEND,
        f"{SHM}: {gigabytes(room_bytes)} free, {ranks_here} ranks need {gigabytes(needed_bytes)}: give it more "
        "(docker --shm-size, mount -o remount,size=...), remove what is left there, or lower data.prefetch_batches",
    )


def shared_memory_bytes(blueprint: Blueprint, ranks_here: int) -> int:
    """What the ranks of a node hold there at most: the micro-batches that wait, in uint8, and their collectives'."""
    config = blueprint.config
    phases = blueprint.timeline.phases
    batches = [(phase.split.micro_batch, blueprint.phase_variant(phase).image_px) for phase in phases]
    if blueprint.val_index is not None:
        batches.append((config.eval.micro_batch, blueprint.variant.image_px))
    largest = max(images * _CHANNELS * math.prod(image_px) for images, image_px in batches)
    waiting = (config.data.prefetch_batches + _PARTS_UNDER_WAY) * largest if config.data.workers else 0
    return ranks_here * (waiting + (COLLECTIVE_SHM_BYTES if ranks_here > 1 else 0))


def gigabytes(size_bytes: int) -> str:
    """A size for a person."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"


def _touch(run_dir: Path, what_for: str) -> float:
    """Make, flush and remove a file; when the file system says that it was made."""
    run_dir.mkdir(parents=True, exist_ok=True)
    probe = run_dir / f".preflight-{what_for}-{socket.gethostname()}-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(b"preflight")
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_mtime
    finally:
        probe.unlink(missing_ok=True)
