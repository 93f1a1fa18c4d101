"""Loaders of micro-batches for one rank: endless and resumable for training, exactly once for evaluation.

Every worker makes its own part of every micro-batch, as the recipe says. The parts are put together in a thread of
the trainer, in page-locked memory where there is a GPU.
"""

import math
import mmap
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.config import DataSection
from vitscale.data import turbojpeg
from vitscale.data.batch import Batch, Traffic, TrainBatch
from vitscale.data.mixture import Samples
from vitscale.data.processes import Background, Parts
from vitscale.data.recipes import EvalRecipe, Part, TrainRecipe
from vitscale.data.split import SplitIndex
from vitscale.errors import ShardError


class TrainLoader:
    """Endless iterator of one rank's training micro-batches, from any position on.

    Everything in a batch follows from its positions, so a loader started at position k gives what any other
    gives after k images. `next` raises a ShardError once more than `data.bad_sample_budget` samples of this
    rank were replaced.
    """

    def __init__(self, recipe: TrainRecipe) -> None:
        """Start the workers; they read ahead at once."""
        turbojpeg.find()  # a wrong path is one line here, and a traceback in a worker
        config = recipe.config
        self._background = Background(self._batches(recipe), config.prefetch_batches, config.workers > 0)

    def __iter__(self) -> Iterator[TrainBatch]:
        """The loader is its own iterator."""
        return self

    def __next__(self) -> TrainBatch:
        """The next micro-batch."""
        return next(self._background)

    @property
    def ready(self) -> int:
        """Micro-batches that wait for the trainer; 0 says that the trainer waits for them."""
        return self._background.ready

    def close(self) -> None:
        """End the workers and the iteration."""
        self._background.close()

    @staticmethod
    def _batches(recipe: TrainRecipe) -> Generator[TrainBatch, None, None]:
        with closing(_joined(recipe, recipe.micro_batches(), recipe.split.micro_batch)) as micro_batches:
            for request, joined in micro_batches:
                valid = torch.from_numpy(request.positions >= 0)
                yield TrainBatch(
                    images=joined.tensors["images"],
                    labels=joined.tensors["labels"],
                    positions=torch.from_numpy(request.positions),
                    samples=joined.tensors["samples"].where(valid, -1),
                    valid=valid,
                    substitutions=joined.substitutions,
                    drawn=joined.drawn,
                    cursor=recipe.cursor(request.step_end),
                    traffic=joined.traffic,
                )


class EvalLoader:
    """Every sample of a split exactly once over all ranks, in equally many batches on every rank.

    Each rank reads one contiguous part; its tail is padded with valid=False. Each iteration starts workers
    of its own and ends them. It raises a ShardError once more than `data.bad_sample_budget` samples of this
    rank could not be read.
    """

    def __init__(
        self, index: SplitIndex, config: DataSection, *, img_size: int, micro_batch: int, rank: int, world_size: int
    ) -> None:
        """Plan the batches."""
        part = -(-len(index) // world_size)
        rows = np.arange(rank * part, min((rank + 1) * part, len(index)), dtype=np.int64)
        batches = -(-part // micro_batch)
        padded = np.pad(rows, (0, batches * micro_batch - len(rows)), constant_values=-1)
        self._recipe = EvalRecipe(Samples((index,)), config, img_size, np.split(padded, batches))
        self._micro_batch = micro_batch

    def __len__(self) -> int:
        """Batches of one pass."""
        return len(self._recipe.batches)

    def __iter__(self) -> Generator[Batch, None, None]:
        """One pass."""
        with closing(_joined(self._recipe, self._recipe.batches, self._micro_batch)) as batches:
            for rows, joined in batches:
                yield Batch(
                    images=joined.tensors["images"],
                    labels=joined.tensors["labels"],
                    positions=torch.from_numpy(rows),
                    samples=torch.from_numpy(rows),
                    valid=joined.tensors["valid"],
                    substitutions=joined.substitutions,
                )


def _joined(
    recipe: TrainRecipe | EvalRecipe, requests: Iterable[Any], micro_batch: int
) -> Generator[tuple[Any, Part], None, None]:
    """Each request, and what all workers together made of it."""
    config = recipe.config
    workers = max(1, config.workers)
    budget = _Budget(config.bad_sample_budget)
    with closing(Parts(recipe, config.workers, config.prefetch_batches)) as parts:
        for request in requests:
            own = list(budget.admit(islice(parts, workers)))
            places = [recipe.places(request, worker, workers) for worker in range(workers)]
            yield request, _join(own, places, micro_batch)


class _Budget:
    """Raises the workers' errors, and ends the run once too many samples were bad."""

    def __init__(self, budget: int) -> None:
        self._budget, self._bad = budget, 0

    def admit(self, parts: Iterable[Part | ShardError]) -> Iterator[Part]:
        for part in parts:
            if isinstance(part, ShardError):
                try:
                    raise part
                finally:
                    del part  # it would hold this frame, which would hold it
            self._bad += len(part.substitutions)
            if self._bad > self._budget:
                last = part.substitutions[-1]
                raise ShardError(
                    f"{last.shard}: sample {last.key} is bad ({last.reason}) and number {self._bad} of such: "
                    f"raise data.bad_sample_budget above {self._budget}, or find all of them with "
                    "`vitscale-data verify FOLDER --decode`"
                )
            yield part


def _join(parts: list[Part], places: list[NDArray[np.int64]], micro_batch: int) -> Part:
    """Put the workers' parts of a micro-batch to their places, and zeros to those that fall to nobody."""
    padding = np.setdiff1d(np.arange(micro_batch), np.concatenate(places))
    substitutions = sorted((s for part in parts for s in part.substitutions), key=lambda s: s.position)
    tensors = {name: _whole(first, micro_batch) for name, first in parts[0].tensors.items()}
    drawn = {name: _whole_array(first, micro_batch) for name, first in parts[0].drawn.items()}
    for part, own in zip(parts, places, strict=True):
        for name, tensor in tensors.items():
            _as_array(tensor)[own] = _as_array(part.tensors[name])
        for name, array in drawn.items():
            array[own] = part.drawn[name]
    for array in (*map(_as_array, tensors.values()), *drawn.values()):
        array[padding] = 0
    return Part(tensors, drawn, tuple(substitutions), sum((part.traffic for part in parts), Traffic()))


def _whole(like: Tensor, rows: int) -> Tensor:
    """Room for all rows, in page-locked memory where there is a GPU."""
    shape = (rows, *_as_array(like).shape[1:])
    if torch.cuda.is_available() or like.dim() < 4:
        room = torch.empty(shape, dtype=like.dtype, pin_memory=torch.cuda.is_available())
    else:
        # Made here and freed by the trainer's thread, images would leave holes in malloc's memory, which then grows.
        room = torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=like.dtype).view(shape)
    return room.permute(0, 3, 1, 2) if like.dim() == 4 else room


def _whole_array(like: NDArray[Any], rows: int) -> NDArray[Any]:
    return np.empty((rows, *like.shape[1:]), dtype=like.dtype)


def _as_array(tensor: Tensor) -> NDArray[Any]:
    """The same memory as an array, images with the channels last: numpy copies whole rows, torch single elements."""
    array: NDArray[Any] = (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).numpy()
    return array
