"""Random crops and flips, drawn from the position."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitscale.data.decode import Box
from vitscale.data.draws import uniform
from vitscale.data.order import CROP, FLIP

CROP_TRIES = 10


def draw_crops(seed: int, positions: NDArray[np.int64]) -> list[list[float]]:
    """The random numbers of the crops at some positions: 22 in [0, 1) each, for `crop_box`."""
    return uniform(seed, CROP, positions[:, None], np.arange(2 * CROP_TRIES + 2)).tolist()  # type: ignore[no-any-return]


def crop_box(
    draws: Sequence[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """The training crop of an image (inception crop: Szegedy et al. 2015, Going deeper).

    Its area is uniform in `scale` (fractions of the image), its width over height log-uniform in `ratio`; a
    box that does not fit is drawn again. After ten misses: the largest central box whose shape is in `ratio`.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for draw_area, draw_shape in zip(draws[:CROP_TRIES], draws[CROP_TRIES:], strict=False):
        area = (scale[0] + (scale[1] - scale[0]) * draw_area) * height * width
        shape = math.exp(log_low + (log_high - log_low) * draw_shape)
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
