"""The training state of a variant as each rank under ZeRO holds it, without any engine."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from vitscale.engine import MASTER, Fragment
from vitscale.engine.optimizer_state import ADAM_MOMENTS

VALUES = (MASTER, *ADAM_MOMENTS)


def fragments_of_rank(
    shapes: Mapping[str, tuple[int, ...]], rank: int, world_size: int, stage: int, make: Callable[[int], Tensor]
) -> list[Fragment]:
    """What a rank holds of AdamW's state.

    Args:
        shapes: of the parameters.
        rank: of `world_size`.
        world_size: number of ranks.
        stage: 3 cuts every parameter into as many pieces as there are ranks; below, each rank has one stretch of all
            parameters laid end to end.
        make: gives a value of so many elements.
    """
    return [
        Fragment(name, offset, {value: make(numel) for value in VALUES}, saved_here=True)
        for name, offset, numel in _runs(shapes, rank, world_size, stage)
        if numel > 0
    ]


def _runs(
    shapes: Mapping[str, tuple[int, ...]], rank: int, world_size: int, stage: int
) -> Iterator[tuple[str, int, int]]:
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    total, start = sum(sizes.values()), 0
    low, high = total * rank // world_size, total * (rank + 1) // world_size
    for name, size in sizes.items():
        if stage == 3:
            piece = -(-size // world_size)
            yield name, rank * piece, min(piece, size - rank * piece)
        else:
            first, last = max(low, start), min(high, start + size)
            yield name, first - start, last - first
        start += size
