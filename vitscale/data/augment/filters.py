"""Operations on the neighbourhoods of uint8 images [n, 3, H, W], each with a strength for every image, [n]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.data.augment.colour import blend

BLUR_RADIUS = 6
"""Pixels of the blur's kernel beside its centre: three times the greatest sigma that the config takes, 2."""


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Away from the smoothed image, as Pillow does: 0 is smooth, 1 the image, more is sharper."""
    values = images.int()
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * values[..., 1:-1, 1:-1]
    smooth = values.clone()
    smooth[..., 1:-1, 1:-1] = (sums + 6) // 13  # rounds to the nearest; the rim stays
    return blend(smooth, images, factors)


def gaussian_blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Blur with a true Gaussian of this standard deviation in pixels, rounded to the nearest value.

    The rim is continued outwards, as Pillow does. (Pillow's own GaussianBlur is three box filters in place of it.)
    """
    distances = torch.arange(BLUR_RADIUS + 1, device=images.device)
    weights = torch.exp(-0.5 * (distances / sigmas[:, None]) ** 2)
    weights = weights / (weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdim=True))
    blurred = F.pad(images.float(), (BLUR_RADIUS,) * 4, mode="replicate")
    for dim in (2, 3):
        blurred = _weigh(blurred, weights, dim)
    return blurred.round().to(torch.uint8)


def _weigh(values: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Convolve along a dimension with symmetric weights [n, radius + 1]; it gets shorter by the radius at both ends.

    A convolution of the library may sum in an order that depends on how many images there are; this one does not.
    """
    radius = weights.shape[1] - 1
    length = values.shape[dim] - 2 * radius
    taps = weights[:, :, None, None, None].unbind(1)
    total = taps[0] * values.narrow(dim, radius, length)
    for distance in range(1, radius + 1):
        both = values.narrow(dim, radius - distance, length) + values.narrow(dim, radius + distance, length)
        total = total + taps[distance] * both
    return total
