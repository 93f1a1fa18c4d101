"""Optimizers whose update of an element depends on the whole parameter that it belongs to.

ZeRO hands an optimizer flat pieces of parameters, whose norms and factors are not the parameters'. Two ways lead to
true ones: give whole parameters to ranks, or sum over ranks what belongs to whole parameters. We sum. Elementwise
state stays the flat partition that DeepSpeed made, equal on every rank whatever the shapes (the head of 21,843 classes
alone is more than a rank's share of ViT-g on 64 ranks), DeepSpeed needs no other partition, checkpoints keep one form
for all optimizers, and the price is one small all-reduce at each call of `step`, which DeepSpeed makes once for each
parameter group (stages 1 and 2) or sub-group (stage 3). The sums are in float64, so that how the parameters are cut
does not show in the last bit of what follows from them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vitscale.optim.segments import Flat, Segment, whole_segment


class SegmentedOptimizer(torch.optim.Optimizer):
    """An optimizer that is true to whole parameters when it is given flat partitions of them.

    Unbound, each tensor it was given is a whole parameter.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._segments: dict[Tensor, tuple[Segment, ...]] = {}
        self._group: ProcessGroup | None = None
        self._device: torch.device | None = None

    def bind(self, flats: Iterable[Flat], group: ProcessGroup | None, device: torch.device | None = None) -> None:
        """Say which parameters lie where, before the first step.

        Args:
            flats: every tensor that a step will be about.
            group: the ranks among which the parameters are partitioned; None where every rank has them whole.
            device: where the group communicates, if that is not where the tensors are (ZeRO-Offload).
        """
        self._segments = {flat.tensor: flat.segments for flat in flats}
        self._group = group
        self._device = device

    def ensure_state(self, tensor: Tensor) -> dict[str, Any]:
        """The state of a tensor, zeros when it has not been stepped yet."""
        raise NotImplementedError

    def segment_state(self, tensor: Tensor, segment: Segment) -> dict[str, Tensor]:
        """Views of the state that belongs to each element of a segment, each [segment.numel]."""
        raise NotImplementedError

    def parameter_state(self, tensor: Tensor) -> list[tuple[str, dict[str, Tensor]]]:
        """Views of the state that belongs to whole parameters, by parameter name; equal on every rank."""
        return []

    def _segments_of(self, tensor: Tensor) -> tuple[Segment, ...]:
        return self._segments.get(tensor) or (whole_segment("", tensor.shape),)

    def _sum_over_ranks(self, partial: Tensor) -> None:
        if self._group is not None and partial.numel():
            shared = partial.to(self._device or partial.device)
            torch.distributed.all_reduce(shared, group=self._group)
            if shared is not partial:
                partial.copy_(shared)
