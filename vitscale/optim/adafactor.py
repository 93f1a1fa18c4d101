"""Adafactor as in "Scaling Vision Transformers", true under ZeRO (`vitscale.optim.segmented`).

Summed over ranks are the means of the squared gradients over rows and columns; every rank then keeps all factors
(6 million numbers for ViT-G, whose attention is factored by head) and updates its own elements by them. The momentum
stays a flat partition.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vitscale.optim.factoring import Block, block_of, factoring
from vitscale.optim.segmented import SegmentedOptimizer
from vitscale.optim.segments import Flat, Segment

BETA2_EXPONENT = 0.8
BETA2_CAP = 0.999
EPS = 1e-30
"""Added to the squared gradient."""


class _Factored(NamedTuple):
    """Where the factors of a parameter lie in its tensor's `factors`."""

    segment: Segment
    block: Block
    rows: slice
    cols: slice


class _Layout(NamedTuple):
    """How the second moment of a tensor is kept."""

    factored: list[_Factored]
    plain: dict[Segment, slice]
    """Segments without factors, and where their elements lie in the tensor's `exp_avg_sq`."""
    factor_numel: int
    plain_numel: int


class Adafactor(SegmentedOptimizer):
    """Adafactor (Shazeer and Stern 2018) in the variant of Zhai et al. 2022 (arXiv 2106.04560), as big_vision has it.

    The second moment decays by min(0.999, 1 - t ** -0.8) at update t and is kept as its means over columns and
    rows where both are at least 32 (`factoring`), else whole. The gradient over its root enters a momentum without
    bias correction. Neither the rate nor the update is relative to the weights, and the update is not clipped
    (big_vision's default; the engine clips the gradients). Weight decay is weight_decay times lr times the weights.

    Args:
        params: as torch's optimizers take them.
        lr: learning rate.
        momentum: decay of the first moment; 0 for none.
        momentum_dtype: what the momentum is stored in between steps.
        weight_decay: decoupled from the momentum, times lr.
        shapes: by name, the shapes that parameters are factored in, where these are not their own
            (`attention_shapes`).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        momentum_dtype: torch.dtype = torch.float32,
        weight_decay: float = 0.0,
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._momentum = momentum
        self._momentum_dtype = momentum_dtype
        self._shapes = dict(shapes or {})
        self._layouts: dict[Tensor, _Layout] = {}

    def bind(self, flats: Iterable[Flat], group: ProcessGroup | None, device: torch.device | None = None) -> None:
        """See `SegmentedOptimizer`."""
        super().bind(flats, group, device)
        self._layouts.clear()

    def ensure_state(self, tensor: Tensor) -> dict[str, Any]:
        """See `SegmentedOptimizer`."""
        state: dict[str, Any] = self.state[tensor]
        if not state:
            layout = self._layout(tensor)
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU: reading it waits for nothing
            state["factors"] = tensor.new_zeros(layout.factor_numel)
            state["exp_avg_sq"] = tensor.new_zeros(layout.plain_numel)
            if self._momentum:
                state["exp_avg"] = torch.zeros_like(
                    tensor, dtype=self._momentum_dtype, memory_format=torch.preserve_format
                )
        return state

    def segment_state(self, tensor: Tensor, segment: Segment) -> dict[str, Tensor]:
        """See `SegmentedOptimizer`."""
        state, layout = self.ensure_state(tensor), self._layout(tensor)
        found = {"exp_avg": segment.of(state["exp_avg"])} if self._momentum else {}
        if segment in layout.plain:
            found["exp_avg_sq"] = state["exp_avg_sq"][layout.plain[segment]]
        return found

    def parameter_state(self, tensor: Tensor) -> list[tuple[str, dict[str, Tensor]]]:
        """See `SegmentedOptimizer`: row factors, then column factors, flattened in the shapes of `Factoring`."""
        factors = self.ensure_state(tensor)["factors"]
        return [
            (part.segment.name, {"exp_avg_sq_row": factors[part.rows], "exp_avg_sq_col": factors[part.cols]})
            for part in self._layout(tensor).factored
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient. Collective where it is bound to a group."""
        assert closure is None, "closures are not supported"
        stepped = [(group, t) for group in self.param_groups for t in group["params"] if t.grad is not None]
        if not stepped:
            return
        means = [self._partial_means(tensor) for _, tensor in stepped]
        summed = torch.cat(means)
        self._sum_over_ranks(summed)
        for (group, tensor), mean in zip(stepped, torch.split(summed, [m.numel() for m in means]), strict=True):
            direction = self._scaled_gradient(tensor, mean)
            if self._momentum:
                momentum = self.state[tensor]["exp_avg"]
                direction.mul_(1 - self._momentum).add_(momentum, alpha=self._momentum)
                momentum.copy_(direction)  # rounded for the next step only, as optax does
            if group["weight_decay"]:
                direction.add_(tensor, alpha=group["weight_decay"])
            tensor.add_(direction, alpha=-group["lr"])

    def _partial_means(self, tensor: Tensor) -> Tensor:
        """This rank's share of the new row and column means of squared gradients: float64 [factor_numel]."""
        layout, grad = self._layout(tensor), _grad(tensor)
        found = tensor.new_zeros(layout.factor_numel, dtype=torch.float64)
        for segment, block, rows, cols in layout.factored:
            if segment.numel:
                squares = block.fold(segment.of(grad)).square()
                block.rows_of(found[rows]).copy_(squares.sum(dim=3, dtype=torch.float64).div_(block.factoring.cols))
                # Not a mean: the block may hold only some of the rows.
                block.cols_of(found[cols]).copy_(squares.sum(dim=1, dtype=torch.float64).div_(block.factoring.rows))
        return found

    def _scaled_gradient(self, tensor: Tensor, means: Tensor) -> Tensor:
        """Move the second moment on and return the gradient over its root, shaped like the tensor, 0 in padding."""
        state, layout, grad = self.ensure_state(tensor), self._layout(tensor), _grad(tensor)
        state["step"] += 1
        weight = 1 - min(BETA2_CAP, 1 - float(state["step"]) ** -BETA2_EXPONENT)
        factors = state["factors"].lerp_(means.to(tensor.dtype).add_(EPS), weight)
        scaled = torch.zeros_like(tensor, memory_format=torch.preserve_format)
        for segment, block, rows, cols in layout.factored:
            if segment.numel:
                row = factors[rows].view(block.factoring.row_shape)
                row_scale = block.rows_of((row / row.mean(dim=1, keepdim=True)).rsqrt_())
                col_scale = block.cols_of(factors[cols]).rsqrt()
                found = (block.fold(segment.of(grad)) * row_scale.unsqueeze(3)).mul_(col_scale.unsqueeze(1))
                segment.of(scaled).copy_(block.unfold(found))
        if layout.plain:
            grads = torch.cat([segment.of(grad) for segment in layout.plain])
            second = state["exp_avg_sq"].lerp_(grads.square().add_(EPS), weight)
            pieces = torch.split(grads.mul_(second.rsqrt()), [segment.numel for segment in layout.plain])
            torch._foreach_copy_([segment.of(scaled) for segment in layout.plain], list(pieces))
        return scaled

    def _layout(self, tensor: Tensor) -> _Layout:
        if tensor not in self._layouts:
            self._layouts[tensor] = self._lay_out(tensor)
        return self._layouts[tensor]

    def _lay_out(self, tensor: Tensor) -> _Layout:
        factored: list[_Factored] = []
        plain: dict[Segment, slice] = {}
        factor_numel = plain_numel = 0
        for segment in self._segments_of(tensor):
            how = factoring(self._shapes.get(segment.name, segment.shape))
            if how is not None:
                middle = factor_numel + math.prod(how.row_shape)
                end = middle + math.prod(how.col_shape)
                block = block_of(how, segment.offset, segment.numel)
                factored.append(_Factored(segment, block, slice(factor_numel, middle), slice(middle, end)))
                factor_numel = end
            elif segment.numel:
                plain[segment] = slice(plain_numel, plain_numel + segment.numel)
                plain_numel += segment.numel
        return _Layout(factored, plain, factor_numel, plain_numel)


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
