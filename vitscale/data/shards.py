"""Opens shards by their location: a folder, or a URL, with or without copies on the node's disk."""

import importlib
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from vitscale.config.remote import RemoteSection
from vitscale.data.shard_bytes import ShardBytes, ShardStat, Transfers, checked_name
from vitscale.data.shard_cache import CachedShards
from vitscale.errors import ShardError

__all__ = ["LocalShards", "ShardBytes", "open_shards"]

MAX_OPEN_SHARDS = 64
REMOTE_SCHEMES = ("http", "https", "s3", "gs", "az")


def open_shards(location: str | Path, remote: RemoteSection | None = None) -> ShardBytes:
    """The shards in a folder or below a URL (file, http, https, s3, gs or az), to be read in this or another process.

    Nothing is opened before the first read. `remote` says how a URL is read, and whether through a cache.

    Raises:
        ShardError: nothing can read such a URL here.
    """
    location = str(location)
    scheme = location.partition("://")[0] if "://" in location else ""
    if scheme not in REMOTE_SCHEMES:
        return LocalShards(_folder(location, scheme))
    remote = remote or RemoteSection()
    try:
        # Its client is an extra that most runs do without.
        client = importlib.import_module("vitscale.data.remote")
    except ModuleNotFoundError as error:
        raise ShardError(
            f"{location}: shards behind a URL need {error.name}, which is not installed: pip install 'vitscale[remote]'"
        ) from None
    shards: ShardBytes = client.RemoteShards(location, remote)
    if remote.cache_folder is None:
        return shards
    return CachedShards(shards, remote.cache_folder, int(remote.cache_limit_gb * 1e9))


class LocalShards:
    """Shards in a folder; keeps those it used last open."""

    def __init__(self, folder: Path) -> None:
        """Open nothing yet."""
        self.location = str(folder)
        self.transfers = Transfers()
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Open files stay in their process."""
        return LocalShards, (Path(self.location),)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a shard, from `offset` on; raises ShardError."""
        try:
            data = _read_all(self._descriptor(shard), size, offset)
        except OSError as error:
            raise self._unreadable(shard, error) from None
        self.transfers.requests += 1
        self.transfers.read_bytes += len(data)
        if len(data) < size:
            raise ShardError(
                f"{self.location}/{shard}: ends {size - len(data)} bytes before the index says: "
                "copy it again or build the dataset again"
            )
        return data

    def stat(self, shard: str) -> ShardStat:
        """Size and version of a shard; raises ShardError."""
        try:
            descriptor = self._descriptor(shard)
            found = os.fstat(descriptor.number)
        except OSError as error:
            raise self._unreadable(shard, error) from None
        return ShardStat(found.st_size, str(found.st_mtime_ns))

    def close(self) -> None:
        """Close the files that nobody reads; the others when they are read."""
        with self._lock:
            self._open.clear()

    def _descriptor(self, shard: str) -> "_Descriptor":
        with self._lock:
            if shard not in self._open:
                path = Path(self.location, checked_name(self.location, shard))
                if len(self._open) == MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
                self._open[shard] = _Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            self._open.move_to_end(shard)
            return self._open[shard]

    def _unreadable(self, shard: str, error: OSError) -> ShardError:
        return ShardError.of_system(
            error,
            f"{self.location}/{shard}: cannot be read ({error.strerror}): put the shard back or check the disk, "
            "then start again",
        )


class _Descriptor:
    """An open file that closes with its last reference: hold one while reading, for another thread may let it go."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _read_all(file: _Descriptor, size: int, offset: int) -> bytes:
    """Up to `size` bytes, fewer only at the end of the file: one pread may give less than there is."""
    parts = [os.pread(file.number, size, offset)]
    missing = size - len(parts[0])
    while missing and parts[-1]:
        parts.append(os.pread(file.number, missing, offset + size - missing))
        missing -= len(parts[-1])
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _folder(location: str, scheme: str) -> Path:
    if not scheme:
        return Path(location)
    url = urlsplit(location)
    if scheme != "file" or url.netloc not in ("", "localhost"):
        known = ", ".join(f"{name}://" for name in ("file", *REMOTE_SCHEMES))
        raise ShardError(f"{location}: shards cannot be read from there: name a folder or one of {known}")
    return Path(unquote(url.path))
