"""Ranks that meet on this machine: what that costs rank 0, and what each does at a start of the trainer."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch.distributed as dist
from torch import Tensor

from vitscale.bench.photo_dataset import CLASSES, SPLIT
from vitscale.bench.start_constants import StartCounts
from vitscale.config import Config
from vitscale.ranks import groups as process_group
from vitscale.ranks.groups import Ranks
from vitscale.train.run import run_training

_HOST = "127.0.0.1"
_STDOUT, _STDERR = 1, 2
_VOTES = 10
_RECORDS = ("checkpoints", "tensorboard")
"""Folders of a run directory whose files are counted elsewhere, or are rank 0's."""


class Meeting(NamedTuple):
    """Rank 0's part of a group's first minutes."""

    ranks: int
    lazy: bool
    cpu_s: float
    """Of all threads of rank 0, which serves the store, until all ranks have talked."""
    descriptors: int
    """That rank 0 has more than before."""
    vote_s: float
    """Of the clock."""


def meet(ranks: int, lazy: bool) -> Meeting:
    """Have so many processes join a group and talk in each way that the trainer has."""
    cpu_s, descriptors, vote_s = in_ranks(ranks, lazy, 0, _talk)
    return Meeting(ranks, lazy, cpu_s, descriptors, vote_s)


def meetings(numbers: tuple[int, ...]) -> list[Meeting]:
    """A meeting of each number of ranks, eager and lazy."""
    return [meet(ranks, lazy) for ranks in numbers for lazy in (False, True)]


def count_start(photos: Path, run_dir: Path) -> StartCounts:
    """Two ranks train a micro model for a step and end, then start again from its checkpoint: what rank 1 does."""
    config = _config(photos, run_dir)
    for _ in range(2):
        found: StartCounts = in_ranks(2, True, 1, _counted_start, config, (str(photos), str(run_dir)))
    return found


def in_ranks(ranks: int, lazy: bool, asked: int, act: Callable[..., Any], *arguments: Any) -> Any:
    """What `act` gives on one of so many ranks, forked from this process.

    Args:
        ranks: processes, which share this machine's cores.
        lazy: whether gloo connects two ranks only once they talk.
        asked: the rank whose result is wanted.
        act: called on each rank, before it has joined the others.
        arguments: of `act`.

    Raises:
        EOFError: the ranks ended without a result.
    """
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    with socket.create_server((_HOST, 0)) as probe:
        port = probe.getsockname()[1]
    started = []
    for rank in range(ranks):
        given = (rank, ranks, port, lazy, writer if rank == asked else None, act, arguments)
        started.append(context.Process(target=_attend, args=given))
        started[-1].start()
    writer.close()
    try:
        return reader.recv()
    finally:
        for process in started:
            process.join()


def _attend(
    rank: int, ranks: int, port: int, lazy: bool, writer: Connection | None, act: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR=_HOST, MASTER_PORT=str(port), TORCH_GLOO_LAZY_INIT=str(int(lazy)), CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # rank 0 serves the store, whoever started this process
    os.dup2(_STDERR, _STDOUT)  # the table alone goes there
    found = act(*arguments)
    if writer is not None:
        writer.send(found)


def _talk() -> tuple[float, int, float]:
    own = psutil.Process()
    began_s, descriptors = time.process_time(), own.num_fds()
    ranks = process_group.start()
    ranks.broadcast_object("")
    ranks.gather_objects(ranks.rank)
    ranks.barrier()
    spent_s, opened = time.process_time() - began_s, own.num_fds() - descriptors
    began_s = time.perf_counter()
    for _ in range(_VOTES):
        ranks.any(False)
    return spent_s, opened, (time.perf_counter() - began_s) / _VOTES


def _counted_start(config: Config, folders: tuple[str, ...]) -> StartCounts:
    opened: list[str] = []
    groups, gathers = 1, 0  # the one that is there from the start
    new_group, gather = dist.new_group, Ranks.gather

    def hear(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and str(details[0]).startswith(folders):
            opened.append(str(details[0]))

    def counted_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        nonlocal groups
        groups += ranks is None or len(ranks) == dist.get_world_size()
        return new_group(ranks, *args, **kwargs)

    def counted_gather(self: Ranks, row: Tensor) -> Tensor:
        nonlocal gathers
        gathers += 1
        return gather(self, row)

    dist.new_group, Ranks.gather = counted_group, counted_gather  # type: ignore[method-assign]
    sys.addaudithook(hear)
    run_training(config)
    few = [path for path in opened if not path.endswith(".tar") and not any(f"/{name}/" in path for name in _RECORDS)]
    return StartCounts(groups, gathers, 1 + len(few))  # and the config's own file


def _config(photos: Path, run_dir: Path) -> Config:
    tree: dict[str, Any] = {
        "run": {"dir": run_dir},
        "model": {
            "name": "vit_tiny_patch16_224", "num_classes": len(CLASSES), "img_size": 16, "patch_size": 8,
            "embed_dim": 32, "depth": 2, "num_heads": 2,
        },
        "data": {"train": {"path": str(photos), "split": SPLIT}, "lanes": 4, "block": 4, "workers": 0},
        "batch": {"global_batch": 8, "micro_batch": 2},
        "optim": {"peak_lr": 1e-3},
        "schedule": {"length": 1, "warmup": 0},
        "engine": {"zero_stage": 2, "precision": "fp32"},
        "log": {"pictures": 0},
    }  # fmt: skip
    return Config.model_validate(tree)
