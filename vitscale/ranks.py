"""Which rank this process is, and what the ranks of a run decide together.

Ranks are started by torchrun, by the deepspeed launcher, as the tasks of a Slurm step, or as one process
alone. `read_placement` tells these apart; no other code of vitscale reads their environment variables.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from vitscale.errors import LaunchError

T = TypeVar("T")

LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM_KEYS = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_JOB_ID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
)
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # Slurm numbers the batch script, an interactive shell and the like from here
FIRST_PORT, PORTS = 20000, 10000  # below the ports that Linux gives to outgoing connections


@dataclass(frozen=True)
class Placement:
    """Where one rank stands in its run, and where rank 0 is met. Port 0 stands for any free one."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


ALONE = Placement(rank=0, world_size=1, local_rank=0, local_world_size=1, master_addr="127.0.0.1", master_port=0)


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
        votes = torch.tensor(flags, dtype=torch.int64)
        if self.world_size > 1:
            dist.all_reduce(votes)
        return [count > 0 for count in votes.tolist()]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of `tensor` over all ranks, as a new tensor of its shape, type and device."""
        total = tensor.to("cpu", copy=True)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.to(tensor.device)

    def broadcast_object(self, value: T) -> T:
        """Rank 0's `value` on every rank; what the others pass is not looked at."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


def start(timeout_s: float = 600.0) -> Ranks:
    """Join the run that the environment describes, as one of its ranks; alone makes a group of one.

    The variables torch and DeepSpeed look for are set, whoever started the rank. A collective that waits
    longer than `timeout_s` fails.

    Raises:
        LaunchError: the environment is half-set, or there are more ranks on the node than GPUs.
    """
    placement = read_placement(os.environ)
    device = choose_device(placement.local_rank, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.update(
        RANK=str(placement.rank),
        WORLD_SIZE=str(placement.world_size),
        LOCAL_RANK=str(placement.local_rank),
        LOCAL_WORLD_SIZE=str(placement.local_world_size),
        MASTER_ADDR=placement.master_addr,
        MASTER_PORT=str(placement.master_port),
    )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Ranks(placement.rank, placement.world_size, placement.local_rank, placement.local_world_size, device)


def stop() -> None:
    """Leave the group that `start` joined."""
    dist.destroy_process_group()


def choose_device(local_rank: int, gpus: int) -> torch.device:
    """The GPU that a rank uses, where its node has `gpus` of them; the CPU where it has none.

    Raises:
        LaunchError: more ranks were started on the node than GPUs are visible.
    """
    if gpus == 0:
        return torch.device("cpu")
    if local_rank >= gpus:
        raise LaunchError(
            f"LOCAL_RANK {local_rank} has no GPU, the node shows {gpus}: start at most {gpus} ranks a node "
            "(CUDA_VISIBLE_DEVICES; under Slurm ask for GPUs by node, not by task)"
        )
    return torch.device("cuda", local_rank)


def read_placement(environ: Mapping[str, str]) -> Placement:
    """Tell the rank's place from environment variables: a launcher's, else a Slurm step's, else alone.

    A launcher's come first, because torchrun may itself run in a Slurm task.

    Raises:
        LaunchError: some of the variables are missing, no numbers, or contradict each other.
    """
    if any(key in environ for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        placement = _read_launcher(environ)
    elif _in_slurm_task(environ):
        placement = _read_slurm(environ)
    else:
        return ALONE
    if not (0 <= placement.rank < placement.world_size and 0 <= placement.local_rank < placement.local_world_size):
        raise LaunchError(
            f"rank {placement.rank} of {placement.world_size} (on the node {placement.local_rank} of "
            f"{placement.local_world_size}) cannot be: unset the variables {', '.join(LAUNCHER_KEYS)} "
            "that an earlier launch left in the environment"
        )
    return placement


def _read_launcher(environ: Mapping[str, str]) -> Placement:
    missing = [key for key in LAUNCHER_KEYS if key not in environ]
    # torchrun's name for it, then the deepspeed launcher's
    local_world_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environ else "LOCAL_SIZE"
    if local_world_size not in environ:
        missing.append("LOCAL_WORLD_SIZE")
    if missing:
        present = [key for key in LAUNCHER_KEYS if key in environ]
        raise LaunchError(
            f"{' and '.join(present)} set in the environment but not {' and '.join(missing)}: "
            "start with torchrun or deepspeed, which set them all, or unset them to run alone"
        )
    return Placement(
        rank=_number(environ, "RANK"),
        world_size=_number(environ, "WORLD_SIZE"),
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=_number(environ, local_world_size),
        master_addr=environ["MASTER_ADDR"],
        master_port=_number(environ, "MASTER_PORT"),
    )


def _in_slurm_task(environ: Mapping[str, str]) -> bool:
    # SLURM_PROCID is set in the batch script too, where nothing has been started by srun yet.
    return "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_ID") < FIRST_SPECIAL_STEP


def _read_slurm(environ: Mapping[str, str]) -> Placement:
    missing = [key for key in SLURM_KEYS if key not in environ]
    if missing:
        raise LaunchError(
            f"SLURM_STEP_ID is set but not {' and '.join(missing)}: start the ranks with srun, "
            "and pass its environment on to them, or unset SLURM_STEP_ID to run alone"
        )
    # A requeued job keeps its id; the old run's socket may still be there.
    attempt = _number(environ, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environ else 0
    port_seed = 101 * _number(environ, "SLURM_JOB_ID") + 11 * _number(environ, "SLURM_STEP_ID") + attempt
    return Placement(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=_number(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=_tasks_on_node(environ["SLURM_STEP_TASKS_PER_NODE"], _number(environ, "SLURM_NODEID")),
        master_addr=first_host(environ["SLURM_STEP_NODELIST"]),
        master_port=FIRST_PORT + port_seed % PORTS,
    )


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `node01` of `node[01-03,7],gpu4`."""
    return re.sub(r"\[(\w+)[^]]*]", r"\1", nodelist).split(",")[0]


def _tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Tasks on the step's node of that index, from Slurm's short form such as `2(x3),1`."""
    counts: list[int] = []
    for group in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", group)
        if match is None:
            raise LaunchError(
                f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} is no task count: start the ranks with srun"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise LaunchError(
            f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} counts {len(counts)} nodes: "
            "start the ranks with srun"
        )
    return counts[node]


def _number(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except ValueError:
        raise LaunchError(f"{key}={environ[key]!r} is not a whole number: unset it, or start with a launcher") from None
