"""Random erasing (Zhong et al. 2020): rectangles of the normalised images are overwritten."""

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.config.augment import ErasingSection
from vitscale.data.draws import ERASE, ERASE_FILL, between, uniform
from vitscale.data.order import hash64

TRIES = 10
MASK = 0xFFFFFFFF


def draw_rectangles(section: ErasingSection, seed: int, positions: NDArray[np.int64], side: int) -> NDArray[np.int32]:
    """Top, left, height and width in pixels of r rectangles in images of side x side pixels, int32 [n, r, 4].

    Their area is uniform and their height over width log-uniform in the section's ranges, as in timm: one that does
    not fit is drawn again, ten times at most. Height and width are 0 where nothing is erased.
    """
    rectangles = np.arange(section.rectangles)[:, None, None]
    where = positions[:, None, None, None]
    draws = uniform(seed, ERASE, where, rectangles, np.arange(TRIES)[:, None], np.arange(4))
    areas = between(*section.area, draws[..., 0]) * side**2 / section.rectangles
    shapes = np.exp(between(math.log(section.ratio[0]), math.log(section.ratio[1]), draws[..., 1]))
    heights, widths = np.rint(np.sqrt(areas * shapes)), np.rint(np.sqrt(areas / shapes))
    fits = (heights < side) & (widths < side)
    first = fits.argmax(-1)[..., None]
    erased = uniform(seed, ERASE, positions)[:, None, None] < section.probability
    kept = np.take_along_axis(fits, first, -1) & erased
    height, width, down, across = (
        np.take_along_axis(values, first, -1) for values in (heights, widths, draws[..., 2], draws[..., 3])
    )
    top, left = np.trunc(down * (side - height + 1)), np.trunc(across * (side - width + 1))
    return np.where(kept, np.concatenate([top, left, height, width], -1), 0).astype(np.int32)


def draw_fill_keys(seed: int, positions: NDArray[np.int64], rectangles: int) -> NDArray[np.int64]:
    """Keys of the colours that are written, 32 bits each, int64 [n, r]."""
    return (hash64(seed, ERASE_FILL, positions[:, None], np.arange(rectangles)) & np.uint64(MASK)).astype(np.int64)


def erase(
    images: Tensor, rectangles: NDArray[np.int32], keys: NDArray[np.int64], fill: Literal["const", "rand", "pixel"]
) -> Tensor:
    """Images with their rectangles overwritten, a later one over an earlier one.

    Args:
        images: fp32 [B, 3, S, S], normalised: 0 is the mean colour, 1 a standard deviation.
        rectangles: of `draw_rectangles`, [B, r, 4], in host memory: only images that have some are worked on.
        keys: of `draw_fill_keys`, [B, r].
        fill: const writes 0, rand one normally distributed number a channel, pixel one a channel and pixel.
    """
    chosen = np.flatnonzero(rectangles[:, :, 2].any(1))
    where, boxes, seeds = (
        torch.from_numpy(array).to(images.device, non_blocking=True)
        for array in (chosen, rectangles[chosen], keys[chosen])
    )
    erased = images[where]
    channels, height, width = images.shape[1:]
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    for box, key in zip(boxes.unbind(1), seeds.unbind(1), strict=True):
        tops, lefts, heights, widths = box[:, :, None].unbind(1)
        in_rows = (rows >= tops) & (rows < tops + heights)
        in_columns = (columns >= lefts) & (columns < lefts + widths)
        inside = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
        if fill == "const":
            colours = images.new_zeros(1, 1, 1, 1)
        else:
            shape = (channels, height, width) if fill == "pixel" else (channels, 1, 1)
            colours = hashed_normal(key, math.prod(shape)).view(-1, *shape)
        erased = torch.where(inside, colours, erased)
    return images.index_copy(0, where, erased)


def hashed_normal(keys: Tensor, count: int) -> Tensor:
    """`count` standard normal numbers for each 32-bit key, a function of the key alone, fp32 [n, count].

    Two hashes of (key, place) through Box and Muller's transform, on the device of the keys.
    """
    places = torch.arange(count, device=keys.device)
    first, second = (_hash32(_hash32(places + word * count) ^ keys[:, None]) for word in range(2))
    radius = torch.sqrt(-2 * torch.log((first.float() + 1) * 2.0**-32))
    return radius * torch.cos(2 * math.pi * 2.0**-32 * second.float())


def _hash32(values: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Appleby 2011) on 32 bits held in int64; products wrap, and the low bits stay."""
    values = ((values ^ (values >> 16)) * 0x85EBCA6B) & MASK
    values = ((values ^ (values >> 13)) * 0xC2B2AE35) & MASK
    return values ^ (values >> 16)
