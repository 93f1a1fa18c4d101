"""What Adafactor factors a parameter's second moment over, and how a flat run of the parameter meets its factors.

Shapes: a parameter is seen as [outer, rows, between, cols, inner].
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.optim.groups import true_shape

MIN_FACTORED_SIZE = 32
"""Both factored dimensions are at least this long, as in big_vision."""
_MATRICES = {"qkv": 3, "kv": 2, "q": 1}


class Factoring(NamedTuple):
    """The second moment is factored over rows and cols, apart for each place of the other three dimensions."""

    outer: int
    rows: int
    between: int
    cols: int
    inner: int

    @property
    def row_shape(self) -> tuple[int, int, int, int]:
        """Shape of a mean over cols."""
        return self.outer, self.rows, self.between, self.inner

    @property
    def col_shape(self) -> tuple[int, int, int, int]:
        """Shape of a mean over rows."""
        return self.outer, self.between, self.cols, self.inner


class Block(NamedTuple):
    """The whole slices of a parameter along one dimension that hold a flat run of its elements."""

    factoring: Factoring
    dim: int
    """0 (outer) or, where outer is 1, 1 (rows)."""
    first: int
    """First slice."""
    slices: int
    """Number of slices."""
    lead: int
    """Elements of the first slice before the run."""
    numel: int
    """Elements of the run."""

    def fold(self, run: Tensor) -> Tensor:
        """[numel] -> the block, with zeros around the run."""
        shape = list(self.factoring)
        shape[self.dim] = self.slices
        return F.pad(run, (self.lead, math.prod(shape) - self.lead - self.numel)).view(shape)

    def unfold(self, block: Tensor) -> Tensor:
        """The block -> the run [numel]."""
        return block.reshape(-1).narrow(0, self.lead, self.numel)

    def rows_of(self, rows: Tensor) -> Tensor:
        """The part of the row factors [prod(row_shape)] that belongs to the block."""
        return rows.view(self.factoring.row_shape).narrow(self.dim, self.first, self.slices)

    def cols_of(self, cols: Tensor) -> Tensor:
        """The part of the column factors [prod(col_shape)] that belongs to the block."""
        whole = cols.view(self.factoring.col_shape)
        return whole.narrow(0, self.first, self.slices) if self.dim == 0 else whole


class HeadedModel(Protocol):
    """A model whose attention modules say their `num_heads`."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module with its name."""


def factoring(shape: Sequence[int]) -> Factoring | None:
    """Over the two longest dimensions, the later of equals, as optax chooses them; None where one is too short."""
    by_length = sorted(range(len(shape)), key=lambda index: shape[index])
    if len(shape) < 2 or shape[by_length[-2]] < MIN_FACTORED_SIZE:
        return None
    low, high = sorted(by_length[-2:])
    between, inner = math.prod(shape[low + 1 : high]), math.prod(shape[high + 1 :])
    return Factoring(math.prod(shape[:low]), shape[low], between, shape[high], inner)


def block_of(factoring: Factoring, offset: int, numel: int) -> Block:
    """The block of elements [offset, offset + numel) of the flattened parameter."""
    dim = 0 if factoring.outer > 1 else 1
    size = math.prod(factoring[dim + 1 :])
    first = offset // size
    return Block(factoring, dim, first, -(-(offset + numel) // size) - first, offset - first * size, numel)


def attention_shapes(model: HeadedModel) -> dict[str, tuple[int, ...]]:
    """The shapes [matrices, heads, head_dim, D] and [D, heads, head_dim] of attention's weights, by parameter name.

    Queries, keys and values lie in one matrix here and are parameters of their own, with a dimension for the
    heads, in the models that Adafactor was tuned on.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, module in model.named_modules():
        heads = getattr(module, "num_heads", None)
        if heads is None:
            continue
        for child, linear in module.named_children():
            if child in _MATRICES:
                out, dim = true_shape(linear.weight)  # type: ignore[arg-type]
                shapes[f"{prefix}.{child}.weight"] = (_MATRICES[child], heads, out // (_MATRICES[child] * heads), dim)
            elif child == "proj":
                out, dim = true_shape(linear.weight)  # type: ignore[arg-type]
                shapes[f"{prefix}.{child}.weight"] = (out, heads, dim // heads)
    return shapes
