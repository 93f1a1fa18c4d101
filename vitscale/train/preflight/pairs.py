"""Who talks to whom in the network check, and how its figures are read."""

from collections.abc import Mapping, Sequence
from statistics import median_high
from typing import Literal

from vitscale.train.preflight.reports import Pair

Collective = Literal["all-reduce", "all-gather"]

ROUNDS = 3
"""Each node meets so many others, one after the other: enough to tell a slow node from one that met a slow node."""
SLOW_NETWORK = 0.5
"""A node is slow when no pair of it comes to this share of what nodes reach."""
SLOW_DEVICE: Mapping[str, float] = {"cuda": 0.8, "cpu": 0.25}
"""A device is slow below this share of the middle one: GPUs of a kind differ by a few per cent; cores are shared with
whatever else the machine does."""


def rounds_of_pairs(nodes: Sequence[str], count: int = ROUNDS) -> list[list[tuple[str, str]]]:
    """The first rounds of a round-robin tournament (the circle method): in each round a node has one peer at most, and
    never one that it has met before.

    Args:
        nodes: an odd number of them leaves one without a peer in each round.
        count: rounds; fewer where everybody has met everybody.
    """
    circle: list[str | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    rounds = []
    for _ in range(min(count, len(circle) - 1)):
        half = len(circle) // 2
        met = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(one, other) for one, other in met if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def bus_bandwidth(collective: Collective, size_bytes: int, time_s: float, ranks: int) -> float:
    """Bytes a second that each rank's link carries, whatever the number of ranks.

    As nccl-tests defines it (doc/PERFORMANCE.md): the size over the time, which is the algorithm's bandwidth, times
    2 (n - 1) / n for all-reduce and (n - 1) / n for all-gather, of which the size is what each rank has in the end.
    """
    factor = 2.0 if collective == "all-reduce" else 1.0
    return size_bytes / time_s * factor * (ranks - 1) / ranks


def slow_nodes(best_bytes_per_s: Mapping[str, float]) -> set[str]:
    """The nodes whose best pair is far below what nodes reach.

    The best pair of a sound node is one with another sound node, so the middle one of the nodes' best is what the
    network gives, as long as most nodes are sound. The middle of all pairs would not do: with one slow node among
    three, most pairs are slow.
    """
    if not best_bytes_per_s:
        return set()
    usual = median_high(best_bytes_per_s.values())
    return {node for node, rate in best_bytes_per_s.items() if rate < SLOW_NETWORK * usual}


def cut_off(pairs: Mapping[str, Sequence[Pair]]) -> set[str]:
    """The nodes that had no traffic with any of the peers that are still there.

    Args:
        pairs: of each node that is still there.
    """
    found = set()
    for node, own in pairs.items():
        peers = {pair.peer for pair in own if pair.peer in pairs}
        if peers and peers == {pair.peer for pair in own if pair.fault and pair.peer in pairs}:
            found.add(node)
    return found
