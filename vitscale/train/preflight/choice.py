"""Which nodes of a job are sound, and which of them the run gets: decided without touching anything."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vitscale.errors import ExitStatus
from vitscale.train.preflight import rules
from vitscale.train.preflight.reports import Standing
from vitscale.train.preflight.rules import Evidence

_FAULTS = (
    rules.missing,
    rules.failed_checks,
    rules.other_facts,
    rules.silent_ranks,
    rules.broken_devices,
    rules.unmet,
    rules.late,
    rules.dead_pairs,
    rules.last_stage,
)
_SLOWNESS = (rules.slow_devices, rules.slow_networks)
ENOUGH_SOUND = 0.75
"""Of the nodes that a run gets with slow ones among them: where it gets so many without, they are left out. A slow one
holds all others up, but not by as much as half the nodes would."""


@dataclass(frozen=True)
class Verdict:
    """What the evidence comes to for one node, in lines of text."""

    node: str
    faults: tuple[str, ...] = ()
    """For which it is not used."""
    slow: tuple[str, ...] = ()
    """For which it is used only where there are too few others."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What becomes of the nodes of a job."""

    used: tuple[str, ...] = ()
    """In the order of the node list; none where the run cannot start."""
    status: ExitStatus = ExitStatus.FINISHED
    reason: str = ""
    """One line, where the run cannot start."""


def judge(evidence: Evidence) -> list[Verdict]:
    """What speaks against each node, in the order of the node list."""

    def lines(node: str, found: Sequence[tuple[str, str]]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line for about, line in found if about == node))

    faults = [line for rule in _FAULTS for line in rule(evidence)]
    slowness = [line for rule in _SLOWNESS for line in rule(evidence)]
    told = list(rules.warnings(evidence))
    return [Verdict(node, lines(node, faults), lines(node, slowness), lines(node, told)) for node in evidence.nodes]


def choose(evidence: Evidence, wanted: int, least: int, usable: Callable[[int], int]) -> Choice:
    """The nodes that the run gets: sound ones as they come in the list, slow ones only where those are far too few.

    Args:
        evidence: all of it.
        wanted: nodes that the run should have.
        least: nodes that it can do with.
        usable: the most nodes that the run's batch splits on, of so many; 0 for none.

    Returns:
        A choice of no nodes with a user's error where the same check fails everywhere, as it would at any other try;
        as worth another try where too few nodes are sound or they do not work together.
    """
    if shared := rules.shared_faults(evidence):
        mend = any(fault.standing == Standing.MEND for fault in shared)
        status = ExitStatus.USER_ERROR if mend else ExitStatus.TRANSIENT
        return Choice(status=status, reason=f"on every node: {shared[0].said}")
    if fault := rules.network_fault(evidence):
        return Choice(status=ExitStatus.TRANSIENT, reason=fault)
    verdicts = judge(evidence)
    sound = [v.node for v in verdicts if not v.faults and not v.slow]
    slow = [v.node for v in verdicts if not v.faults and v.slow]
    taken, with_slow = (candidates[: usable(min(wanted, len(candidates)))] for candidates in (sound, [*sound, *slow]))
    if len(taken) < max(least, ENOUGH_SOUND * len(with_slow)):
        taken = with_slow
    if len(taken) >= least:
        return Choice(tuple(node for node in evidence.nodes if node in taken))
    return Choice(
        status=ExitStatus.TRANSIENT,
        reason=f"{len(sound) + len(slow)} of {len(verdicts)} nodes can be used, the run needs {least}: mend the "
        "others, ask for more with --spare-nodes, or for fewer with --min-nodes",
    )
