"""Resuming in the middle of a long epoch, and what a long index costs in memory.

The rank that is measured is one of many, as a long index is one of a large run: its lanes are a few of all lanes.
"""

import multiprocessing
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import psutil

from vitscale.bench.loaders import section_for, train_recipe
from vitscale.bench.photo_dataset import SPLIT
from vitscale.config import BatchSplit
from vitscale.data.loader import TrainLoader
from vitscale.data.processes import start_server
from vitscale.data.recipes import MixtureRecipe
from vitscale.data.split import open_split

TRAINER = "trainer"


@dataclass(frozen=True)
class LongRun:
    """A run over a dataset with a long index, as its first rank has it."""

    folder: Path
    workers: int
    lanes: int
    world_size: int
    micro_batch: int
    read_ahead_mb: int

    def recipe(self) -> MixtureRecipe:
        """The run from the middle of its first epoch on."""
        split = BatchSplit(self.world_size * self.micro_batch, self.micro_batch, 1, self.world_size)
        section = section_for(self.folder, workers=self.workers, lanes=self.lanes, read_ahead_mb=self.read_ahead_mb)
        steps = len(open_split(self.folder, SPLIT)) // split.global_batch
        return train_recipe(self.folder, section, split, start_position=steps // 2 * split.global_batch)


@dataclass(frozen=True)
class FirstBatch:
    """From the loader's construction to its first batch, and what had been read from shards by then."""

    seconds: float
    read_bytes: int
    batch_bytes: int  # of the batch's own images


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process, the largest of each half of a stretch of training."""

    process: str
    own_bytes: tuple[int, int]
    """Pages that it shares with nobody, but for those of the index."""
    index_bytes: tuple[int, int]
    """Resident pages of the index, which all processes of a node share."""


def seconds_to_open(folder: Path, check_files: bool = True) -> float:
    """Time to open the training split: with the conversion to Arrow if that is not in the cache."""
    started_s = time.perf_counter()
    open_split(folder, SPLIT, check_files=check_files)
    return time.perf_counter() - started_s


def first_batch(run: LongRun, server_runs: bool) -> FirstBatch:
    """Resume once; with `server_runs` the process that workers are forked from has been started before."""
    recipe = run.recipe()
    if server_runs:
        start_server()
        # The server answers once its imports are done.
        process = multiprocessing.get_context("forkserver").Process(target=int)
        process.start()
        process.join()
    started_s = time.perf_counter()
    loader = TrainLoader(recipe)
    batch = next(loader)
    seconds = time.perf_counter() - started_s
    loader.close()
    batch_bytes = int(recipe.mixture.samples.column("size", batch.samples.numpy()).sum())
    return FirstBatch(seconds, batch.traffic.read_bytes, batch_bytes)


def memory_in_training(run: LongRun, batches: int, every: int = 10) -> list[ProcessMemory]:
    """Memory of the trainer and its workers over some batches, looked at after each `every` of them."""
    recipe = run.recipe()
    index_file = str(recipe.mixture.samples.indexes[0].mapped)
    loader = TrainLoader(recipe)
    seen: dict[int, list[tuple[int, int]]] = {}
    for number, _ in enumerate(islice(loader, batches), start=1):
        if number % every == 0:
            for process in _processes_with(index_file):
                seen.setdefault(process.pid, []).append(_memory(process, index_file))
    loader.close()
    own_pid = psutil.Process().pid
    found: list[ProcessMemory] = []
    for pid, memory in seen.items():
        halves = [memory[: len(memory) // 2], memory[len(memory) // 2 :]]
        own, index = (tuple(max(look[i] for look in half) for half in halves) for i in range(2))
        name = TRAINER if pid == own_pid else f"worker {len(found)}"
        found.append(ProcessMemory(name, (own[0], own[1]), (index[0], index[1])))
    return found


def _processes_with(file: str) -> list[psutil.Process]:
    """This process and those below it that map a file: the fork server does not."""
    own = psutil.Process()
    return [own, *(p for p in own.children(recursive=True) if any(m.path == file for m in p.memory_maps()))]


def _memory(process: psutil.Process, index_file: str) -> tuple[int, int]:
    """Pages of its own, and of the index, in bytes."""
    maps = process.memory_maps()
    own = sum(m.private_clean + m.private_dirty for m in maps if m.path != index_file)
    return own, sum(m.rss for m in maps if m.path == index_file)
