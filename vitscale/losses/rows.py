"""The mean of a loss over a batch, computed with its gradient a few rows at a time."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from vitscale.losses.targets import Targets

RowLoss = Callable[[Tensor, Targets, Tensor], Tensor]
"""(logits [n, C] in fp32 or fp64, which stay as they are; the targets of these n images; an empty tensor [n, C] of any
float dtype, where the gradient of each loss for its own row is written) -> the losses [n]."""

# Logits of a chunk: few enough that its temporaries are small, and on a CPU in the cache; enough to fill a kernel.
_CPU_CHUNK_ELEMENTS = 2**19
_GPU_CHUNK_ELEMENTS = 2**23

_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def mean_over_rows(row_loss: RowLoss, logits: Tensor, targets: Targets) -> Tensor:
    """The mean of a row loss over the batch, a scalar: the sum of each, times its image's weight, over B.

    Computed in fp32 (in fp64 of fp64 logits), chunk by chunk. What the backward pass needs is computed at once and
    is all that is kept: the gradient for the logits, in their dtype.

    Args:
        row_loss: the loss of one image.
        logits: bf16, fp32 or fp64 [B, C].
        targets: of these B images.

    Returns:
        fp32, or fp64 of fp64 logits.

    Raises:
        RuntimeError: in a backward pass with create_graph: there is no second derivative.
    """
    assert logits.dtype in _DTYPES, f"logits of {logits.dtype}: in fp16 their gradient would vanish"
    return _MeanOverRows.apply(logits, targets, row_loss)  # type: ignore[no-any-return]


class _MeanOverRows(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Targets, row_loss: RowLoss) -> Tensor:
        dtype = _computed_in(logits)
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        total = torch.zeros((), dtype=dtype, device=logits.device)
        weights = targets.image_weights
        for rows in _chunks(logits):
            losses = row_loss(logits[rows].to(dtype), targets.rows(rows), gradient[rows])
            total += (losses if weights is None else losses * weights[rows]).sum()
        ctx.save_for_backward(gradient, weights)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("the losses have no second derivative: call backward without create_graph")
        gradient, weights = ctx.saved_tensors
        scale, scaled = grad / len(gradient), torch.empty_like(gradient)
        for rows in _chunks(gradient):
            # In fp32: the scale of all gradients is not rounded to bf16.
            factor = scale if weights is None else scale * weights[rows, None]
            torch.mul(gradient[rows].to(scale.dtype), factor, out=scaled[rows])
        return scaled, None, None


def _computed_in(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits: Tensor) -> Iterator[slice]:
    batch, classes = logits.shape
    elements = _CPU_CHUNK_ELEMENTS if logits.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    count = max(1, elements // classes)
    return (slice(first, first + count) for first in range(0, batch, count))
