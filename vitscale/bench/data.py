"""The figures of the data plane in one run: batches, resume, memory, order, mixing, reads; as Markdown."""

import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitscale.bench.loaders import (
    LOADERS,
    Photos,
    available_loaders,
    compare_loaders,
    in_a_fresh_process,
    section_for,
    train_recipe,
    write_mds,
)
from vitscale.bench.photo_dataset import write_long_index, write_photo_dataset
from vitscale.bench.resume import LongRun, first_batch, memory_in_training, seconds_to_open
from vitscale.config import BatchSplit
from vitscale.config.cache import CACHE_VARIABLE
from vitscale.data.batch import Traffic
from vitscale.data.loader import TrainLoader
from vitscale.data.order import Order

MB = 1e6
BLOCK = 64


@dataclass(frozen=True)
class DataBench:
    """What is measured, where, and how long."""

    folder: Path
    images: int
    shard_images: int
    samples: int
    """Length of the index that stands for a large dataset."""
    workers: int
    rounds: int
    seconds: float
    """Of each turn of each loader."""
    batches: int
    """Over which memory is watched."""
    say: Callable[[str], None]
    """Takes lines of progress."""

    def photos(self) -> Path:
        """The dataset of photographs, made if it is not there."""
        folder = self.folder / f"photos-{self.images}"
        if not (folder / "dataset.json").exists():
            self.say(f"making {self.images} photographs in {folder}")
            write_photo_dataset(folder, self.images, self.shard_images)
        return folder

    def mds(self) -> Path | None:
        """The photographs in the format of MosaicML Streaming, if that is installed."""
        folder = self.folder / f"mds-{self.images}"
        if "MosaicML Streaming + torchvision" not in available_loaders():
            return None
        if not (folder / "index.json").exists():
            write_mds(self.photos(), folder)
        return folder

    def long_index(self) -> Path:
        """The dataset with the long index, made if it is not there."""
        folder = self.folder / f"index-{self.samples}"
        if not (folder / "dataset.json").exists():
            self.say(f"making an index of {self.samples} samples in {folder}")
            write_long_index(folder, self.photos(), self.samples)
        return folder


def report(bench: DataBench, rows: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown: the machine, then each of the rows of ROWS."""
    yield machine()
    with empty_cache(bench.folder):
        for row in rows:
            bench.say(f"measuring {row}")
            yield ""
            yield from ROWS[row](bench)


def machine() -> str:
    """The processor, and the versions of all that takes part."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = []
    for library in ("torch", "simplejpeg", "pillow", "torchvision", "webdataset", "timm", "mosaicml-streaming"):
        try:
            versions.append(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {library}")
    return f"{next(iter(names), platform.machine())}, {cores} cores, {', '.join(versions)}"


def order_ms(order: Order, batch: int, rounds: int) -> tuple[float, float]:
    """Milliseconds of processor time to find the samples of a global batch: of an epoch's first, median of others."""
    taken = []
    for number in range(rounds + 1):
        positions = np.arange(number * batch, (number + 1) * batch)
        started_s = time.thread_time()  # it runs in one thread
        order.sample_at(positions)
        taken.append((time.thread_time() - started_s) * 1e3)
    return taken[0], statistics.median(taken[1:])


def distinct_classes(labels: NDArray[np.int64], window: int) -> float:
    """Distinct labels among `window` in a row, the mean over all such windows, end to end."""
    windows = labels[: len(labels) // window * window].reshape(-1, window)
    windows = np.sort(windows, axis=1)
    return float((1 + (np.diff(windows, axis=1) != 0).sum(axis=1)).mean())


def read_traffic(photos: Path, lanes: int, world_size: int, workers: int, images: int) -> Traffic:
    """What the first of some ranks reads and uses while all see so many images."""
    micro_batch = 16
    split = BatchSplit(micro_batch * world_size, micro_batch, 1, world_size)
    loader = TrainLoader(train_recipe(photos, section_for(photos, workers=workers, lanes=lanes), split))
    traffic = Traffic()
    for batch in islice(loader, images // split.global_batch):
        traffic = batch.traffic
    loader.close()
    return traffic


def _batches(bench: DataBench) -> Iterator[str]:
    photos = Photos(bench.photos(), bench.mds(), batch=64, workers=bench.workers)
    installed = available_loaders()
    missing = [name for name in LOADERS if name not in installed]
    yield (
        f"Batches of {photos.batch}, {photos.workers} workers, {bench.images} JPEGs of about 98 KB, crop to 224 px and "
        f"flip, bilinear; median of {bench.rounds} rounds{'; not installed: ' if missing else ''}{', '.join(missing)}"
    )
    yield ""
    yield "| loader | gives | images/s | vitscale over it | CPU ms an image | vitscale over it, by CPU time |"
    yield "|---|---|--:|--:|--:|--:|"
    for rate in compare_loaders(photos, installed, bench.rounds, bench.seconds, bench.say):
        yield (
            f"| {rate.loader} | {rate.form} | {rate.images_per_s:.0f} | {rate.ours_over_it:.2f} "
            f"| {rate.cpu_ms:.2f} | {rate.ours_over_it_cpu:.2f} |"
        )


def _long_run(bench: DataBench, workers: int) -> LongRun:
    return LongRun(bench.long_index(), workers, lanes=4096, world_size=64, micro_batch=64, read_ahead_mb=256)


def _resume(bench: DataBench) -> Iterator[str]:
    run = _long_run(bench, bench.workers)
    convert_s = in_a_fresh_process(seconds_to_open, run.folder)
    open_s = in_a_fresh_process(seconds_to_open, run.folder)
    yield (
        f"Resume at the middle of {bench.samples} samples, one rank of {run.world_size}, {run.lanes} lanes, "
        f"micro-batch {run.micro_batch}; conversion of the index to Arrow, once a node: {convert_s:.1f} s; after that "
        f"it opens in {open_s * 1e3:.0f} ms"
    )
    yield ""
    yield "| workers | fork server | first batch, s | read by then (much of it ahead), MB | the batch itself, MB |"
    yield "|--:|---|--:|--:|--:|"
    for workers, server in ((0, ""), (bench.workers, "runs"), (bench.workers, "started too")):
        found = [
            in_a_fresh_process(first_batch, _long_run(bench, workers), server == "runs") for _ in range(bench.rounds)
        ]
        first = statistics.median(one.seconds for one in found)
        yield (
            f"| {workers} | {server} | {first:.2f} | {found[0].read_bytes / MB:.1f} | {found[0].batch_bytes / MB:.1f} |"
        )


def _memory(bench: DataBench) -> Iterator[str]:
    run = _long_run(bench, bench.workers)
    yield (
        f"Memory over {bench.batches} batches with an index of {bench.samples} samples, {run.read_ahead_mb} MiB read "
        "ahead: the largest of the first half, then of the second"
    )
    yield ""
    yield "| process | of its own, MB | resident pages of the shared index, MB |"
    yield "|---|--:|--:|"
    for found in in_a_fresh_process(memory_in_training, run, bench.batches):
        own, index = ([f"{size / MB:.0f}" for size in sizes] for sizes in (found.own_bytes, found.index_bytes))
        yield f"| {found.process} | {', '.join(own)} | {', '.join(index)} |"


def _order(bench: DataBench) -> Iterator[str]:
    first_ms, other_ms = order_ms(Order(bench.samples, 0, 4096, BLOCK), batch=16_384, rounds=max(bench.rounds, 20))
    yield (
        f"Order of a global batch of 16,384 among {bench.samples} samples, 4,096 lanes, blocks of {BLOCK}: "
        f"{other_ms:.2f} ms, {first_ms:.1f} ms for the first of an epoch"
    )


def _mixing(bench: DataBench) -> Iterator[str]:
    classes, window = 1000, 1024
    generator = np.random.default_rng(0)
    by_class = np.arange(bench.samples) * classes // bench.samples
    shuffled = generator.permutation(by_class)
    counted = np.arange(min(bench.samples, 100 * window))
    ideal = distinct_classes(generator.permutation(by_class)[counted], window)
    yield f"Distinct classes among {window} images, {classes} classes; a permutation of all samples gives {ideal:.0f}"
    yield ""
    yield "| lanes | shards | distinct | of the permutation |"
    yield "|--:|---|--:|--:|"
    for lanes in (64, 4096):
        rows = Order(bench.samples, 0, lanes, BLOCK).sample_at(counted)
        for name, labels in (("shuffled, as built", shuffled), ("sorted by class", by_class)):
            found = distinct_classes(labels[rows], window)
            yield f"| {lanes} | {name} | {found:.0f} | {found / ideal:.3f} |"


def _reads(bench: DataBench) -> Iterator[str]:
    lanes = 8
    yield f"Bytes read from shards over bytes of images used, {lanes} lanes, blocks of {BLOCK}, {bench.workers} workers"
    yield ""
    yield "| ranks | lanes belong to ranks whole | read, MB | used, MB | read / used |"
    yield "|--:|---|--:|--:|--:|"
    for world_size in (1, 2, 3):
        owned = "yes" if lanes % (2 * world_size) == 0 else "no"
        found = in_a_fresh_process(read_traffic, bench.photos(), lanes, world_size, bench.workers, bench.images)
        yield (
            f"| {world_size} | {owned} | {found.read_bytes / MB:.0f} | {found.used_bytes / MB:.0f} "
            f"| {found.read_bytes / found.used_bytes:.3f} |"
        )


ROWS: dict[str, Callable[[DataBench], Iterator[str]]] = {
    "batches": _batches,
    "resume": _resume,
    "memory": _memory,
    "order": _order,
    "mixing": _mixing,
    "reads": _reads,
}
"""What can be measured, by name."""


@contextmanager
def empty_cache(parent: Path) -> Iterator[None]:
    """Let what is converted once a node be converted anew, into a folder that is removed."""
    before = os.environ.get(CACHE_VARIABLE)
    try:
        with tempfile.TemporaryDirectory(prefix="cache-", dir=parent) as folder:
            os.environ[CACHE_VARIABLE] = folder
            yield
    finally:
        if before is None:
            os.environ.pop(CACHE_VARIABLE, None)
        else:
            os.environ[CACHE_VARIABLE] = before


@contextmanager
def work_folder(keep: Path | None) -> Iterator[Path]:
    """The folder to keep, made if need be; or a temporary one."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as folder:
        yield Path(folder)
