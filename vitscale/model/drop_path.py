"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382): in training, samples pass a block's branch by.

Shapes: B images, K <= B of them that take the branch, S tokens, D width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

DropPathMode = Literal["mask", "subset"]
"""mask: the branch is computed for all samples and multiplied by 0 or 1 / (1 - rate), each drawn for itself.
subset: it is computed for `kept_samples` of them alone (Oquab et al. 2023, arXiv 2304.07193, section 5). Padding is
drawn like images: the chance and factor of each image, and so its expectation, are those of a full batch."""


def drop_path_rates(last: float, depth: int) -> list[float]:
    """The rate of each block: from 0 at the first, linearly, to `last`."""
    return [last * index / max(depth - 1, 1) for index in range(depth)]


def kept_samples(samples: int, rate: float) -> int:
    """How many samples of a micro-batch take a branch in mode subset: one at least, so that weights have gradients."""
    return max(1, round(samples * (1.0 - rate)))


class DropPath(nn.Module):
    """Draws which samples take a branch; `take` and `add_branch` carry it out. Both modes keep the expectation.

    The draw is apart from what it does, so that a compiled or recomputed block holds neither rate nor generator.
    """

    def __init__(self, rate: float, mode: DropPathMode = "mask") -> None:
        super().__init__()
        self.rate = rate
        self.mode = mode

    def draw(self, x: Tensor) -> Tensor | None:
        """For [B, S, D]: in mode mask a factor for each sample [B, 1, 1], in subset the rows that take the branch [K].

        None where all take it unscaled: in evaluation, at rate 0, and when the subset would be the whole.
        """
        if not self.training or self.rate == 0.0:
            return None
        samples = x.shape[0]
        if self.mode == "subset":
            kept = kept_samples(samples, self.rate)
            return None if kept == samples else torch.randperm(samples, device=x.device)[:kept]
        keep = 1.0 - self.rate
        return x.new_empty(samples, 1, 1).bernoulli_(keep).div_(keep)


def take(x: Tensor, draw: Tensor | None) -> Tensor:
    """The samples that a branch is computed for: [B, S, D] -> [B, S, D] or [K, S, D]."""
    return x if draw is None or draw.is_floating_point() else x.index_select(0, draw)


def add_branch(x: Tensor, branch: Tensor, draw: Tensor | None) -> Tensor:
    """[B, S, D] plus what the branch made of `take(x, draw)`, scaled so that the expectation is kept."""
    if draw is None:
        return x + branch
    if draw.is_floating_point():
        return x + branch * draw
    # Autocast leaves the residual stream in fp32 and makes the branch bf16.
    return x.index_add(0, draw, branch.to(x.dtype), alpha=x.shape[0] / draw.shape[0])
