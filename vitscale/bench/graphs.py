"""Graphs that compiled blocks become at each ZeRO stage, the breaks between them, and the gathers of a step."""

from dataclasses import dataclass

import torch
from torch._dynamo.utils import counters

from vitscale.bench.small_engine import small_engine
from vitscale.engine import record_communication
from vitscale.ranks.groups import Ranks

_WARMUP_STEPS = 2


@dataclass(frozen=True)
class GraphRow:
    """Of one ZeRO stage."""

    zero_stage: int
    depth: int
    graphs: int
    """Compiled in all steps; blocks of one shape share theirs."""
    breaks: int
    gathers: int
    """All-gathers of the step after those that compile."""


def count_graphs(ranks: Ranks, zero_stage: int, depth: int = 3) -> GraphRow:
    """Train a small ViT with compiled blocks for three steps. Collective; forgets what was compiled before."""
    torch.compiler.reset()
    counters.clear()
    engine, micro_batches, _ = small_engine(ranks, depth=depth, zero_stage=zero_stage, precision="fp32", compile=True)
    for _ in range(_WARMUP_STEPS):
        engine.train_step(micro_batches, 1e-4)
    with record_communication() as record:
        engine.train_step(micro_batches, 1e-4)
    gathers = record.by_kind["all_gather"].calls if "all_gather" in record.by_kind else 0
    breaks = sum(counters["graph_break"].values())
    return GraphRow(zero_stage, depth, counters["stats"]["unique_graphs"], breaks, gathers)
