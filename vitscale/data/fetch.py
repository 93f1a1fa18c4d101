"""Reads samples' bytes out of their shards: those that are about to be needed, in large ranges, ahead of time.

A window is a run of requests whose samples are read together. Neighbours in a shard become one range, so where a
window covers whole blocks each block is one read; whatever the topology, only bytes that somebody asked for are
read, but for the tar headers between neighbours.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from vitscale.data.batch import Traffic
from vitscale.data.checksum import crc32
from vitscale.data.decode import BadSample
from vitscale.data.mixture import Samples
from vitscale.data.shards import ShardBytes
from vitscale.data.split import NO_CRC

# Between two images lie the padding, .cls, .wnid and a header: about 3 kB.
MAX_GAP_BYTES = 4096
MAX_RANGE_BYTES = 16 << 20

R = TypeVar("R")


@dataclass(frozen=True)
class Range:
    """One read: a run of bytes of a shard, and the rows that lie in it, in the shard's order."""

    source: int
    shard: str
    offset: int
    size: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Window(Generic[R]):
    """Requests whose rows are read together."""

    requests: list[R]
    rows: NDArray[np.int64]


class SampleReader:
    """Reads samples of some splits and checks them against the index."""

    def __init__(self, samples: Samples, shards: Sequence[ShardBytes]) -> None:
        """Read from `shards`, one place a split."""
        self.samples = samples
        self.traffic = Traffic()
        self._lock = threading.Lock()
        self._shards = shards

    def ranges(self, rows: NDArray[np.int64]) -> list[Range]:
        """The reads that bring these rows, each byte once, in the order in which the rows are first asked for."""
        rows, first_asked = np.unique(rows, return_index=True)
        samples = self.samples
        source, shard = samples.sources(rows), samples.column("shard", rows)
        offset, size = samples.column("offset", rows), samples.column("size", rows)
        forwards = np.lexsort((offset, shard, source))
        ends = (offset + size)[forwards]
        apart = (np.diff(source[forwards]) != 0) | (np.diff(shard[forwards]) != 0)
        apart |= offset[forwards][1:] - ends[:-1] > MAX_GAP_BYTES
        found: list[tuple[int, Range]] = []
        for run in np.split(forwards, np.flatnonzero(apart) + 1):
            for part in _split_by_size(run, size):
                begin, end = int(offset[part[0]]), int((offset[part] + size[part]).max())
                own = int(source[part[0]])
                name = samples.indexes[own].shards[int(shard[part[0]])]
                reads = Range(own, name, begin, end - begin, tuple(rows[part].tolist()))
                found.append((int(first_asked[part].min()), reads))
        return [reads for _, reads in sorted(found, key=lambda pair: pair[0])]

    def read_range(self, reads: Range) -> dict[int, tuple[memoryview, int]]:
        """The bytes of every row of a range, and the crc32 that the index has for them; for any thread.

        Raises:
            ShardError: the shard cannot be read.
        """
        data = memoryview(self._shards[reads.source].read(reads.shard, reads.offset, reads.size))
        rows = np.array(reads.rows)
        offsets = self.samples.column("offset", rows) - reads.offset
        sizes = self.samples.column("size", rows)
        crc32s = self.samples.column("crc32", rows)
        with self._lock:
            self.traffic += Traffic(reads.size, int(sizes.sum()), 1)
        places = zip(reads.rows, offsets.tolist(), sizes.tolist(), crc32s.tolist(), strict=True)
        return {row: (data[start : start + size], crc) for row, start, size, crc in places}

    def read(self, row: int) -> bytes:
        """The bytes of one sample that no window holds.

        Raises:
            BadSample: the bytes are not those that were indexed.
            ShardError: the shard cannot be read.
        """
        (reads,) = self.ranges(np.array([row]))
        return checked(*self.read_range(reads)[row])

    def close(self) -> None:
        """Close the shards."""
        for shards in self._shards:
            shards.close()


def checked(data: memoryview, expected: int) -> bytes:
    """The bytes of a sample, once they are known to be those that were indexed.

    Raises:
        BadSample: their crc32 is another.
    """
    if expected not in (NO_CRC, crc32(data)):
        raise BadSample("its crc32 is not the one in the index")
    return bytes(data)


@dataclass(frozen=True)
class Fetched:
    """The bytes of one window, as they arrive."""

    reader: SampleReader
    futures: Mapping[int, "Future[dict[int, tuple[memoryview, int]]]"]

    def read(self, row: int) -> bytes:
        """The bytes of a sample, when they are there; of one outside the window, read now.

        Raises:
            BadSample: the bytes are not those that were indexed.
            ShardError: the shard cannot be read.
        """
        if row not in self.futures:
            return self.reader.read(row)
        return checked(*self.futures[row].result()[row])


def read_ahead(windows: Iterable[Window[R]], reader: SampleReader, threads: int) -> Iterator[tuple[R, Fetched]]:
    """Each request with the bytes of its window, while those of the next window are on their way."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
    started: deque[tuple[Window[R], Fetched]] = deque()
    try:
        for window in windows:
            started.append((window, _start(window, reader, pool)))
            if len(started) > 1:
                yield from _requests_of(*started.popleft())
        while started:
            yield from _requests_of(*started.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def cut_windows(
    requests: Iterable[R],
    rows_of: Callable[[R], NDArray[np.int64]],
    samples: Samples,
    *,
    limit_bytes: int,
    round_of: Callable[[R], Any] | None = None,
) -> Iterator[Window[R]]:
    """Cut requests into windows: at every change of `round_of`, and before a window holds more than `limit_bytes`.

    A request without rows, as of a worker to whom nothing of a micro-batch falls, goes with those before it. The first
    window is one request, so that the first batch need not wait for a whole one.
    """
    held: list[R] = []
    rows: list[NDArray[np.int64]] = []
    held_bytes, held_round, first = 0, None, True
    for request in requests:
        own = rows_of(request)
        size = int(samples.column("size", own).sum())
        now = round_of(request) if round_of is not None and len(own) else held_round
        if held and (first or now != held_round or held_bytes + size > limit_bytes):
            yield Window(held, np.concatenate(rows))
            held, rows, held_bytes, first = [], [], 0, False
        held.append(request)
        rows.append(own)
        held_bytes += size
        held_round = now
    if held:
        yield Window(held, np.concatenate(rows))


def _start(window: Window[R], reader: SampleReader, pool: ThreadPoolExecutor) -> Fetched:
    futures: dict[int, Future[dict[int, tuple[memoryview, int]]]] = {}
    for reads in reader.ranges(window.rows) if len(window.rows) else ():
        future = pool.submit(reader.read_range, reads)
        futures.update(dict.fromkeys(reads.rows, future))
    return Fetched(reader, futures)


def _requests_of(window: Window[R], fetched: Fetched) -> Iterator[tuple[R, Fetched]]:
    for request in window.requests:
        yield request, fetched


def _split_by_size(run: NDArray[np.int64], size: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Cut a run of neighbours where its images make up more than a range may hold."""
    parts = np.cumsum(size[run]) // MAX_RANGE_BYTES
    return np.split(run, np.flatnonzero(np.diff(parts)) + 1)
