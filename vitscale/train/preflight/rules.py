"""What the reports of a preflight say against a node: one rule a function, each giving pairs of a node and a line."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high

from vitscale.train.preflight.pairs import SLOW_DEVICE, cut_off, slow_nodes
from vitscale.train.preflight.reports import Finding, NodeReport, RankReport, Stage, Standing

MAY_DIFFER = frozenset({"driver"})
"""Facts that clusters have in two versions for a while, and that work together."""
OF_ONE_NODE = frozenset({"devices", "shared memory"})
"""Checks that another node may pass."""
_NONE = "none"
"""A fact that a node does not have."""
_DOING = {
    Stage.MEETING: "while it waited for the others",
    Stage.COMPUTE: "in the check of its device",
    Stage.PAIRS: "in the network check by pairs",
    Stage.ALL_RANKS: "in the network check among all ranks",
}

Lines = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Evidence:
    """All that is known when the nodes are judged."""

    nodes: Sequence[str]
    """Of the job, in order."""
    reports: Mapping[str, NodeReport]
    """Of the nodes that have one."""
    ranks: Sequence[RankReport]
    tasks_per_node: int

    def of(self, node: str) -> list[RankReport]:
        """The node's ranks."""
        return [rank for rank in self.ranks if rank.node == node]

    @property
    def stuck(self) -> list[RankReport]:
        """Ranks that neither came to the end nor said why."""
        return [r for r in self.ranks if r.stage != Stage.OVER and not r.fault and not r.left_out]

    def failed_in(self, stage: Stage) -> list[RankReport]:
        """Ranks that say why they did not come further than a stage."""
        return [rank for rank in self.ranks if rank.stage == stage and rank.fault]


def missing(evidence: Evidence) -> Lines:
    """Nodes without a report."""
    for node in evidence.nodes:
        if node not in evidence.reports:
            yield node, "no report: it did not start vitscale, or cannot write where the others do: see the job's log"


def failed_checks(evidence: Evidence) -> Lines:
    """What nodes found wrong with themselves."""
    for node, report in evidence.reports.items():
        yield from ((node, finding.said) for finding in report.faults)


def warnings(evidence: Evidence) -> Lines:
    """What nodes found worth telling, and facts that may differ but do."""
    for node, report in evidence.reports.items():
        yield from ((node, f.said) for f in report.findings if f.standing == Standing.WARNING)
    yield from _differing(evidence, MAY_DIFFER)
    broken = {node for node, _ in dead_pairs(evidence)} | {rank.node for rank in evidence.stuck}
    for rank in evidence.ranks:
        for pair in rank.pairs:
            if pair.fault and rank.local_rank == 0 and not {rank.node, pair.peer} & broken:
                yield rank.node, f"no traffic with {pair.peer}: {pair.fault}"


def other_facts(evidence: Evidence) -> Lines:
    """Versions and devices that are not those of most nodes."""
    known = {key for report in evidence.reports.values() for key in report.facts}
    yield from _differing(evidence, known - MAY_DIFFER)


def silent_ranks(evidence: Evidence) -> Lines:
    """Ranks that never began, hung, or were killed."""
    for node in evidence.reports:
        here = {rank.local_rank for rank in evidence.of(node)}
        if absent := [str(local) for local in range(evidence.tasks_per_node) if local not in here]:
            yield node, f"no word from its local rank {', '.join(absent)}: see the job's log"
    for rank in evidence.stuck:
        yield rank.node, f"{_name(rank)} hung or was killed {_DOING[rank.stage]}: see the job's log and that device"


def broken_devices(evidence: Evidence) -> Lines:
    """Devices that do not work."""
    for rank in evidence.failed_in(Stage.COMPUTE):
        yield rank.node, f"{_name(rank)}: {rank.fault}"


def unmet(evidence: Evidence) -> Lines:
    """Ranks that did not find rank 0 or lost it, or rank 0's node where most others did not find it.

    Where rank 0 itself did not come through, that is no verdict on the others.
    """
    lost = evidence.failed_in(Stage.MEETING) + evidence.failed_in(Stage.PAIRS)
    failed = {rank.node: rank for rank in lost}
    zero = next((rank for rank in evidence.ranks if rank.rank == 0), None)
    if zero is None or zero in evidence.stuck or zero in evidence.failed_in(Stage.COMPUTE):
        return  # what is wrong with rank 0 is told already
    if zero in lost:
        yield zero.node, f"{_name(zero)}: {zero.fault}"
        return
    others = [node for node in evidence.reports if node != zero.node]
    if len(failed) >= 2 and 2 * len(failed) > len(others):
        yield zero.node, f"{len(failed)} of {len(others)} nodes do not reach it: see its network interface and its name"
        return
    yield from ((node, f"{_name(rank)}: {rank.fault}") for node, rank in failed.items())


def late(evidence: Evidence) -> Lines:
    """Nodes that the others did not wait for, and that have nothing else against them."""
    rules = (failed_checks, other_facts, silent_ranks, broken_devices)
    explained = {node for rule in rules for node, _ in rule(evidence)}
    for node in {rank.node for rank in evidence.ranks if rank.left_out} - explained:
        yield node, "came too late for the network check: see what makes it slow to start"


def dead_pairs(evidence: Evidence) -> Lines:
    """Nodes that had no traffic with any peer, but for peers that hung or were killed."""
    gone = {rank.node for rank in evidence.stuck}
    pairs = {
        node: [p for rank in evidence.of(node) for p in rank.pairs] for node in evidence.reports if node not in gone
    }
    for node in cut_off(pairs):
        peers = sorted({pair.peer for pair in pairs[node]} - gone)
        fault = next(pair.fault for pair in pairs[node] if pair.fault)
        yield node, f"no traffic with {', '.join(peers)} ({fault}): see its network"


def last_stage(evidence: Evidence) -> Lines:
    """Ranks that failed in the last check where others came through it, and none hung."""
    failed = evidence.failed_in(Stage.ALL_RANKS)
    hung = any(rank.stage == Stage.ALL_RANKS for rank in evidence.stuck)
    if not hung and any(rank.transfers for rank in evidence.ranks):
        yield from ((rank.node, f"{_name(rank)}: {rank.fault}") for rank in failed)


def network_fault(evidence: Evidence) -> str:
    """What is wrong with the network of nodes none of which can be named; empty where nothing is."""
    failed = evidence.failed_in(Stage.ALL_RANKS)
    named = any(rank.stage == Stage.ALL_RANKS for rank in evidence.stuck)
    if not failed or named or any(rank.transfers for rank in evidence.ranks):
        return ""
    return f"the nodes work by pairs but not together: {_name(failed[0])}: {failed[0].fault}: see the network"


def slow_devices(evidence: Evidence) -> Lines:
    """Devices far below the middle one."""
    rates = {rank: rank.flops_per_s for rank in evidence.ranks if rank.flops_per_s is not None}
    if not rates:
        return
    usual = median_high(rates.values())
    for rank, rate in rates.items():
        if rate < SLOW_DEVICE[rank.device.partition(":")[0]] * usual:
            told = f"{rate / 1e12:.3g} TFLOP/s of matrix products, others {usual / 1e12:.3g}"
            yield rank.node, f"{_name(rank)} is slow: {told}: see its temperature, its clocks and who else uses it"


def slow_networks(evidence: Evidence) -> Lines:
    """Nodes whose traffic is slow with every peer."""
    best = best_pairs(evidence)
    for node in slow_nodes(best):
        told = f"{best[node] / 1e9:.3g} GB/s at best, others {median_high(best.values()) / 1e9:.3g}"
        yield node, f"its network is slow: {told}: see its links and cables"


def best_pairs(evidence: Evidence) -> dict[str, float]:
    """Of each node the bus bandwidth with the peer that it does best with, where there was any traffic."""
    best: dict[str, float] = {}
    for rank in evidence.ranks:
        for pair in rank.pairs:
            if pair.bus_bytes_per_s is not None:
                best[rank.node] = max(best.get(rank.node, 0.0), pair.bus_bytes_per_s)
    return best


def shared_faults(evidence: Evidence) -> list[Finding]:
    """The checks that fail on every node that reported, most nodes of the job being among them: no node's fault.

    In a job of one node that is no evidence about checks that another node may pass.
    """
    reports = list(evidence.reports.values())
    if 2 * len(reports) <= len(evidence.nodes):
        return []
    first, *others = reports
    excused = OF_ONE_NODE if len(evidence.nodes) == 1 else frozenset()
    shared = [f for f in first.faults if all(f.check in {fault.check for fault in r.faults} for r in others)]
    return [fault for fault in shared if fault.check not in excused]


def usual_facts(evidence: Evidence) -> dict[str, str]:
    """Of each fact what most nodes say, or that they have none; of equally many the node's that comes first."""
    facts = [evidence.reports[node].facts for node in evidence.nodes if node in evidence.reports]
    known = {key for own in facts for key in own}
    return {key: Counter(own.get(key, _NONE) for own in facts).most_common(1)[0][0] for key in known}


def _differing(evidence: Evidence, keys: set[str] | frozenset[str]) -> Lines:
    usual = usual_facts(evidence)
    for node, report in evidence.reports.items():
        for key in sorted(keys & usual.keys()):
            own = report.facts.get(key, _NONE)
            if own != usual[key]:
                yield node, f"{key} {own}, most nodes have {usual[key]}: load the same modules or the same image there"


def _name(rank: RankReport) -> str:
    return f"rank {rank.rank} ({rank.device})"
