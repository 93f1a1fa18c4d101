"""What every source of shards gives, wherever the shards are: bytes of a range, size and version, figures."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from vitscale.errors import ExitStatus, ShardError


class ShardUnreachableError(ShardError):
    """A server did not give a shard for now: the run is worth another start."""

    status = ExitStatus.TRANSIENT


@dataclass(frozen=True)
class ShardStat:
    """What is known of a shard without reading it; `version` changes when its bytes do."""

    size_bytes: int
    version: str


@dataclass
class Transfers:
    """What went over one source of shards so far. Threads add to it without a lock: figures, not accounts."""

    requests: int = 0
    read_bytes: int = 0
    retries: int = 0


class ShardBytes(Protocol):
    """A folder of shards, wherever it is. Any thread may read; a pickled one starts afresh in its new process."""

    location: str
    transfers: Transfers

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a shard, from `offset` on.

        Raises:
            ShardError: the shard is missing, too short or cannot be read.
            ShardUnreachableError: so it is for now.
        """

    def stat(self, shard: str) -> ShardStat:
        """Size and version of a shard; raises as `read` does."""

    def close(self) -> None:
        """Let go of what is open; a read that waits for another try ends with its error."""


def checked_name(location: str, shard: str) -> str:
    """The name of a shard, which comes out of an index that anybody may have written.

    Raises:
        ShardError: it is no plain path below the location.
    """
    path = PurePosixPath(shard)
    if str(path) != shard or path.is_absolute() or ".." in path.parts or not path.parts:
        raise ShardError(
            f"{location}: the index names the shard {shard!r}, which is no plain path inside: build the index again"
        )
    return shard
