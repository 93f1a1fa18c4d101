"""The ladder of `vitscale bench gpu`: its levers in order, and what is told of each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Rung:
    """One lever; of several `alternatives` the fastest stays."""

    name: str
    alternatives: tuple[Mapping[str, Any], ...]
    stays: bool = True
    """Whether the rungs above it keep it."""


def _rung(name: str, stays: bool = True, **sections: Mapping[str, Any]) -> Rung:
    return Rung(name, (sections,), stays)


LADDER: tuple[Rung, ...] = (
    _rung("eager, class token, unfused AdamW", model={"pool": "token"}, optim={"fused": False}),
    _rung("each block compiled", engine={"compile": True}),
    _rung("256 tokens: mean pooling, no class token", model={"pool": "avg"}),
    Rung(
        "best attention kernel",
        tuple({"engine": {"attention": kernel}} for kernel in ("auto", "cudnn", "flash", "efficient")),
    ),
    _rung("fused AdamW", optim={"fused": None}),
    _rung("head padded to 64", model={"head_multiple": 64}),
    _rung("drop path 0.4 as mask", stays=False, model={"drop_path_rate": 0.4}),
    _rung("drop path 0.4 as subset", stays=False, model={"drop_path_rate": 0.4, "drop_path_mode": "subset"}),
    _rung("selective recomputation", stays=False, engine={"activation_checkpointing": "selective"}),
    _rung("full recomputation", stays=False, engine={"activation_checkpointing": "full"}),
    _rung("float8 products", stays=False, engine={"fp8": True}),
)


@dataclass(frozen=True)
class RungResult:
    """What a rung comes to; None for what the device does not tell."""

    model: str
    rung: str
    micro_batch: int
    images_per_s: float | None = None
    mfu: float | None = None
    executed_mfu: float | None = None
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    loss: float | None = None
    failed: str = ""
    """Why it could not run."""


HEADER = (
    "| rung | images/s | MFU | executed MFU | peak, GB | planned, GB | peak / planned |",
    "|---|--:|--:|--:|--:|--:|--:|",
)


def table_row(result: RungResult) -> str:
    """A row under `HEADER`."""
    if result.failed:
        return f"| {result.rung} | {result.failed} | | | | | |"
    peak, planned = result.peak_bytes, result.planned_bytes
    cells = [
        f"{result.images_per_s:.1f}",
        *("" if share is None else f"{share:.1%}" for share in (result.mfu, result.executed_mfu)),
        *("" if held is None else f"{held / 1e9:.1f}" for held in (peak, planned)),
        f"{peak / planned:.3f}" if peak and planned else "",
    ]
    return f"| {result.rung} | {' | '.join(cells)} |"


def as_json(results: Sequence[RungResult]) -> str:
    """All results as JSON."""
    return json.dumps([asdict(result) for result in results], indent=1) + "\n"
