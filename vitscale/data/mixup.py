"""Mixup and CutMix of neighbouring positions, and the targets of mixed images.

The partner of the image at position p is the one at p xor 1. Ranks take positions in such pairs, so partners stand
side by side in a micro-batch, at any topology. Both images of a pair are mixed by the same draw, each into the other.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.config.augment import MixSection
from vitscale.data.draws import MIX, symmetric_beta, uniform


class MixedLabels(NamedTuple):
    """Targets of B mixed images: weight * one-hot(labels) + (1 - weight) * one-hot(partner_labels)."""

    labels: Tensor  # int64 [B]
    partner_labels: Tensor  # int64 [B]
    weights: Tensor  # fp32 [B], 0 to 1


def draw_mix(
    section: MixSection, seed: int, positions: NDArray[np.int64], side: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """How the images at these positions are mixed with their partners: weights [n], boxes [n, 4].

    A weight is the image's own share, from Beta(alpha, alpha). CutMix takes the box (top, left, bottom, right, in
    pixels of an image of side x side) from the partner; its centre is uniform, what lies outside is cut off, and the
    weight is the share that is left (Yun et al. 2019). Mixup (Zhang et al. 2018) blends all pixels: its box is empty.
    """
    # All numbers of a pair are the same in both of its images.
    draws = uniform(seed, MIX, positions[:, None] // 2, np.arange(6))
    mixed = draws[:, 0] < section.probability
    cutmix_share = section.cutmix_share if section.mixup_alpha else 1.0
    cut = mixed & (draws[:, 1] < cutmix_share) & (section.cutmix_alpha > 0)

    lambdas = symmetric_beta(section.mixup_alpha or 1.0, draws[:, 2], draws[:, 3])
    cut_lambdas = symmetric_beta(section.cutmix_alpha or 1.0, draws[:, 2], draws[:, 3])
    box_sides = (side * np.sqrt(1 - cut_lambdas)).astype(np.int32)[:, None]
    centres = (side * draws[:, 4:]).astype(np.int32)
    low, high = np.clip(centres - box_sides // 2, 0, side), np.clip(centres + (box_sides + 1) // 2, 0, side)
    boxes = np.where(cut[:, None], np.concatenate([low, high], 1), 0)

    left = 1 - (high - low).prod(1) / side**2
    weights = np.where(cut, left, np.where(mixed, lambdas, 1.0))
    return weights.astype(np.float32), boxes.astype(np.int32)


def mix(images: Tensor, labels: Tensor, weights: Tensor, boxes: Tensor) -> tuple[Tensor, MixedLabels]:
    """Mix each image with its neighbour in the batch: 0 with 1, 2 with 3, and so on.

    Args:
        images: fp32 [B, 3, S, S], B even.
        labels: int64 [B].
        weights: fp32 [B], of `draw_mix`.
        boxes: int32 [B, 4], of `draw_mix`.
    """
    partners, partner_labels = _swapped(images), _swapped(labels)
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
    box = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    cut = (bottom > top) & (right > left)

    share = torch.where(cut, 1.0, weights[:, None])[:, :, None, None]
    blended = images * share + partners * (1 - share)
    return torch.where(box[:, None], partners, blended), MixedLabels(labels, partner_labels, weights)


def _swapped(values: Tensor) -> Tensor:
    """Each row at the place of its neighbour."""
    return values.view(-1, 2, *values.shape[1:]).flip(1).view_as(values)
