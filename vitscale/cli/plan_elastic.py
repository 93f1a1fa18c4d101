"""What a planned run does when nodes are lost: on fewer ranks that divide the batch, or padded on all that are left."""

from collections.abc import Mapping
from typing import Any

from vitscale.cli.plan_text import aligned
from vitscale.config import BatchSection, BatchSplit, ScheduleSection, split_batch, usable_ranks


def elastic_plan(
    schedule: ScheduleSection, batch: BatchSection, split: BatchSplit, gpus_per_node: int
) -> list[dict[str, Any]]:
    """One row for each of some numbers of nodes that may be left, half of them at least; as plain values.

    Args:
        schedule, batch: of the config.
        split: of the last phase on all nodes.
        gpus_per_node: ranks that go with a node.
    """
    nodes = split.world_size // gpus_per_node
    lost = [1 << power for power in range(nodes.bit_length()) if 1 << power <= nodes / 2]
    divided, padded = (batch.model_copy(update={"pad": pad}) for pad in (False, True))

    def on(own: BatchSection, available: int) -> dict[str, Any] | None:
        ranks = usable_ranks(schedule, own, available, gpus_per_node)
        if not ranks:
            return None
        found = split_batch(own, ranks)
        return {
            "gpus": ranks,
            "micro_batch": found.micro_batch,
            "grad_accum": found.grad_accum,
            "masked": found.padding / found.places,
            "longer": found.rank_batch / split.rank_batch,
        }

    return [
        {"nodes": left, "divided": on(divided, left * gpus_per_node), "padded": on(padded, left * gpus_per_node)}
        for left in (nodes - gone for gone in lost)
    ]


def elastic_text(plan: Mapping[str, Any]) -> str:
    """The section for a person; empty where the run has a single node."""
    if not plan["if_lost"]:
        return ""
    head = ["  nodes left", "| pad=false: GPUs", "micro-steps", "longer", "| pad=true: GPUs", "micro-steps", "longer"]
    rows = [[*head, "masked"]]
    for row in plan["if_lost"]:
        divided, padded = _cells(row["divided"]), _cells(row["padded"])
        rows.append([f"  {row['nodes']}", *divided, *padded, f"{100 * row['padded']['masked']:.1f} %"])
    pad, size = str(plan["config"]["batch"]["pad"]).lower(), plan["gpus_per_node"]
    title = f"if nodes of {size} GPUs are lost (here batch.pad={pad}; longer: places of a GPU, against those of now)"
    return "\n".join([title, *aligned(rows)])


def _cells(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["| none", "-", "-"]
    return [f"| {found['gpus']}", f"{found['grad_accum']} x {found['micro_batch']}", f"x {found['longer']:.2f}"]
