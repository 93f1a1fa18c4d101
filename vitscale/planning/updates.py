"""Bytes that an optimizer keeps for each element that it updates, and needs while it does."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vitscale.config import OptimSection
from vitscale.optim.factoring import factoring

FP32_BYTES = 4
_DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class UpdateBytes:
    """What one optimizer takes, beside the fp32 weights that it updates."""

    element: int
    """Bytes of state an element of this rank's partition."""
    whole: int = 0
    """Bytes that every rank holds whole (Adafactor's row and column factors)."""
    plain: int = 0
    """Elements of the model that have fp32 state of their own beside `element` (Adafactor's unfactored ones)."""
    scratch: int = 0
    """Bytes an element of what is updated at a time, during the update alone."""
    piece: int = 0
    """Bytes an element of the largest piece of a parameter in a partition, during the update alone."""


ADAMW = UpdateBytes(2 * FP32_BYTES)
"""With torch's fused kernel."""


def update_bytes(optim: OptimSection, shapes: Iterable[Sequence[int]]) -> UpdateBytes:
    """What the configured optimizer takes, on a GPU.

    AdamW and LAMB keep two fp32 moments (8 bytes), SGD its momentum (4). Adafactor keeps its momentum (4, or 2 in
    bf16) and, whole on every rank, the means of rows and columns of what it factors: rows + columns of each such
    parameter. A fused kernel needs nothing on top; unfused AdamW has up to two fp32 temporaries, unfused SGD one where
    it decays weights, LAMB and Adafactor the direction, and Adafactor three of one piece of a parameter at a time.

    Args:
        optim: of the config.
        shapes: of all parameters, as the optimizer sees them (`attention_shapes`).
    """
    if optim.kind == "adamw":
        return UpdateBytes(2 * FP32_BYTES, scratch=2 * FP32_BYTES if optim.fused is False else 0)
    if optim.kind == "lamb":
        return UpdateBytes(2 * FP32_BYTES, scratch=FP32_BYTES)
    if optim.kind == "sgd":
        return UpdateBytes(FP32_BYTES if optim.momentum else 0, scratch=FP32_BYTES if optim.fused is False else 0)
    factors = plain = 0
    for shape in shapes:
        over = factoring(shape)
        if over is None:
            plain += math.prod(shape)
        else:
            factors += math.prod(over.row_shape) + math.prod(over.col_shape)
    momentum = _DTYPE_BYTES[optim.momentum_dtype] if optim.momentum else 0
    return UpdateBytes(momentum, FP32_BYTES * factors, plain, scratch=FP32_BYTES, piece=3 * FP32_BYTES)
