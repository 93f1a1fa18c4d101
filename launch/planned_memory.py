"""Whether a run fits into the memory of its GPUs, by `vitscale plan`."""

import importlib
from collections.abc import Mapping
from typing import Any

from job_request import JobRequest

from vitscale.config import Config
from vitscale.errors import LaunchError

GB = 1e9
RESERVE_GB = 4.0
"""What CUDA, NCCL and fragmentation may take: the default of `vitscale plan`."""


def plan_of(config: Config, request: JobRequest, nodes: int) -> dict[str, Any]:
    """The plan of a run on so many nodes, as plain values.

    Raises:
        ConfigError: the config cannot run on so many ranks.
    """
    device = "cpu" if request.gpus_per_node is None else "cuda"
    found: dict[str, Any] = _planner().draw_plan(
        config, nodes * request.ranks_per_node, request.hbm_gb, RESERVE_GB, device, request.ranks_per_node
    )
    return found


def plan_lines(plan: Mapping[str, Any]) -> str:
    """The plan as `vitscale plan` prints it: the resolved config first, what lost nodes leave last."""
    planner = _planner()
    return "\n\n".join(filter(None, (planner.plan_text(plan), planner.elastic_text(plan))))


def check_memory(plan: Mapping[str, Any]) -> None:
    """See that the largest step fits, where the GPU's memory is known.

    Raises:
        LaunchError: it does not; the message names what would.
    """
    if plan["hbm_gb"] is None:
        return
    for phase in plan["phases"]:
        rows = phase["activations"]
        chosen = next(row for row in rows if row["chosen"])
        if chosen["fits"]:
            continue
        mends = [f"batch.micro_batch={chosen['largest_dividing']}"] if chosen["largest_dividing"] else []
        mends += [
            f"engine.activation_checkpointing={row['recompute']}" for row in rows if row["fits"] and not row["estimate"]
        ][:1]
        mends += ["more nodes", "a higher engine.zero_stage"]
        raise LaunchError(
            f"a step needs {chosen['step_bytes'] / GB:.1f} GB on each of {plan['gpus']} GPUs of {plan['hbm_gb']:g} GB "
            f"less {plan['reserve_gb']:g} GB for CUDA and NCCL: use {', '.join(mends)}, see vitscale plan, or go on "
            "with --force"
        )


def _planner() -> Any:
    # Found when it is needed: it imports torch, which takes longer than all the rest of a submission.
    return importlib.import_module("vitscale.cli.plan")
