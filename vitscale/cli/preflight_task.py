"""The parts of `vitscale preflight` that need torch: one rank's in a job, and one machine's by itself."""

import os
import socket
from pathlib import Path

import click
from torch.distributed.distributed_c10d import Store

from vitscale.cli.preflight_text import finding_lines
from vitscale.config import Config
from vitscale.errors import ExitStatus, LaunchError
from vitscale.ranks.groups import choose_device, count_gpus
from vitscale.ranks.network import find_variables
from vitscale.ranks.open_files import allow_open_files
from vitscale.ranks.placement import Placement, read_placement
from vitscale.train.preflight.gates import store_at
from vitscale.train.preflight.measure import try_device
from vitscale.train.preflight.meeting import attend
from vitscale.train.preflight.node import inspect_node
from vitscale.train.preflight.reports import RankReport, Standing
from vitscale.train.preflight.seat import Limits, Seat


def attend_as_task(config: Config, folder: Path, wait_s: float | None) -> ExitStatus:
    """This rank's part of the preflight of a job; `wait_s` if it is not to wait as long as usual for the others.

    Raises:
        LaunchError: the environment is half-set, or the folder cannot be written.
    """
    placement, limits = read_placement(os.environ), Limits() if wait_s is None else Limits(wait_s=wait_s)
    seat = _seat(placement)
    if seat.device.type == "cuda":
        # A collective that does not end is an error here, and not the end of the process.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")

    def open_store() -> Store:
        allow_open_files(placement.rank, placement.world_size)
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "0")  # every connection is to be tried
        gpus = seat.device.type == "cuda"
        os.environ.update(find_variables(placement, gpus, limits.all_ranks_s, os.environ))
        # Beside the run's own port, which torchrun's agent may hold.
        port = placement.master_port + 1 if placement.master_port else 0
        return store_at(seat, placement.master_addr, port, limits)

    try:
        attend(
            seat,
            folder,
            open_store=open_store,
            inspect=lambda: inspect_node(config, seat.node, seat.local_world_size, check_files=seat.rank == 0),
            limits=limits,
        )
    except OSError as error:
        raise LaunchError(
            f"{folder}: cannot be written on {seat.node}: {error.strerror}: give a folder that all nodes share"
        ) from None
    return ExitStatus.FINISHED


def look_around(config: Config) -> ExitStatus:
    """Check this machine, print what came out, and give the status that a run would end with."""
    gpus = count_gpus()
    node = inspect_node(config, socket.gethostname(), max(gpus, 1), check_files=True)
    ranks = []
    for index in range(max(gpus, 1)):
        device = choose_device(index, gpus)
        rate, fault = try_device(device)
        ranks.append(RankReport(node.node, index, index, str(device), fault=fault, flops_per_s=rate))
    facts = [f"{key} {value}" for key, value in node.facts.items()]
    click.echo("\n".join([*finding_lines(node.findings, ranks), ", ".join(facts)]))
    standings = {finding.standing for finding in node.findings}
    if Standing.MEND in standings or any(rank.fault for rank in ranks):
        return ExitStatus.USER_ERROR
    return ExitStatus.TRANSIENT if Standing.AGAIN in standings else ExitStatus.FINISHED


def _seat(placement: Placement) -> Seat:
    gpus = count_gpus()
    # The name that the node list has, which need not be the host's own.
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return Seat(
        node,
        placement.rank,
        placement.world_size,
        placement.local_rank,
        placement.local_world_size,
        # A rank without a GPU of its own says so in the node's report.
        choose_device(min(placement.local_rank, max(gpus - 1, 0)), gpus),
    )
