"""LAMB that is true under ZeRO: two numbers a decayed parameter are summed over ranks (`vitscale.optim.segmented`)."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitscale.optim.segmented import SegmentedOptimizer
from vitscale.optim.segments import Segment

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Update(NamedTuple):
    tensor: Tensor
    direction: Tensor
    lr: float
    adapted: bool


class Lamb(SegmentedOptimizer):
    """LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2) as DeiT III runs it: NVIDIA's FusedLAMB.

    The direction is Adam's with both bias corrections, plus weight_decay times the weights. A parameter with
    weight decay takes it times lr times its trust ratio, the weights' norm over the direction's (1 where either is
    0), which is not clipped. A parameter without decay (biases, norms, embeddings) takes it times lr alone.
    Clipping of the gradients is the engine's.

    Args:
        params: as torch's optimizers take them.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: part of the direction.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def ensure_state(self, tensor: Tensor) -> dict[str, Any]:
        """See `SegmentedOptimizer`."""
        state: dict[str, Any] = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU: reading it waits for nothing
            for key in MOMENTS:
                state[key] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
        return state

    def segment_state(self, tensor: Tensor, segment: Segment) -> dict[str, Tensor]:
        """See `SegmentedOptimizer`."""
        state = self.ensure_state(tensor)
        return {key: segment.of(state[key]) for key in MOMENTS}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient. Collective where it is bound to a group."""
        assert closure is None, "closures are not supported"
        updates = [update for group in self.param_groups for update in self._directions(group)]
        self._apply_trust_ratios([update for update in updates if update.adapted])
        for update in updates:
            update.tensor.add_(update.direction, alpha=-update.lr)

    def _directions(self, group: dict[str, Any]) -> list[_Update]:
        tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
        if not tensors:
            return []
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        states = [self.ensure_state(tensor) for tensor in tensors]
        for state in states:
            state["step"] += 1
        counts = [float(state["step"]) for state in states]
        first, second = ([state[key] for state in states] for key in MOMENTS)
        grads = [tensor.grad for tensor in tensors]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        directions = torch._foreach_sqrt(second)
        torch._foreach_div_(directions, [math.sqrt(1 - beta2**count) for count in counts])
        torch._foreach_add_(directions, group["eps"])
        torch._foreach_reciprocal_(directions)  # in place: no second copy of the partition
        torch._foreach_mul_(directions, first)
        torch._foreach_div_(directions, [1 - beta1**count for count in counts])
        if decay:
            torch._foreach_add_(directions, tensors, alpha=decay)
        return [_Update(t, d, group["lr"], decay != 0) for t, d in zip(tensors, directions, strict=True)]

    def _apply_trust_ratios(self, updates: list[_Update]) -> None:
        if not updates:
            return
        pairs = [(update, segment) for update in updates for segment in self._segments_of(update.tensor)]
        held = [(update, segment) for update, segment in pairs if segment.numel]
        directions = [segment.of(update.direction) for update, segment in held]
        zero = updates[0].tensor.new_zeros((), dtype=torch.float64)
        norms: list[Tensor] = [zero] * (2 * len(pairs))
        if held:
            weights = [segment.of(update.tensor) for update, segment in held]
            # In float64, how the parameters are cut does not show in the ratios' last bit.
            found = iter(torch._foreach_norm(weights + directions, dtype=torch.float64))
            # Parameters that this rank holds nothing of keep their places, so that the sums of all ranks line up.
            norms = [next(found) if segment.numel else zero for _, segment in pairs + pairs]
        squares = torch.stack(norms).square_()
        self._sum_over_ranks(squares)
        weight_norm, direction_norm = squares.sqrt_().view(2, -1)
        ratios = torch.where((weight_norm > 0) & (direction_norm > 0), weight_norm / direction_norm, 1.0)
        if held:
            by_pair = zip(ratios.to(directions[0].dtype).unbind(), pairs, strict=True)
            torch._foreach_mul_(directions, [ratio for ratio, (_, segment) in by_pair if segment.numel])
