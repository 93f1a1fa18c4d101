"""The moving average of the weights, on the rank that holds their master copy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vitscale.config import AverageSection
from vitscale.optim import Flat

# Elements that are exchanged at a time: 64 MB on top of what is held.
_CHUNK = 1 << 24


def average_decay(section: AverageSection, count: int) -> float:
    """Share of the average that its `count`-th averaging keeps, counted from 1.

    With warm-up it is at most (1 + count) / (10 + count), as in TensorFlow's `ExponentialMovingAverage`.
    """
    assert count >= 1
    return min(section.decay, (1 + count) / (10 + count)) if section.warmup else section.decay


class WeightAverage:
    """Exponential moving average (Polyak and Juditsky 1992) of the fp32 weights that this rank holds.

    It starts as the weights themselves and takes 4 P / N bytes for P parameters partitioned over N ranks (4 P where
    they are not).
    """

    def __init__(self, section: AverageSection, flats: Sequence[Flat]) -> None:
        self._section = section
        self._every_steps = section.every_steps
        self._weights = [flat.tensor.detach() for flat in flats]
        self._averages = [weights.clone() for weights in self._weights]
        self._by_tensor = {flat.tensor: average for flat, average in zip(flats, self._averages, strict=True)}

    def of(self, tensor: Tensor) -> Tensor:
        """The average of one of the optimizer's tensors."""
        return self._by_tensor[tensor]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Average in the weights as the `updates`-th update of the run has left them, where that one is due."""
        count, between = divmod(updates, self._every_steps)
        if between == 0:
            torch._foreach_lerp_(self._averages, self._weights, 1.0 - average_decay(self._section, count))

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Have the averages lie where the weights do while the block runs; both are bitwise the same afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weights, average in zip(self._weights, self._averages, strict=True):
            for here, there in zip(_pieces(weights), _pieces(average), strict=True):
                kept = here.clone()
                here.copy_(there)
                there.copy_(kept)


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return torch.split(tensor.view(-1), _CHUNK)
