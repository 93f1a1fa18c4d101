"""Loaders of micro-batches for one rank: endless and resumable for training, exactly once for evaluation.

The work is done in `data.workers` processes. They are forked from a clean server process, never from the
trainer, whose device is in use. Launchers and Slurm signal every process of a job, but the trainer alone
decides what a signal means: the workers are started with these signals blocked.
"""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from multiprocessing import connection, resource_tracker
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitscale.config import BatchSplit, DataSection
from vitscale.data.augment import crop_box, flips
from vitscale.data.batch import Batch, Cursor, Substitution, TrainBatch
from vitscale.data.decode import BadSample, centre_box, crop_resize, decode
from vitscale.data.fetch import SampleReader
from vitscale.data.index import SplitIndex
from vitscale.data.order import SUBSTITUTE, Order, hash64, rank_positions
from vitscale.errors import STOP_SIGNALS, ShardError

# A sample's replacement may be bad too; ten in a row are no accident.
MAX_ATTEMPTS = 10

B = TypeVar("B", bound=Batch)


class TrainLoader:
    """Endless iterator of one rank's training micro-batches, from any position on.

    Everything in a batch follows from its positions, so a loader started at position k gives what any other
    gives after k images. `next` raises a ShardError once more than `data.bad_sample_budget` samples of this
    rank were replaced.
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
        samples = _TrainSamples(index, config, seed, img_size)
        results = _start(samples, _train_requests(split, rank, start_position), config)
        self._batches: Generator[TrainBatch, None, None] = _admit(results, index, config.bad_sample_budget)

    def __iter__(self) -> Iterator[TrainBatch]:
        """The loader is its own iterator."""
        return self

    def __next__(self) -> TrainBatch:
        """The next micro-batch."""
        return next(self._batches)

    def close(self) -> None:
        """End the workers and the iteration."""
        self._batches.close()


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
        self._requests = np.split(padded, batches)
        self._samples = _EvalSamples(index, config, img_size)

    def __len__(self) -> int:
        """Batches of one pass."""
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        """One pass."""
        samples = self._samples
        return _admit(_start(samples, self._requests, samples.config), samples.index, samples.config.bad_sample_budget)


class _Samples(Dataset[Any]):
    """What a loader process does: whole micro-batches from requests.

    A ShardError is returned, not raised: DataLoader would wrap it into a traceback of many lines.
    """

    def __init__(self, index: SplitIndex, config: DataSection, img_size: int) -> None:
        self.index = index
        self.config = config
        self.img_size = img_size
        self.reader = SampleReader(index)

    def _blank(self, count: int) -> Tensor:
        return torch.zeros(count, 3, self.img_size, self.img_size, dtype=torch.uint8)

    def _substitution(self, position: int, row: int, reason: str, replaced_by: str) -> Substitution:
        shard = self.index.shards[int(self.index.shard[row])]
        return Substitution(position, self.index.key(row), shard, reason, replaced_by)


class _TrainSamples(_Samples):
    def __init__(self, index: SplitIndex, config: DataSection, seed: int, img_size: int) -> None:
        super().__init__(index, config, img_size)
        self.seed = seed
        self.order = Order(len(index), seed, config.lanes, config.block)

    def __getitems__(self, request: tuple[int, NDArray[np.int64]]) -> TrainBatch | ShardError:
        step_end, positions = request
        rows = self.order.sample_at(positions)
        images = self._blank(len(rows))
        substitutions: list[Substitution] = []
        try:
            for place in self.reader.reading_order(rows):
                images[place], rows[place], replaced = self._load(int(positions[place]), int(rows[place]))
                substitutions += replaced
        except ShardError as error:
            return error
        return TrainBatch(
            images=images,
            labels=torch.from_numpy(self.index.label[rows].astype(np.int64)),
            flips=torch.from_numpy(flips(self.seed, positions, self.config.flip)),
            positions=torch.from_numpy(positions),
            samples=torch.from_numpy(rows),
            valid=torch.ones(len(rows), dtype=torch.bool),
            substitutions=tuple(sorted(substitutions, key=lambda s: s.position)),
            cursor=Cursor(step_end, self.index.hash, self.seed, self.config.lanes, self.config.block),
        )

    def _load(self, position: int, row: int) -> tuple[Tensor, int, list[Substitution]]:
        """Image, row and substitutions of a position: the sample itself or the first readable replacement."""
        bad: list[tuple[int, str]] = []
        candidate = row
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                image = self._crop(position, candidate)
            except BadSample as error:
                bad.append((candidate, str(error)))
                candidate = int(hash64(self.seed, SUBSTITUTE, position, attempt) % np.uint64(len(self.index)))
                continue
            key = self.index.key(candidate)
            return image, candidate, [self._substitution(position, b, reason, key) for b, reason in bad]
        raise ShardError(
            f"{self.index.shard_path(row)}: sample {self.index.key(row)} ({bad[0][1]}) and its {MAX_ATTEMPTS - 1} "
            f"replacements cannot be read: see `vitscale-data verify {self.index.root} --decode`"
        )

    def _crop(self, position: int, row: int) -> Tensor:
        config = self.config
        image = decode(self.reader.read(row))
        box = crop_box(self.seed, position, image.shape[1], image.shape[2], config.crop_scale, config.crop_ratio)
        return crop_resize(image, box, self.img_size, config.interpolation)


class _EvalSamples(_Samples):
    def __getitems__(self, rows: NDArray[np.int64]) -> Batch | ShardError:
        images = self._blank(len(rows))
        valid = rows >= 0
        substitutions: list[Substitution] = []
        for place in np.flatnonzero(valid):
            row = int(rows[place])
            try:
                image = decode(self.reader.read(row))
            except BadSample as error:
                valid[place] = False
                substitutions.append(self._substitution(row, row, str(error), replaced_by=""))
                continue
            except ShardError as error:
                return error
            box = centre_box(image.shape[1], image.shape[2], self.config.val_crop)
            images[place] = crop_resize(image, box, self.img_size, self.config.interpolation)
        return Batch(
            images=images,
            labels=torch.from_numpy(np.where(rows >= 0, self.index.label[rows], 0).astype(np.int64)),
            flips=torch.zeros(len(rows), dtype=torch.bool),
            positions=torch.from_numpy(rows),
            samples=torch.from_numpy(rows),
            valid=torch.from_numpy(valid),
            substitutions=tuple(substitutions),
        )


def _train_requests(split: BatchSplit, rank: int, start_position: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """End of the step and positions of each micro-batch, without end."""
    start = start_position
    while True:
        end = start + split.global_batch
        for positions in np.split(rank_positions(start, split.global_batch, rank, split.world_size), split.grad_accum):
            yield end, positions
        start = end


def _start(samples: _Samples, requests: Iterable[Any], config: DataSection) -> Iterator[Any]:
    """Start the workers on the requests; the result gives their answers in order, and ends them when dropped."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    loader = DataLoader(
        samples,
        batch_sampler=requests,  # a request is a whole micro-batch
        collate_fn=_as_is,
        num_workers=config.workers,
        prefetch_factor=config.prefetch_batches if config.workers else None,
        multiprocessing_context=context if config.workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_end_with_the_trainer,
        generator=torch.Generator(),  # else DataLoader draws a seed from the generator that dropout uses
    )
    resource_tracker.ensure_running()  # its start would unblock the signals again
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _end_with_the_trainer(worker: int) -> None:
    """Watch the trainer from a thread of the worker.

    DataLoader's own watch looks at the parent process, which is the fork server here, and the server lives as
    long as its workers do.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def watch() -> None:
        connection.wait([trainer.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@atexit.register
def _end_left_workers() -> None:
    """At the trainer's exit multiprocessing ends daemonic children by SIGTERM, which the workers block."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _as_is(batch: Any) -> Any:
    return batch


def _admit(results: Iterator[B | ShardError], index: SplitIndex, budget: int) -> Generator[B, None, None]:
    """Pass batches on, raise the workers' errors, and stop once more than `budget` samples were bad."""
    bad = 0
    for result in results:
        if isinstance(result, ShardError):
            raise result
        bad += len(result.substitutions)
        if bad > budget:
            last = result.substitutions[-1]
            raise ShardError(
                f"{index.root / last.shard}: sample {last.key} is bad ({last.reason}) and the {bad}th such: "
                f"raise data.bad_sample_budget above {budget}, or see `vitscale-data verify {index.root} --decode`"
            )
        yield result
