"""How workers make their parts of batches: which positions fall to whom, and from a position to pixels.

A lane falls to one worker of one rank (where the numbers divide), which reads whole blocks ahead; and a first batch is
there as soon as each worker has made a few images.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.config import BatchSplit, DataSection
from vitscale.data.augment import Augmentation, crop_box, draw_crops
from vitscale.data.batch import Cursor, Substitution, Traffic
from vitscale.data.decode import BadSample, Box, decode, decode_crop, resize_centre
from vitscale.data.fetch import Fetched, SampleReader, cut_windows, read_ahead
from vitscale.data.mixture import Mixture, Samples
from vitscale.data.order import rank_positions
from vitscale.data.shards import open_shards
from vitscale.errors import ShardError

# A sample's replacement may be bad too; ten in a row are no accident.
MAX_ATTEMPTS = 10

READ_THREADS = 8
MB = 1 << 20


class Request(NamedTuple):
    """The positions of a micro-batch, -1 where it is padded; a step ends at `step_end`."""

    step_end: int
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """What a worker makes of a request of n images: by name tensors, and arrays that augmentation drew, [n, ...]."""

    tensors: dict[str, Tensor]
    drawn: dict[str, NDArray[Any]]
    substitutions: tuple[Substitution, ...]
    traffic: Traffic


@dataclass(frozen=True)
class TrainRecipe(ABC):
    """Which training positions fall to whom, whatever the samples at them come from; it travels to the workers."""

    config: DataSection
    augmentation: Augmentation
    split: BatchSplit
    rank: int
    start_position: int

    @abstractmethod
    def cursor(self, position: int) -> Cursor:
        """The cursor at a position."""

    @abstractmethod
    def parts(self, worker: int, workers: int) -> Iterator[Part]:
        """One worker's parts of all micro-batches, in their order.

        Raises:
            ShardError: a shard cannot be read, or neither a sample nor its replacements.
        """

    def micro_batches(self) -> Iterator[Request]:
        """This rank's micro-batches, without end; a step that needs padding has it at its end."""
        split, start = self.split, self.start_position
        while True:
            end = start + split.global_batch
            own = rank_positions(start, split.global_batch, self.rank, split.world_size)
            padded = np.pad(own, (0, split.rank_batch - len(own)), constant_values=-1)
            for positions in np.split(padded, split.grad_accum):
                yield Request(end, positions)
            start = end

    def places(self, request: Request, worker: int, workers: int) -> NDArray[np.int64]:
        """Places in a micro-batch that fall to a worker: pairs of positions go round the workers as round the ranks.

        Padding falls to nobody.
        """
        turns = request.positions // (2 * self.split.world_size)
        return np.flatnonzero((request.positions >= 0) & (turns % workers == worker))

    def requests(self, worker: int, workers: int) -> Iterator[NDArray[np.int64]]:
        """A worker's positions of each micro-batch."""
        for request in self.micro_batches():
            yield request.positions[self.places(request, worker, workers)]

    def crop(self, draws: Sequence[float], data: bytes) -> Tensor:
        """A training crop, uint8 [3, S, S]; `draws` are the random numbers of its position.

        Raises:
            BadSample: the image cannot be decoded.
        """
        config = self.config

        def box(height: int, width: int) -> Box:
            return crop_box(draws, height, width, config.crop_scale, config.crop_ratio)

        size = self.augmentation.img_size
        return decode_crop(data, box, size, config.interpolation, scaled=config.scaled_decode)


@dataclass(frozen=True)
class MixtureRecipe(TrainRecipe):
    """Training parts from indexed datasets."""

    mixture: Mixture

    def cursor(self, position: int) -> Cursor:
        """The cursor at a position."""
        return self.mixture.cursor(position)

    def parts(self, worker: int, workers: int) -> Iterator[Part]:
        """One worker's parts of all micro-batches, in their order.

        Raises:
            ShardError: a shard cannot be read, or neither a sample nor its replacements.
        """
        samples, mixture = self.mixture.samples, self.mixture
        windows = cut_windows(
            ((positions, mixture.rows_at(positions)) for positions in self.requests(worker, workers)),
            rows_of=lambda pair: pair[1],
            samples=samples,
            limit_bytes=_window_bytes(self.config, workers),
            round_of=lambda pair: mixture.round_of(int(pair[0][0])),
        )
        for (positions, rows), fetched in read_ahead(windows, _open_reader(samples, self.config), READ_THREADS):
            yield self._make(positions, rows.copy(), fetched)

    def _make(self, positions: NDArray[np.int64], rows: NDArray[np.int64], fetched: Fetched) -> Part:
        images = blank_images(len(rows), self.augmentation.img_size)
        substitutions: list[Substitution] = []
        draws = draw_crops(self.mixture.seed, positions)
        for place, (position, row) in enumerate(zip(positions.tolist(), rows.tolist(), strict=True)):
            images[place], rows[place], replaced = self._load(position, row, draws[place], fetched)
            substitutions += replaced
        labels = torch.from_numpy(self.mixture.samples.column("label", rows))
        tensors = {"images": images, "labels": labels, "samples": torch.from_numpy(rows)}
        return Part(tensors, self.augmentation.draw(positions), tuple(substitutions), fetched.reader.traffic)

    def _load(
        self, position: int, row: int, draws: Sequence[float], fetched: Fetched
    ) -> tuple[Tensor, int, list[Substitution]]:
        """Image, row and substitutions of a position: the sample itself or the first readable replacement."""
        samples = self.mixture.samples
        bad: list[tuple[int, str]] = []
        candidate = row
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                image = self.crop(draws, fetched.read(candidate))
            except BadSample as error:
                bad.append((candidate, str(error)))
                candidate = self.mixture.replacement(position, row, attempt)
                continue
            # Keys are looked up for bad samples alone: they are most of the index's bytes.
            key = samples.key(candidate) if bad else ""
            return image, candidate, [_substitution(samples, position, b, reason, key) for b, reason in bad]
        raise ShardError(
            f"{samples.shard_path(row)}: sample {samples.key(row)} ({bad[0][1]}) and its {MAX_ATTEMPTS - 1} "
            f"replacements cannot be read: see `vitscale-data verify {samples.locate(row)[0].root} --decode`"
        )


@dataclass(frozen=True)
class EvalRecipe:
    """How the parts of evaluation batches are made."""

    samples: Samples
    config: DataSection
    img_size: int
    batches: list[NDArray[np.int64]]

    def places(self, rows: NDArray[np.int64], worker: int, workers: int) -> NDArray[np.int64]:
        """Places in a batch that fall to a worker: neighbours, which lie together in a shard."""
        return np.array_split(np.arange(len(rows)), workers)[worker]

    def parts(self, worker: int, workers: int) -> Iterator[Part]:
        """One worker's parts of all batches.

        Raises:
            ShardError: a shard cannot be read.
        """
        reader = _open_reader(self.samples, self.config)
        windows = cut_windows(
            (rows[self.places(rows, worker, workers)] for rows in self.batches),
            rows_of=lambda rows: rows[rows >= 0],
            samples=self.samples,
            limit_bytes=_window_bytes(self.config, workers),
        )
        for rows, fetched in read_ahead(windows, reader, READ_THREADS):
            yield self._make(rows, fetched)

    def _make(self, rows: NDArray[np.int64], fetched: Fetched) -> Part:
        images = blank_images(len(rows), self.img_size)
        labels = np.zeros(len(rows), dtype=np.int64)
        valid = rows >= 0
        labels[valid] = self.samples.column("label", rows[valid])
        substitutions: list[Substitution] = []
        for place in np.flatnonzero(valid):
            row = int(rows[place])
            try:
                image = decode(fetched.read(row))
            except BadSample as error:
                valid[place] = False
                substitutions.append(_substitution(self.samples, row, row, str(error), replaced_by=""))
                continue
            images[place] = resize_centre(image, self.img_size, self.config.val_crop, self.config.interpolation)
        tensors = {"images": images, "labels": torch.from_numpy(labels), "valid": torch.from_numpy(valid)}
        return Part(tensors, {}, tuple(substitutions), fetched.reader.traffic)


def blank_images(count: int, size_px: int) -> Tensor:
    """Black images uint8 [count, 3, size_px, size_px]; the channels come last in memory, as the decoder's do."""
    return torch.zeros(count, size_px, size_px, 3, dtype=torch.uint8).permute(0, 3, 1, 2)


def _open_reader(samples: Samples, config: DataSection) -> SampleReader:
    return SampleReader(samples, [open_shards(index.location, config.remote) for index in samples.indexes])


def _window_bytes(config: DataSection, workers: int) -> int:
    """Two windows a worker are in memory: the one in use and the one on its way."""
    return config.read_ahead_mb * MB // (2 * workers)


def _substitution(samples: Samples, position: int, row: int, reason: str, replaced_by: str) -> Substitution:
    return Substitution(position, samples.key(row), samples.shard_path(row), reason, replaced_by)
