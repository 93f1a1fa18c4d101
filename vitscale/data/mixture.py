"""The endless stream of training samples: one split, or several mixed in proportions that hold at any position.

Each canonical lane belongs to one source for the life of the run, as many lanes as the source's weight asks for,
and each source has an order of its own over its own lanes. So which sample stands at a position stays a pure
function of the position, and every source is seen in exact epochs of its own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vitscale.data.augment.repeats import repeated
from vitscale.data.batch import Cursor
from vitscale.data.order import MIXTURE, SUBSTITUTE, Order, hash64
from vitscale.data.split import SplitIndex


@dataclass(frozen=True)
class Samples:
    """The samples of several splits under one numbering: the rows of the first, then those of the next, ..."""

    indexes: tuple[SplitIndex, ...]

    def __len__(self) -> int:
        """Samples of all splits."""
        return int(self._ends[-1])

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([len(index) for index in self.indexes], dtype=np.int64)

    @cached_property
    def first_rows(self) -> NDArray[np.int64]:
        """Row that each split begins at."""
        return np.concatenate([[0], self._ends[:-1]])

    def sources(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the split that each row belongs to."""
        return np.searchsorted(self._ends, rows, side="right")

    def column(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Values of a numeric column of `SplitIndex` at some rows, int64."""
        values = np.empty(len(rows), dtype=np.int64)
        sources = self.sources(rows)
        for source, index in enumerate(self.indexes):
            chosen = sources == source
            values[chosen] = getattr(index, name)[rows[chosen] - self.first_rows[source]]
        return values

    def locate(self, row: int) -> tuple[SplitIndex, int]:
        """The split that holds a row, and the row in that split."""
        source = int(self.sources(np.array([row]))[0])
        return self.indexes[source], row - int(self.first_rows[source])

    def key(self, row: int) -> str:
        """Name of the sample at a row."""
        index, own = self.locate(row)
        return index.key(own)

    def shard_path(self, row: int) -> str:
        """Path or URL of the shard that holds the sample at a row."""
        index, own = self.locate(row)
        return index.shard_path(own)


@dataclass(frozen=True)
class Mixture:
    """Which sample stands at which position, over one or more sources.

    Args:
        samples: the sources.
        weights: share of the stream that each source gets; None is in proportion to its samples.
        seed, lanes, block: of the order.
        repeats: times each sample is seen in an epoch, `lanes` positions apart (repeated augmentation).
    """

    samples: Samples
    weights: tuple[float, ...] | None
    seed: int
    lanes: int
    block: int
    repeats: int = 1

    @property
    def classes(self) -> tuple[str, ...]:
        """Wnids in label order; all sources have the same."""
        return self.samples.indexes[0].classes

    @cached_property
    def lane_counts(self) -> tuple[int, ...]:
        """Lanes of each source: its share of them to the nearest whole one, and at least one."""
        weights = self.weights or [len(index) for index in self.samples.indexes]
        return share_out(self.lanes, weights)

    @cached_property
    def hash(self) -> str:
        """Identity of the sources and their shares."""
        if len(self.samples.indexes) == 1:
            return self.samples.indexes[0].hash
        parts = [f"{index.hash} {count}" for index, count in zip(self.samples.indexes, self.lane_counts, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The datasets and their splits, for messages."""
        return ", ".join(f"{index.root} ({index.split})" for index in self.samples.indexes)

    def cursor(self, position: int) -> Cursor:
        """What a checkpoint keeps of a position."""
        return Cursor(position, self.hash, self.seed, self.lanes, self.block, self.repeats)

    @property
    def epoch_images(self) -> int:
        """Images of one pass: as many as the sources have samples, each `repeats` times."""
        return self.repeats * len(self.samples)

    @cached_property
    def orders(self) -> tuple[Order, ...]:
        """Order of each source over its own lanes; the first has the seed itself."""
        seeds = [self.seed, *(int(hash64(self.seed, MIXTURE, source)) for source in range(1, len(self.lane_counts)))]
        parts = zip(self.samples.indexes, seeds, self.lane_counts, strict=True)
        return tuple(Order(len(index), seed, lanes, self.block) for index, seed, lanes in parts)

    @cached_property
    def _lane_source(self) -> NDArray[np.int64]:
        """Source of each lane; the lanes of every source are spread evenly."""
        places = [(np.arange(count) + 0.5) / count for count in self.lane_counts]
        owners = [np.full(count, source) for source, count in enumerate(self.lane_counts)]
        return np.concatenate(owners)[np.argsort(np.concatenate(places), kind="stable")]

    @cached_property
    def _lane_number(self) -> NDArray[np.int64]:
        """Number of each lane among the lanes of its source."""
        number = np.empty(self.lanes, dtype=np.int64)
        for source, count in enumerate(self.lane_counts):
            number[self._lane_source == source] = np.arange(count)
        return number

    def rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the samples at these positions, int64 [n]."""
        positions = repeated(positions, self.repeats, self.lanes)
        lane, turn = positions % self.lanes, positions // self.lanes
        source = self._lane_source[lane]
        rows = np.empty_like(positions)
        for number, (order, count) in enumerate(zip(self.orders, self.lane_counts, strict=True)):
            chosen = source == number
            own = turn[chosen] * count + self._lane_number[lane[chosen]]
            rows[chosen] = order.sample_at(own) + self.samples.first_rows[number]
        return rows

    def replacement(self, position: int, row: int, attempt: int) -> int:
        """Row of the same source that stands in for an unreadable sample at a position."""
        source = int(self.samples.sources(np.array([row]))[0])
        first, count = int(self.samples.first_rows[source]), len(self.samples.indexes[source])
        return first + int(hash64(self.seed, SUBSTITUTE, position, attempt) % np.uint64(count))

    def round_of(self, position: int) -> tuple[int, int]:
        """Epoch and round of blocks that the largest source is in; where it changes, its lanes begin new blocks."""
        source = int(np.argmax(self.lane_counts))
        order, count = self.orders[source], self.lane_counts[source]
        own = int(repeated(np.array([position]), self.repeats, self.lanes)[0]) // self.lanes * count
        epoch, q = divmod(own, order.samples)
        return epoch, q // (count * self.block)


def share_out(whole: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Split a whole number in proportion to weights, at least one each; the largest remainders round up."""
    shares = np.array(weights, dtype=np.float64) / sum(weights) * whole
    counts = np.floor(shares).astype(int)
    for source in np.argsort(counts - shares, kind="stable")[: whole - counts.sum()]:
        counts[source] += 1
    for source in np.flatnonzero(counts == 0):
        counts[np.argmax(counts)] -= 1
        counts[source] = 1
    return tuple(counts.tolist())
