"""What the nodes and ranks of a preflight leave behind, a JSON file each, for the choice of nodes.

DIR/<node>.json      by the node's local rank 0, as soon as it has looked at the node
DIR/rank-00003.json  by every rank, written over as it comes on through the network check
"""

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import TypeVar

R = TypeVar("R")


class Standing(StrEnum):
    """How a check came out."""

    SOUND = "sound"
    WARNING = "warning"
    """Worth a look, and no reason to leave the node out."""
    MEND = "mend"
    """A fault that somebody has to mend."""
    AGAIN = "again"
    """A fault that may be gone at the next try."""


@dataclass(frozen=True)
class Finding:
    """What one check of a node says: in a fault what is wrong, where, and the mend."""

    check: str
    standing: Standing
    said: str

    @property
    def is_fault(self) -> bool:
        """Whether the node cannot be used as it is."""
        return self.standing in (Standing.MEND, Standing.AGAIN)


@dataclass(frozen=True)
class NodeReport:
    """A node, as its local rank 0 sees it."""

    node: str
    facts: Mapping[str, str]
    """What has to be the same on all nodes of a run: versions of libraries and drivers, the GPUs."""
    findings: Sequence[Finding]

    @property
    def faults(self) -> list[Finding]:
        """The checks that did not pass."""
        return [finding for finding in self.findings if finding.is_fault]


class Stage(IntEnum):
    """How far a rank has come through the network check."""

    COMPUTE = 0
    MEETING = 1
    PAIRS = 2
    ALL_RANKS = 3
    OVER = 4


@dataclass(frozen=True)
class Pair:
    """Traffic between all ranks of this node and all ranks of another."""

    peer: str
    bus_bytes_per_s: float | None
    fault: str = ""


@dataclass(frozen=True)
class Transfer:
    """One collective among all ranks at one size."""

    collective: str
    size_bytes: int
    bus_bytes_per_s: float


@dataclass(frozen=True)
class RankReport:
    """A rank, as far as it has come."""

    node: str
    rank: int
    local_rank: int
    device: str
    stage: Stage = Stage.COMPUTE
    """What it is doing, or was doing when its fault or its end came."""
    fault: str = ""
    left_out: bool = False
    """Whether the others went on without its node, for a reason that the node's report has or because it was late."""
    flops_per_s: float | None = None
    """Matrix products of its device."""
    pairs: Sequence[Pair] = field(default_factory=tuple)
    transfers: Sequence[Transfer] = field(default_factory=tuple)


def write_report(folder: Path, report: NodeReport | RankReport) -> None:
    """Put a report into the folder, whole; the one before it is replaced.

    Raises:
        OSError: it cannot be written.
    """
    name = report.node if isinstance(report, NodeReport) else f"rank-{report.rank:05d}"
    write_whole(folder / f"{name}.json", dump_report(report) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a small file whole or not at all, in a folder that is made where it is missing.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def dump_report(report: NodeReport | RankReport) -> str:
    """A report as one line of text."""
    return json.dumps(asdict(report))


def parse_node(text: str) -> NodeReport:
    """The report of a node.

    Raises:
        ValueError, TypeError, KeyError: it was damaged.
    """
    record = json.loads(text)
    findings = tuple(Finding(f["check"], Standing(f["standing"]), f["said"]) for f in record["findings"])
    return NodeReport(record["node"], dict(record["facts"]), findings)


def parse_rank(text: str) -> RankReport:
    """The report of a rank; raises as `parse_node` does."""
    record = json.loads(text)
    parts = {
        "stage": Stage(record["stage"]),
        "pairs": tuple(Pair(**pair) for pair in record["pairs"]),
        "transfers": tuple(Transfer(**transfer) for transfer in record["transfers"]),
    }
    return RankReport(**{**record, **parts})


def read_reports(folder: Path, nodes: Sequence[str]) -> tuple[dict[str, NodeReport], list[RankReport]]:
    """The reports of these nodes and of their ranks; one that is missing or damaged is not among them."""
    found = {node: _read(folder / f"{node}.json", parse_node) for node in nodes}
    ranks = [_read(file, parse_rank) for file in sorted(folder.glob("rank-*.json"))]
    return (
        {node: report for node, report in found.items() if report is not None},
        [report for report in ranks if report is not None and report.node in found],
    )


def one_line(error: BaseException) -> str:
    """What an error says, without the C++ traces that torch puts below."""
    return str(error).strip().partition("\n")[0].rstrip(".: ") or type(error).__name__


def _read(file: Path, parse: Callable[[str], R]) -> R | None:
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError):
        return None
