"""The network check: first pairs of nodes, then all that work, together.

Each stage has a process group of its own, so that a node that fails in one costs its peer that one and no other.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from vitscale.train.preflight.gates import Roster, all_come, arrivals, arrive, await_roster, pass_gate, there
from vitscale.train.preflight.measure import transfer_rate
from vitscale.train.preflight.pairs import Collective, cut_off, rounds_of_pairs
from vitscale.train.preflight.reports import Pair, Stage, Transfer, dump_report, one_line, parse_rank
from vitscale.train.preflight.seat import Limits, Progress, Seat

PAIR_BYTES: Mapping[str, int] = {"cuda": 64 << 20, "cpu": 4 << 20}
SIZES_BYTES: Mapping[str, tuple[int, ...]] = {
    "cuda": (1 << 20, 16 << 20, 256 << 20),
    "cpu": (1 << 16, 1 << 20, 4 << 20),
}
"""Of what each rank has in the end: one that latency decides, one between, one that bandwidth decides."""
_SLACK_S = 2.0
"""Between ranks that have passed the same gate."""
COLLECTIVES: tuple[Collective, ...] = ("all-reduce", "all-gather")


def talk(seat: Seat, store: Store, roster: Roster, progress: Progress, limits: Limits) -> None:
    """Measure this rank's part of the network check, and write it down as it comes; raises OSError.

    Args:
        seat: this rank's.
        store: of all ranks.
        roster: who takes part, this rank among them.
        progress: of this rank.
        limits: on every wait.
    """
    leader = next(iter(roster.values()))[0]
    here = sum(map(len, roster.values()))
    progress.note(stage=Stage.PAIRS)
    for number, met in enumerate(rounds_of_pairs(list(roster))):
        for pair in met:
            if seat.node in pair:
                found = _talk_in_pair(seat, store, roster, pair, limits)
                progress.note(pairs=(*progress.report.pairs, found))
        # All begin a round together: nobody may wait long for a peer that is still busy with another.
        here = pass_gate(store, f"round-{number}", here, 1.5 * limits.pair_s, leads=seat.rank == leader)
    sound = _agree(seat, store, roster, progress, limits)
    progress.note(stage=Stage.ALL_RANKS)
    try:
        if seat.node in sound:
            progress.note(transfers=_talk_together(seat, store, sound, limits))
        progress.note(stage=Stage.OVER)
    except RuntimeError as error:
        progress.note(fault=one_line(error))
    arrive(store, "over")


def _talk_in_pair(seat: Seat, store: Store, roster: Roster, pair: tuple[str, str], limits: Limits) -> Pair:
    one, other = pair
    peer = other if seat.node == one else one
    try:
        with _group(seat, store, f"{one} {other}", [*roster[one], *roster[other]], limits.pair_s):
            return Pair(peer, transfer_rate("all-reduce", PAIR_BYTES[seat.device.type], seat.device))
    except RuntimeError as error:
        return Pair(peer, None, one_line(error))


def _agree(seat: Seat, store: Store, roster: Roster, progress: Progress, limits: Limits) -> Roster:
    """The nodes that go on together, as the first rank sees them."""
    leader = next(iter(roster.values()))[0]
    if seat.rank == roster[seat.node][0]:
        store.set(f"pairs/{seat.rank}", dump_report(progress.report))
        arrive(store, "paired")
    if seat.rank == leader:
        arrivals(store, "paired", len(roster), _SLACK_S)
        found = [parse_rank(text) for text in there(store, "pairs", seat.world_size)]
        pairs = {report.node: report.pairs for report in found}
        gone = cut_off(pairs) | (roster.keys() - pairs.keys())
        store.set("sound", json.dumps({node: ranks for node, ranks in roster.items() if node not in gone}))
    return await_roster(store, "sound", limits.pair_s + 2 * _SLACK_S)


def _talk_together(seat: Seat, store: Store, sound: Roster, limits: Limits) -> tuple[Transfer, ...]:
    ranks = [rank for own in sound.values() for rank in own]
    if len(ranks) == 1:
        return ()
    with _group(seat, store, "all", ranks, limits.all_ranks_s):
        return tuple(
            Transfer(collective, size_bytes, transfer_rate(collective, size_bytes, seat.device))
            for collective in COLLECTIVES
            for size_bytes in SIZES_BYTES[seat.device.type]
        )


@contextlib.contextmanager
def _group(seat: Seat, store: Store, name: str, ranks: Sequence[int], limit_s: float) -> Iterator[None]:
    """A process group of some ranks; those that do not come in time are an error."""
    # NCCL would wait without end for ranks that hang elsewhere, and for its first rank's word as long as the store.
    if not all_come(store, f"group/{name}", len(ranks), limit_s):
        raise RuntimeError("not all ranks came")
    store.set_timeout(timedelta(seconds=limit_s))
    try:
        dist.init_process_group(
            "nccl" if seat.device.type == "cuda" else "gloo",
            store=PrefixStore(name, store),
            rank=list(ranks).index(seat.rank),
            world_size=len(ranks),
            timeout=timedelta(seconds=limit_s),
        )
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
