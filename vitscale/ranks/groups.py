"""What the ranks of a run decide together, from joining the run to leaving it."""

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.nn import functional

from vitscale.errors import ExitStatus, LaunchError
from vitscale.ranks.network import find_variables
from vitscale.ranks.open_files import allow_open_files
from vitscale.ranks.placement import read_placement

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks, and the small collectives that need no engine.

    All methods are collective: every rank calls them, in the same order, from its main thread. They run over
    gloo on the CPU, so they neither wait for nor disturb what the device is doing.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and talks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on at least one rank."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """For each of the flags whether it is set on at least one rank."""
        return [bool(vote) for vote in self.gather(torch.tensor(flags, dtype=torch.bool)).any(0)]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of `tensor` over all ranks, as a new tensor of its shape, type and device."""
        return self.gather(tensor.cpu()).sum(0, dtype=tensor.dtype).to(tensor.device)

    def broadcast_object(self, value: T) -> T:
        """Rank 0's `value` on every rank; what the others pass is not looked at."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on every rank."""
        text = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self.gather(torch.tensor(len(text))).tolist()
        texts = self.gather(functional.pad(text, (0, max(sizes) - len(text))))
        written = (row[:size].numpy().tobytes() for row, size in zip(texts, sizes, strict=True))
        return [pickle.loads(text) for text in written]  # noqa: S301  by the run's own ranks

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """Every rank's `row`, a CPU tensor of one shape and type everywhere, in rank order: (ranks, *shape).

        In rounds of twice the distance each (Bruck et al., "Efficient Algorithms for All-to-All Communications", 1997),
        log2 of the ranks of them. gloo's own collectives, but for broadcast, pass their messages around a ring one
        after the other: with 4,096 ranks that would cost a part of a second before every step.
        """
        rows, distance = row[None], 1  # of this rank and those that follow it
        while distance < self.world_size:
            count = min(distance, self.world_size - distance)
            heard = torch.empty((count, *row.shape), dtype=row.dtype)
            sent = dist.isend(rows[:count].contiguous(), (self.rank - distance) % self.world_size)
            dist.recv(heard, (self.rank + distance) % self.world_size)
            assert sent is not None  # it is for ranks outside of the group
            sent.wait()
            rows, distance = torch.cat([rows, heard]), 2 * distance
        return rows.roll(self.rank, 0)


def start(timeout_s: float = 600.0) -> Ranks:
    """Join the run that the environment describes, as one of its ranks; alone makes a group of one.

    The variables that torch and DeepSpeed look for are set, whoever started the rank, and on several nodes those of
    gloo and NCCL that nobody has set. A collective that waits longer than `timeout_s` fails.

    Raises:
        LaunchError: the environment is half-set, GPUs are missing, there is no way to the others, or too few files may
            be open.
    """
    placement = read_placement(os.environ)
    allow_open_files(placement.rank, placement.world_size)
    device = choose_device(placement.local_rank, count_gpus(), promised_gpus(os.environ))
    gpus = device.type == "cuda"
    if gpus:
        torch.cuda.set_device(device)
    os.environ.update(
        find_variables(placement, gpus, timeout_s, os.environ),
        RANK=str(placement.rank),
        WORLD_SIZE=str(placement.world_size),
        LOCAL_RANK=str(placement.local_rank),
        LOCAL_WORLD_SIZE=str(placement.local_world_size),
        MASTER_ADDR=placement.master_addr,
        MASTER_PORT=str(placement.master_port),
    )
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Ranks(placement.rank, placement.world_size, placement.local_rank, placement.local_world_size, device)


def stop() -> None:
    """Leave the group that `start` joined."""
    dist.destroy_process_group()


def count_gpus() -> int:
    """GPUs that torch sees on this node."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def promised_gpus(environ: Mapping[str, str]) -> str:
    """The GPUs that somebody, mostly Slurm, has named for this process; empty where it may do without."""
    named = environ.get("CUDA_VISIBLE_DEVICES", "")
    # deepspeed, which alone sets CROSS_RANK, numbers its ranks this way on a machine without GPUs too.
    return "" if named in ("-1", "NoDevFiles") or "CROSS_RANK" in environ else named


def choose_device(local_rank: int, gpus: int, promised: str = "") -> torch.device:
    """The GPU that a rank uses, where its node has `gpus` of them; the CPU where it has none and none is `promised`.

    Raises:
        LaunchError: there is no GPU for the rank. If only some are missing, another try may help.
    """
    if gpus == 0:
        if promised:
            raise LaunchError(
                f"CUDA_VISIBLE_DEVICES={promised}, but torch sees no GPU: see the driver, and that torch is built for "
                "CUDA, or unset it to run on CPUs"
            )
        return torch.device("cpu")
    if local_rank >= gpus:
        error = LaunchError(
            f"LOCAL_RANK {local_rank} has no GPU, the node shows {gpus}: start at most {gpus} ranks a node "
            "(CUDA_VISIBLE_DEVICES; under Slurm ask for GPUs by node, not by task)"
        )
        error.status = ExitStatus.TRANSIENT  # one may have fallen off
        raise error
    return torch.device("cuda", local_rank)
