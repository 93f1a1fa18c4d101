"""Operations that move pixels of uint8 images [n, 3, H, W], each with a strength for every image, [n].

A matrix [[a, b, c], [d, e, f]] says where a pixel comes from, as in Pillow: the pixel at (x, y) from
(ax + by + c, dx + ey + f), in pixels from the image's upper left corner, so that the first centre is (0.5, 0.5).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

RGB = tuple[int, int, int]


def shear_x(images: Tensor, factors: Tensor) -> Tensor:
    """Matrices that shift each row by this many times its height in the image, [n, 2, 3]."""
    return _matrices(images, (1, factors, 0), (0, 1, 0))


def shear_y(images: Tensor, factors: Tensor) -> Tensor:
    """Matrices that shift each column by this many times its place in the image, [n, 2, 3]."""
    return _matrices(images, (1, 0, 0), (factors, 1, 0))


def translate_x(images: Tensor, shares: Tensor) -> Tensor:
    """Matrices that shift to the left by this share of the width, [n, 2, 3]."""
    return _matrices(images, (1, 0, shares * images.shape[3]), (0, 1, 0))


def translate_y(images: Tensor, shares: Tensor) -> Tensor:
    """Matrices that shift upwards by this share of the height, [n, 2, 3]."""
    return _matrices(images, (1, 0, 0), (0, 1, shares * images.shape[2]))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Matrices that turn counter-clockwise about the image's centre, [n, 2, 3]."""
    angles = torch.deg2rad(degrees.double())
    cosines, sines = angles.cos(), angles.sin()
    x, y = images.shape[3] / 2, images.shape[2] / 2
    return _matrices(
        images,
        (cosines, -sines, x - x * cosines + y * sines),
        (sines, cosines, y - x * sines - y * cosines),
    )


def warp(images: Tensor, matrices: Tensor, fill: RGB, *, nearest: bool) -> Tensor:
    """Images whose pixels come from where the matrices say; from outside comes the fill colour.

    Values between pixels are the nearest pixel's, or interpolated (bilinear) and rounded to the nearest value, where
    Pillow cuts fractions off: the two differ by 1 at most.
    """
    height, width = images.shape[2:]
    # fp64: Pillow's, so that the same pixels fall outside.
    x = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5
    y = torch.arange(height, device=images.device, dtype=torch.float64)[:, None] + 0.5
    a, b, c, d, e, f = matrices.double().flatten(1)[:, :, None, None].unbind(1)
    from_x, from_y = (a * x + b * y + c) / width, (d * x + e * y + f) / height
    inside = (from_x >= 0) & (from_x < 1) & (from_y >= 0) & (from_y < 1)
    grid = torch.stack([2 * from_x - 1, 2 * from_y - 1], -1).float()
    mode = "nearest" if nearest else "bilinear"
    moved = F.grid_sample(images.float(), grid, mode, padding_mode="border", align_corners=False)
    return torch.where(inside[:, None], moved.round().to(torch.uint8), _colour(fill, images))


def cut_out(images: Tensor, halves: Tensor, centres: Tensor, fill: RGB) -> Tensor:
    """Fill a square (Cutout: DeVries and Taylor 2017), cut off where it leaves the image.

    Args:
        images: uint8 [n, 3, H, W].
        halves: half of the square's side over the image's height, [n].
        centres: the square's centre as shares of height and width, 0 to 1, [n, 2].
        fill: the colour.
    """
    height, width = images.shape[2:]
    half = (halves * height).round()[:, None]
    rows = torch.arange(height, device=images.device) - (centres[:, :1] * height).floor()
    columns = torch.arange(width, device=images.device) - (centres[:, 1:] * width).floor()
    square = ((rows >= -half) & (rows < half))[:, :, None] & ((columns >= -half) & (columns < half))[:, None, :]
    return torch.where(square[:, None], _colour(fill, images), images)


def _matrices(images: Tensor, *rows: tuple[Tensor | float, Tensor | float, Tensor | float]) -> Tensor:
    constant = torch.ones(len(images), dtype=torch.float64, device=images.device)
    return torch.stack([entry * constant for row in rows for entry in row], 1).view(-1, 2, 3)


def _colour(fill: RGB, images: Tensor) -> Tensor:
    return torch.tensor(fill, dtype=torch.uint8).to(images.device, non_blocking=True)[:, None, None]
