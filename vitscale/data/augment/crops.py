"""Random crops and flips, drawn from the position."""

import math

import numpy as np
from numpy.typing import NDArray

from vitscale.data.decode import Box
from vitscale.data.draws import uniform
from vitscale.data.order import CROP, FLIP

CROP_TRIES = 10


def crop_box(
    seed: int, position: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """The training crop of the image at a position (inception crop: Szegedy et al. 2015, Going deeper).

    Its area is uniform in `scale` (fractions of the image), its width over height log-uniform in `ratio`; a
    box that does not fit is drawn again. After ten misses: the largest central box whose shape is in `ratio`.
    """
    draws = uniform(seed, CROP, position, np.arange(2 * CROP_TRIES + 2))
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
    return uniform(seed, FLIP, positions) < probability
