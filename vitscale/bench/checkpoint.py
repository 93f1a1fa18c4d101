"""The figures of checkpoints in one run, as Markdown: reshaping loads, saves beside the disk, what a save stalls."""

import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vitscale.bench.data import machine
from vitscale.bench.export import write_checkpoint
from vitscale.bench.fragments import VALUES, fragments_of_rank
from vitscale.bench.stall import measure_stall
from vitscale.bench.turns import median_ms, ratio, take_turns
from vitscale.checkpoint import (
    CheckpointStore,
    Manifest,
    Snapshot,
    parameter_shapes,
    rank_file_name,
    read_fragments,
    read_manifest,
    record_file,
    write_index,
)
from vitscale.model import TABLE
from vitscale.ranks.groups import Ranks
from vitscale.telemetry import peak_rss_bytes, reset_peak_rss

MB, GB = 1e6, 1e9
_CHUNK_BYTES = 16 << 20
_SAVED_BY, _LOADED_BY = 8, (2, 3, 4, 6, 12, 24)
"""Ranks: none of the loads is at the number that saved."""


@dataclass(frozen=True)
class CheckpointBench:
    """What is measured, where, and how often."""

    folder: Path
    """On the disk that is measured."""
    ranks: Ranks
    """A started process group of one."""
    model: str
    """Variant whose state is saved: 12 bytes a parameter."""
    rounds: int
    say: Callable[[str], None]
    """Takes lines of progress."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the model's parameters."""
        return dict(parameter_shapes(TABLE[self.model].variant))

    @property
    def state_bytes(self) -> int:
        """Of the whole checkpoint's tensors."""
        return 4 * len(VALUES) * sum(torch.Size(shape).numel() for shape in self.shapes.values())


class LoadCost(NamedTuple):
    """One rank's part of a load."""

    owned_bytes: int
    """Of the state it was given."""
    seconds: float
    peak_bytes: int
    """Largest resident set above what the process held without the state."""


def report_checkpoint(bench: CheckpointBench, rows: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown: the machine, then each of the rows of CHECKPOINT_ROWS."""
    yield f"{machine()}; {bench.model}, {bench.state_bytes / GB:.2f} GB of state; {bench.rounds} rounds"
    for row in rows:
        bench.say(f"measuring {row}")
        yield ""
        yield from CHECKPOINT_ROWS[row](bench)


def load_cost(directory: Path, shapes: dict[str, tuple[int, ...]], rank: int, world_size: int, stage: int) -> LoadCost:
    """Load one rank's state in this process, which has done nothing else, from a disk and not from its cache."""
    manifest = read_manifest(directory)
    drop_cached(directory.iterdir())
    held_bytes = reset_peak_rss()
    fragments = fragments_of_rank(shapes, rank, world_size, stage, torch.ones)
    started_s = time.perf_counter()
    read_fragments(fragments, directory, manifest)
    seconds = time.perf_counter() - started_s
    owned_bytes = sum(value.nbytes for fragment in fragments for value in fragment.values.values())
    return LoadCost(owned_bytes, seconds, peak_rss_bytes() - held_bytes)


def load_apart(*arguments: Any) -> LoadCost:
    """`load_cost` in a process of its own, forked from one that has done nothing but import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(load_cost, *arguments).result()


def drop_cached(files: Iterable[Path]) -> None:
    """Have the system forget what it keeps of the files in memory, where it can and no process has mapped it."""
    if hasattr(os, "posix_fadvise"):
        for path in files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def line_through(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Intercept and slope of the least-squares line, and the share of y's variance that it explains (R squared)."""
    slope, intercept = np.polyfit(x, y, 1)
    return float(intercept), float(slope), float(np.corrcoef(x, y)[0, 1] ** 2)


def write_plainly(path: Path, size_bytes: int, chunk: bytes) -> None:
    """Write and flush so many bytes in one sequential stream: what the disk can do."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, size_bytes, len(chunk)):
            file.write(chunk[: size_bytes - start])
        os.fsync(file.fileno())


def save_alone(bench: CheckpointBench, store: CheckpointStore) -> Callable[[], str]:
    """A function that commits a checkpoint of the whole model as one rank, from the copy to the rename."""
    fragments = fragments_of_rank(bench.shapes, 0, 1, 2, torch.randn)
    snapshot = Snapshot()
    manifest = Manifest(
        step=1, generation=1, world_size=1, optimizer_steps=1, cursor={}, config={}, model={}, labels=[],
        shapes={name: list(shape) for name, shape in bench.shapes.items()}, metrics={}, versions={}, saved_at="",
        files=[],
    )  # fmt: skip

    def save() -> str:
        snapshot.take(fragments)
        staging = store.staging(1, 1)
        record = snapshot.write(staging / rank_file_name(0))
        index = record_file(write_index(staging, 1))
        return store.commit(staging, manifest.model_copy(update={"files": [record, index]}))

    return save


def _load(bench: CheckpointBench) -> Iterator[str]:
    run_dir = bench.folder / f"saved-{bench.model}"
    directory = CheckpointStore(run_dir).path("step-00000001")
    if not directory.exists():
        bench.say(f"writing a checkpoint of {bench.model}")
        write_checkpoint(bench.model, run_dir, _SAVED_BY)
    yield (
        f"One rank's part of a load by other numbers of ranks, of a checkpoint that {_SAVED_BY} ranks of ZeRO 2 saved: "
        "each in a process of its own, the system's cache of the files dropped; median time, largest peak"
    )
    yield ""
    yield "| to ZeRO | ranks | state, MB | seconds | MB/s | peak RSS, MB | peak over state, MB |"
    yield "|--:|--:|--:|--:|--:|--:|--:|"
    found: dict[tuple[int, int], list[LoadCost]] = {(s, w): [] for s in (2, 3) for w in _LOADED_BY}
    for _ in range(bench.rounds):
        for stage, world_size in found:
            cost = load_apart(directory, bench.shapes, world_size // 2, world_size, stage)
            found[stage, world_size].append(cost)
    fits: list[str] = []
    for stage in (2, 3):
        costs = [_typical(found[stage, world_size]) for world_size in _LOADED_BY]
        for world_size, cost in zip(_LOADED_BY, costs, strict=True):
            yield (
                f"| {stage} | {world_size} | {cost.owned_bytes / MB:.0f} | {cost.seconds:.2f} "
                f"| {cost.owned_bytes / cost.seconds / MB:.0f} | {cost.peak_bytes / MB:.0f} "
                f"| {(cost.peak_bytes - cost.owned_bytes) / MB:.1f} |"
            )
        owned = [cost.owned_bytes for cost in costs]
        start_s, slope_s, explained_s = line_through(owned, [cost.seconds for cost in costs])
        start, slope, explained = line_through(owned, [cost.peak_bytes for cost in costs])
        fits.append(
            f"To ZeRO {stage}: {start_s:.3f} s and {slope_s * GB:.2f} s a GB owned (R² {explained_s:.4f}); "
            f"peak {start / MB:.1f} MB and {slope:.3f} bytes a byte owned (R² {explained:.4f})"
        )
    yield ""
    yield from fits


def _typical(costs: Sequence[LoadCost]) -> LoadCost:
    largest = max(costs, key=lambda cost: cost.peak_bytes)
    return largest._replace(seconds=statistics.median(cost.seconds for cost in costs))


def _save(bench: CheckpointBench) -> Iterator[str]:
    run_dir, plain = bench.folder / "save", bench.folder / "plain.bin"
    chunk = np.random.default_rng(0).bytes(_CHUNK_BYTES)

    def clear() -> None:
        plain.unlink(missing_ok=True)
        shutil.rmtree(run_dir, ignore_errors=True)

    times = take_turns(
        {
            "save": save_alone(bench, CheckpointStore(run_dir)),
            "plain": lambda: write_plainly(plain, bench.state_bytes, chunk),
        },
        bench.rounds,
        warmup_rounds=1,
        between=clear,
    )
    found = ratio(times["plain"], times["save"])
    yield (
        "A save by one rank (copy, write and SHA-256, flush, index, commit) beside a plain loop that writes and "
        "flushes as many bytes, in turn"
    )
    yield ""
    yield "| | seconds | MB/s |"
    yield "|---|--:|--:|"
    for name, label in (("plain", "write and fsync"), ("save", "save")):
        seconds = median_ms(times[name]) / 1e3
        yield f"| {label} | {seconds:.2f} | {bench.state_bytes / seconds / MB:.0f} |"
    yield ""
    yield f"The save's rate over the disk's: {found}"


def _stall(bench: CheckpointBench) -> Iterator[str]:
    found = measure_stall(bench.ranks, bench.folder / "stall", bench.model, bench.rounds)
    yield (
        "Training steps of 1 image with saves between them, one rank, plain torch: how long a step waits for a save "
        "that goes on beside training, and for one that it waits for, in turn"
    )
    yield ""
    yield "| save | step waits, ms |"
    yield "|---|--:|"
    yield f"| asynchronous | {found.asynchronous_ms:.0f} |"
    yield f"| synchronous | {found.synchronous_ms:.0f} |"
    yield ""
    yield f"Asynchronous over synchronous: {found.ratio}"
    yield ""
    yield (
        f"A step takes {found.step_ms:.0f} ms, beside the writing of a save {found.step_beside_save_ms:.0f} ms "
        "(medians)"
    )


CHECKPOINT_ROWS: dict[str, Callable[[CheckpointBench], Iterator[str]]] = {
    "load": _load,
    "save": _save,
    "stall": _stall,
}
"""What can be measured, by name."""
