"""AdamW's state, made before its first step so that a checkpoint can be read into it."""

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def ensure_adam_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """The two moments of `tensor`, shaped like it; zeros when the optimizer has not stepped yet."""
    state = optimizer.state[tensor]
    if not state:
        # torch's fused kernels keep the count on the tensor's device, the others on the CPU.
        fused = any(group.get("fused") for group in optimizer.param_groups)
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if fused else "cpu")
        for key in MOMENTS:
            state[key] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return {key: state[key] for key in MOMENTS}


def read_adam_steps(optimizer: torch.optim.Optimizer) -> int:
    """Updates made so far, which all tensors share."""
    counts = {int(state["step"]) for state in optimizer.state.values() if state}
    assert len(counts) <= 1, f"tensors have stepped differently often: {counts}"
    return counts.pop() if counts else 0


def write_adam_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Set the update count of every tensor that has state."""
    for state in optimizer.state.values():
        if state:
            state["step"].fill_(steps)
