"""One rank's way through the preflight: look at the node, try the device, meet the others, talk.

Rank 0 keeps the store in which the ranks meet, and decides who takes part, so that all go by the same list.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from vitscale.errors import LaunchError
from vitscale.train.preflight import rules
from vitscale.train.preflight.gates import Roster, arrivals, arrive, await_roster, there
from vitscale.train.preflight.measure import try_device
from vitscale.train.preflight.reports import (
    NodeReport,
    RankReport,
    Stage,
    dump_report,
    one_line,
    parse_node,
    parse_rank,
    write_report,
)
from vitscale.train.preflight.rules import Evidence
from vitscale.train.preflight.seat import Limits, Progress, Seat
from vitscale.train.preflight.talking import talk


def attend(
    seat: Seat,
    folder: Path,
    *,
    open_store: Callable[[], Store],
    inspect: Callable[[], NodeReport],
    limits: Limits,
) -> RankReport:
    """Everything a rank does in a preflight. What comes of it is in the folder, and is given back too.

    Args:
        seat: this rank's.
        folder: of the reports, which all nodes see.
        open_store: begins the store on rank 0 and finds it on the others; its RuntimeError or LaunchError is a fault
            of this rank.
        inspect: looks at the node; asked on its local rank 0.
        limits: on every wait.

    Raises:
        OSError: the folder cannot be written.
    """
    progress = Progress(folder, seat)
    # Rank 0 opens it before it looks at its node: the others would not wait for ever.
    store = _opened(open_store, progress) if seat.rank == 0 else None
    own = None
    if seat.local_rank == 0:
        with progress.bounded(limits.inspection_s):
            own = inspect()
        write_report(folder, own)
    with progress.bounded(limits.device_s):
        rate, fault = try_device(seat.device)
    fault = progress.report.fault or fault
    progress.note(flops_per_s=rate, fault=fault, stage=Stage.COMPUTE if fault else Stage.MEETING)
    if store is None and seat.rank != 0:
        store = _opened(open_store, progress)
    if store is not None:
        check_network(seat, store, own, progress, limits)
    return progress.report


def check_network(seat: Seat, store: Store, own: NodeReport | None, progress: Progress, limits: Limits) -> None:
    """Meet the other ranks and measure how fast they talk.

    Args:
        seat: this rank's.
        store: of all ranks.
        own: the node's report, on its local rank 0.
        progress: of this rank, which has checked its device.
        limits: on every wait.
    """
    try:
        roster = _meet(seat, store, own, progress, limits)
    except RuntimeError as error:
        progress.note(fault=progress.report.fault or f"rank 0 is gone, or does not answer: {one_line(error)}")
        return
    takes_part = seat.node in roster
    if takes_part:
        try:
            with progress.bounded(limits.total_s):
                talk(seat, store, roster, progress, limits)
        except RuntimeError as error:
            progress.note(fault=f"rank 0 is gone, or the rank that leads: {one_line(error)}")
    else:
        progress.note(left_out=True)
    if seat.rank == 0:  # the store goes with its process
        everyone = sum(map(len, roster.values()))
        arrivals(store, "over", everyone, limits.pair_s if takes_part else limits.total_s)


def draw_roster(reports: Mapping[str, NodeReport], ranks: Sequence[RankReport], local_world_size: int) -> Roster:
    """Who takes part: the ranks of the nodes that are whole, sound and like the others, in the order of ranks."""
    nodes = list(dict.fromkeys(rank.node for rank in sorted(ranks, key=lambda rank: rank.rank)))
    evidence = Evidence(nodes, reports, ranks, local_world_size)
    unfit = {node for rule in (rules.failed_checks, rules.other_facts) for node, _ in rule(evidence)}
    unfit |= {rank.node for rank in ranks if rank.fault}
    own = {node: sorted(rank.rank for rank in evidence.of(node)) for node in nodes if node in reports}
    return {node: there for node, there in own.items() if node not in unfit and len(there) == local_world_size}


def _opened(open_store: Callable[[], Store], progress: Progress) -> Store | None:
    try:
        return open_store()
    except (RuntimeError, LaunchError) as error:
        if not progress.report.fault:
            progress.note(fault=f"no way to rank 0: {one_line(error)}")
        return None


def _meet(seat: Seat, store: Store, own: NodeReport | None, progress: Progress, limits: Limits) -> Roster:
    if own is not None:
        store.set(f"node/{seat.rank}", dump_report(own))
    store.set(f"rank/{seat.rank}", dump_report(progress.report))
    arrive(store, "arrived")
    if seat.rank == 0:
        arrivals(store, "arrived", seat.world_size, limits.wait_s)
        ranks = [parse_rank(text) for text in there(store, "rank", seat.world_size)]
        reports = [parse_node(text) for text in there(store, "node", seat.world_size)]
        store.set("roster", json.dumps(draw_roster({r.node: r for r in reports}, ranks, seat.local_world_size)))
    return await_roster(store, "roster", limits.coming_s)
