"""Loaders of micro-batches for one rank: endless and resumable for training, exactly once for evaluation.

The work is done in `data.workers` processes. They are forked from a clean server process, never from the
trainer, whose device is in use. Launchers and Slurm signal every process of a job; the trainer alone
decides what a signal means, so the workers are started with these signals blocked.
"""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitscale.config import BatchSplit, DataSection
from vitscale.data.augment import crop_box, flips
from vitscale.data.batch import Batch, Cursor, Substitution, TrainBatch, check_cursor
from vitscale.data.decode import BadSample, centre_box, crop_resize, decode
from vitscale.data.fetch import SampleReader
from vitscale.data.index import SplitIndex
from vitscale.data.order import SUBSTITUTE, Order, hash64, rank_positions
from vitscale.errors import ShardError

__all__ = ["Batch", "Cursor", "EvalLoader", "Substitution", "TrainBatch", "TrainLoader", "check_cursor"]

JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

# A sample's replacement may be bad too; ten in a row are no accident.
MAX_ATTEMPTS = 10

B = TypeVar("B", bound=Batch)


class TrainLoader:
    """Endless iterator of one rank's training micro-batches, from any position on.

    Everything in a batch but the split into micro-batches follows from the positions, so a loader started
    at position k gives what any other loader gives after k images.

    Raises:
        ShardError: on `next`, once more than `data.bad_sample_budget` samples of this rank were replaced.
    """

    def __init__(
        self,
        index: SplitIndex,
        config: DataSection,
        *,
        seed: int,
        img_size: int,
        split: BatchSplit,
        rank: int,
        start_position: int = 0,
    ) -> None:
        """Start the workers; they prefetch at once."""
        samples = _TrainSamples(index, config, seed, img_size, split.global_batch, start_position)
        self._batches = _Batches[TrainBatch](samples, _train_requests(split, rank, start_position), config, endless=True)

    def __iter__(self) -> Iterator[TrainBatch]:
        """The loader is its own iterator."""
        return self

    def __next__(self) -> TrainBatch:
        """The next micro-batch."""
        return self._batches.next()

    def close(self) -> None:
        """End the workers."""
        self._batches.close()


class EvalLoader:
    """Every sample of a split exactly once over all ranks, in equally many batches on every rank.

    Each rank reads one contiguous part. The tail is padded with valid=False.

    Raises:
        ShardError: on `next`, once more than `data.bad_sample_budget` samples of this rank could not be read.
    """

    def __init__(
        self, index: SplitIndex, config: DataSection, *, img_size: int, micro_batch: int, rank: int, world_size: int
    ) -> None:
        """Plan the batches; the workers start with the first iteration and stay for the next ones."""
        part = -(-len(index) // world_size)
        self._rows = np.full(-(-part // micro_batch) * micro_batch, -1, dtype=np.int64)
        own = np.arange(rank * part, min((rank + 1) * part, len(index)), dtype=np.int64)
        self._rows[: len(own)] = own
        self._micro_batch = micro_batch
        self._samples = _EvalSamples(index, config, img_size)
        self._config = config

    def __len__(self) -> int:
        """Batches a rank and pass."""
        return len(self._rows) // self._micro_batch
