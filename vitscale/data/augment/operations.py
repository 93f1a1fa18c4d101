"""One operation an image, each image its own: what RandAugment, 3-Augment, colour jitter and blur are made of."""

from dataclasses import dataclass
from enum import IntEnum, auto
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.data.augment import colour, filters, geometry


class Operation(IntEnum):
    """What is done to an image, and what its strength means."""

    NOTHING = 0
    AUTO_CONTRAST = auto()  # no strength
    EQUALIZE = auto()  # no strength
    INVERT = auto()  # no strength
    GREYSCALE = auto()  # no strength
    SOLARIZE = auto()  # least value that is inverted, 0 to 256
    SOLARIZE_ADD = auto()  # added to the values below 128
    POSTERIZE = auto()  # bits that are kept, 0 to 8
    BRIGHTNESS = auto()  # factor
    CONTRAST = auto()  # factor
    SATURATION = auto()  # factor
    HUE = auto()  # part of the colour circle, -0.5 to 0.5
    SHARPNESS = auto()  # factor
    BLUR = auto()  # standard deviation in pixels, up to 2
    ROTATE = auto()  # degrees counter-clockwise
    SHEAR_X = auto()  # factor
    SHEAR_Y = auto()  # factor
    TRANSLATE_X = auto()  # share of the width
    TRANSLATE_Y = auto()  # share of the height
    CUT_OUT = auto()  # half of the square's side over the image's


WITHOUT_STRENGTH = {
    Operation.AUTO_CONTRAST: colour.auto_contrast,
    Operation.EQUALIZE: colour.equalize,
    Operation.INVERT: colour.invert,
    Operation.GREYSCALE: colour.greyscale,
}
WITH_STRENGTH = {
    Operation.SOLARIZE: colour.solarize,
    Operation.SOLARIZE_ADD: colour.solarize_add,
    Operation.POSTERIZE: colour.posterize,
    Operation.BRIGHTNESS: colour.brightness,
    Operation.CONTRAST: colour.contrast,
    Operation.SATURATION: colour.saturation,
    Operation.HUE: colour.hue,
    Operation.SHARPNESS: filters.sharpness,
    Operation.BLUR: filters.gaussian_blur,
}
MATRICES = {
    Operation.ROTATE: geometry.rotate,
    Operation.SHEAR_X: geometry.shear_x,
    Operation.SHEAR_Y: geometry.shear_y,
    Operation.TRANSLATE_X: geometry.translate_x,
    Operation.TRANSLATE_Y: geometry.translate_y,
}


@dataclass(frozen=True)
class Chosen:
    """Operations of n images in k layers, as a loader process draws them."""

    operations: NDArray[np.int8]  # [n, k], of Operation
    strengths: NDArray[np.float32]  # [n, k]
    centres: NDArray[np.float32]  # [n, k, 2], where a square is cut out, as shares of height and width


def apply_layers(images: Tensor, chosen: Chosen, fill: geometry.RGB, *, nearest: bool) -> Tensor:
    """Images after the layers of their operations, one after the other.

    Args:
        images: uint8 [n, 3, H, W], on any device.
        chosen: their operations, in host memory: what is launched on the device follows from them without waiting.
        fill: colour of what is moved in or cut out.
        nearest: whether pixels that move take the nearest value, not an interpolated one.
    """
    # In each layer, images of one operation side by side.
    order = np.argsort(chosen.operations, axis=0, kind="stable")
    sorted_operations = np.take_along_axis(chosen.operations, order, 0)
    rows, strengths, centres = (
        torch.from_numpy(array).to(images.device, non_blocking=True)
        for array in (order, chosen.strengths, chosen.centres)
    )
    for layer, operations in enumerate(sorted_operations.T):
        changed = images.clone()
        starts = np.flatnonzero(np.diff(operations, prepend=-1))
        for start, end in pairwise([*starts.tolist(), len(operations)]):
            operation = Operation(operations[start])
            if operation is Operation.NOTHING:
                continue
            group = rows[start:end, layer]
            strength, centre = strengths[group, layer], centres[group, layer]
            changed[group] = apply_operation(operation, images[group], strength, centre, fill, nearest=nearest)
        images = changed
    return images


def apply_operation(
    operation: Operation, images: Tensor, strengths: Tensor, centres: Tensor, fill: geometry.RGB, *, nearest: bool
) -> Tensor:
    """All images [n, 3, H, W] after one operation; strengths [n], centres [n, 2] as in `Chosen`."""
    if operation in WITHOUT_STRENGTH:
        return WITHOUT_STRENGTH[operation](images)
    if operation in WITH_STRENGTH:
        return WITH_STRENGTH[operation](images, strengths)
    if operation in MATRICES:
        return geometry.warp(images, MATRICES[operation](images, strengths), fill, nearest=nearest)
    assert operation is Operation.CUT_OUT
    return geometry.cut_out(images, strengths, centres, fill)
