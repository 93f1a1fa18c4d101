"""Random crops and flips as functions of the position, and the part of augmentation that runs on the device."""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vitscale.data.decode import Box
from vitscale.data.order import CROP, FLIP, hash64

CROP_TRIES = 10


def crop_box(
    seed: int, position: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """The training crop of the image at a position (inception crop: Szegedy et al. 2015, Going deeper).

    Its area is uniform in `scale` (fractions of the image), its width over height log-uniform in `ratio`; a
    box that does not fit is drawn again. After ten misses: the largest central box whose shape is in `ratio`.
    """
    draws = _uniform(seed, CROP, position, np.arange(2 * CROP_TRIES + 2))
    areas = (scale[0] + (scale[1] - scale[0]) * draws[:CROP_TRIES]) * height * width
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    shapes = np.exp(log_low + (log_high - log_low) * draws[CROP_TRIES : 2 * CROP_TRIES])
    for area, shape in zip(areas, shapes, strict=True):
        crop_width, crop_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(draws[-2] * (height - crop_height + 1))
            left = int(draws[-1] * (width - crop_width + 1))
            return Box(top, left, crop_height, crop_width)
    shape = min(max(width / height, ratio[0]), ratio[1])
    crop_width = max(1, min(width, round(height * shape)))
    crop_height = max(1, min(height, round(width / shape)))
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def flips(seed: int, positions: NDArray[np.int64], probability: float) -> NDArray[np.bool_]:
    """Whether the image at each position is mirrored, [n]."""
    return _uniform(seed, FLIP, positions) < probability


def prepare_images(
    images: Tensor, flip: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """Mirror and normalise a batch on its device.

    Args:
        images: uint8 [B, 3, S, S].
        flip: bool [B], the images to mirror left to right.
        mean: of the pixels, in units of 0 to 1.
        std: what the pixels are divided by, in the same units.

    Returns:
        fp32 [B, 3, S, S].
    """
    mirrored = torch.where(flip[:, None, None, None], images.flip(-1), images)
    centre = torch.tensor(mean, device=images.device)[:, None, None]
    spread = torch.tensor(std, device=images.device)[:, None, None]
    return (mirrored.float() / 255 - centre) / spread


def _uniform(*words: ArrayLike) -> NDArray[np.float64]:
    """Uniform in [0, 1): the top 53 bits of the words' hash, as many as a float64 holds."""
    return (hash64(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53
