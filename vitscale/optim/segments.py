"""Where parameters lie in the flat tensors that an optimizer updates under ZeRO."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Segment:
    """Elements [offset, offset + numel) of a flattened parameter, at [start, start + numel) of a flat tensor."""

    name: str
    """Parameter name, as in the model's state dict."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    offset: int
    """First element of the run in the flattened parameter."""
    start: int
    """First element of the run in the flat tensor."""
    numel: int
    """Elements of the run; 0 where this rank holds nothing of the parameter."""

    def of(self, flat: Tensor) -> Tensor:
        """The run's view of the flat tensor, or of a value that is shaped like it: [numel]."""
        return flat.view(-1).narrow(0, self.start, self.numel)


@dataclass(frozen=True)
class Flat:
    """One tensor that an optimizer updates, with the parameters in it.

    Every rank lists the same parameters in the same order, those that it holds nothing of with `numel` 0.
    Elements in no segment are padding.
    """

    tensor: Tensor
    segments: tuple[Segment, ...]


def whole_parameters(named: Iterable[tuple[str, nn.Parameter]]) -> list[Flat]:
    """Parameters that are not partitioned, each a flat tensor of its own."""
    return [Flat(p, (whole_segment(name, p.shape),)) for name, p in named if p.requires_grad]


def whole_segment(name: str, shape: Sequence[int]) -> Segment:
    """The segment of a parameter that lies alone in its tensor."""
    return Segment(name, tuple(shape), 0, 0, math.prod(shape))
