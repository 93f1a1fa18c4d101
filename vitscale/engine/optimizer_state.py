"""The state of any of our optimizers, made before its first step so that a checkpoint can be read into it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitscale.engine.protocol import MASTER, Fragment
from vitscale.optim import Flat, Segment, SegmentedOptimizer

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
SGD_MOMENTUM = "momentum_buffer"

FlatValues = Callable[[Tensor], Mapping[str, Tensor]]
"""A flat tensor -> further values shaped like it, by their keys, such as its moving average."""


def fragments_of(
    flats: Sequence[Flat],
    optimizer: torch.optim.Optimizer,
    *,
    rank: int,
    world_size: int,
    replicated: bool,
    further: FlatValues | None = None,
) -> list[Fragment]:
    """The training state that this rank holds: one fragment a segment, and one a parameter with state of its own.

    Args:
        flats: what the optimizer updates.
        optimizer: torch's AdamW or SGD, or one of ours.
        rank: of this process.
        world_size: number of ranks.
        replicated: whether each rank holds the same; they then take turns in writing it.
        further: values beside the weights and the optimizer's state.
    """
    found: list[Fragment] = []
    for index, flat in enumerate(flats):
        mine = index % world_size == rank
        whole = {MASTER: flat.tensor.detach(), **(further(flat.tensor) if further else {})}
        for segment in flat.segments:
            if segment.numel:
                values = {key: segment.of(value) for key, value in whole.items()}
                values |= _segment_state(optimizer, flat.tensor, segment)
                found.append(Fragment(segment.name, segment.offset, values, mine or not replicated))
        if isinstance(optimizer, SegmentedOptimizer):
            state = optimizer.parameter_state(flat.tensor)
            found += [Fragment(name, 0, values, mine) for name, values in state]
    return found


def write_optimizer_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Set the update count of every tensor whose state has one."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)


def _segment_state(optimizer: torch.optim.Optimizer, tensor: Tensor, segment: Segment) -> dict[str, Tensor]:
    if isinstance(optimizer, SegmentedOptimizer):
        return optimizer.segment_state(tensor, segment)
    state = (
        _ensure_sgd(optimizer, tensor) if isinstance(optimizer, torch.optim.SGD) else _ensure_adam(optimizer, tensor)
    )
    return {key: segment.of(value) for key, value in state.items()}


def _ensure_adam(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    state: dict[str, Any] = optimizer.state[tensor]
    if not state:
        # torch's fused kernels keep the count on the tensor's device, the others on the CPU.
        fused = any(group.get("fused") for group in optimizer.param_groups)
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if fused else "cpu")
        for key in ADAM_MOMENTS:
            state[key] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return {key: state[key] for key in ADAM_MOMENTS}


def _ensure_sgd(optimizer: torch.optim.SGD, tensor: Tensor) -> dict[str, Tensor]:
    if not any(group["momentum"] for group in optimizer.param_groups):
        return {}
    state = optimizer.state[tensor]
    # torch starts from the first gradient, which is what zeros come to. None is what a step without gradient leaves.
    if state.get(SGD_MOMENTUM) is None:
        state[SGD_MOMENTUM] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return {SGD_MOMENTUM: state[SGD_MOMENTUM]}
