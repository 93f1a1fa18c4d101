"""Which shards a builder writes, and that no two builders write the same.

Locks are flocks: they end with their process, however it ends, so a killed build leaves nothing to clear.
"""

import errno
import fcntl
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vitscale.errors import ShardError

LOCK_FILE = "build.lock"
PART_LOCKS = "part-*-of-*.lock"

# What a file system without locks answers, such as Lustre mounted without -o flock.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Part:
    """The `number`th of `parts` equal parts of a build; numbers begin at 1."""

    number: int
    parts: int

    @property
    def lock(self) -> str:
        """Name of the file that the builder of this part holds."""
        return f"part-{self.number}-of-{self.parts}.lock"

    def takes(self, shard: int) -> bool:
        """Whether a shard belongs to this part. Parts take shards in turn, so they finish together."""
        return shard % self.parts == self.number - 1


def read_part(words: str, environment: Mapping[str, str]) -> Part:
    """The part that `--part` names: "2/8", or "slurm" for this task's place in its Slurm array.

    Raises:
        ShardError: neither of the two, a number out of range, or "slurm" outside an array.
    """
    if words == "slurm":
        try:
            task, first, step, parts = (
                int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "STEP", "COUNT")
            )
        except (KeyError, ValueError):
            raise ShardError(
                "--part slurm: this is no task of a Slurm array: submit it with sbatch --array=1-8, or give --part 1/8"
            ) from None
        return Part((task - first) // step + 1, parts)
    numbers = re.fullmatch(r"(\d+)/(\d+)", words)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise ShardError(f"--part {words}: is no part: give 1/8 to 8/8, or slurm inside a Slurm array")
    return Part(int(numbers[1]), int(numbers[2]))


@contextmanager
def claim(out: Path, part: Part | None = None) -> Iterator[None]:
    """Hold a folder against other builders: the whole of it, or one part beside the other parts.

    Raises:
        ShardError: another builder holds the folder, this part, or a part of another division.
    """
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        if part is None:
            _lock(held, out / LOCK_FILE, fcntl.LOCK_EX, f"{out}: another builder works here")
            yield
            return
        _lock(held, out / LOCK_FILE, fcntl.LOCK_SH, f"{out}: a builder of the whole folder works here")
        _lock(held, out / part.lock, fcntl.LOCK_EX, f"{out}: another builder writes part {part.number}/{part.parts}")
        for path in out.glob(PART_LOCKS):
            if not path.match(f"part-*-of-{part.parts}.lock"):
                with ExitStack() as other:
                    _lock(other, path, fcntl.LOCK_EX, f"{out}: {path.stem} is being written, which overlaps this part")
        yield


def _lock(held: ExitStack, path: Path, kind: int, holder: str) -> None:
    # Read and write: network file systems give exclusive locks on such files only.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ShardError(f"{holder}: wait for it, or give another --out") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        sys.stderr.write(f"{path}: this file system has no locks: see to it that no other builder works here\n")
