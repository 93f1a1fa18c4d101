"""Against Pillow through timm's functions, on the same strengths."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from torch import Tensor
from unit.data.test_data_augment_colour import by_pillow, pictures

from vitscale.data.augment import geometry

FILL = (124, 116, 104)
CASES = [
    (geometry.rotate, timm_ops.rotate, [-60.0, -27.3, 0.0, 12.5, 45.0]),
    (geometry.shear_x, timm_ops.shear_x, [-0.59, -0.27, 0.0, 0.31]),
    (geometry.shear_y, timm_ops.shear_y, [-0.59, -0.27, 0.0, 0.31]),
    (geometry.translate_x, timm_ops.translate_x_rel, [-0.9, -0.405, 0.0, 0.21]),
    (geometry.translate_y, timm_ops.translate_y_rel, [-0.9, -0.405, 0.0, 0.21]),
]
Matrices = Callable[[Tensor, Tensor], Tensor]
PillowOperation = Callable[..., Image.Image]


@pytest.mark.parametrize(("ours", "theirs", "strengths"), CASES)
def test_bilinear_maps_are_pillows(ours: Matrices, theirs: PillowOperation, strengths: list[float]) -> None:
    """Pillow cuts the fraction off that we round: 1 of 255 may lie between. The filled pixels are the same."""
    images = pictures()
    for strength in np.float32(strengths).tolist():
        expected = by_pillow(
            images, lambda i, s=strength: theirs(i, s, fillcolor=FILL, resample=Image.Resampling.BILINEAR)
        )
        result = geometry.warp(images, ours(images, torch.full((5,), strength)), FILL, nearest=False)
        difference = result.int() - expected.int()
        assert difference.min() >= 0
        assert difference.max() <= 1
        if strength == 0:
            torch.testing.assert_close(result, images, rtol=0, atol=0)


@pytest.mark.parametrize(("ours", "theirs", "strengths"), CASES)
def test_nearest_maps_are_pillows(ours: Matrices, theirs: PillowOperation, strengths: list[float]) -> None:
    """Pillow holds places in steps of 1/65536 px and may so take the neighbour where two are equally near."""
    images = pictures()
    for strength in np.float32(strengths).tolist():
        expected = by_pillow(
            images, lambda i, s=strength: theirs(i, s, fillcolor=FILL, resample=Image.Resampling.NEAREST)
        )
        result = geometry.warp(images, ours(images, torch.full((5,), strength)), FILL, nearest=True)
        assert (result != expected).any(1).float().mean() < 0.01


def test_each_image_has_its_own_map() -> None:
    images, strengths = pictures(), torch.tensor([-0.3, 0.0, 0.1, 0.2, 0.5])
    for ours, _, _ in CASES:
        matrices = ours(images, strengths)
        alone = [geometry.warp(images[i : i + 1], matrices[i : i + 1], FILL, nearest=False) for i in range(5)]
        together = geometry.warp(images, matrices, FILL, nearest=False)
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)


def test_a_square_is_cut_out_around_its_centre_and_at_the_rim() -> None:
    """AugReg's rule: half-open from centre - half to centre + half, both whole, cut off at the rim."""
    images = pictures()[:, :, :, :24]
    halves = torch.tensor([0.0, 2 / 24, 5 / 24, 9 / 24, 1.0])
    centres = torch.tensor([[0.5, 0.5], [0.5, 0.25], [0.0, 0.999], [0.9, 0.1], [0.3, 0.3]])
    expected = images.clone()
    for i, (half, (y, x)) in enumerate(
        zip((0, 2, 5, 9, 24), ((12, 12), (12, 6), (0, 23), (21, 2), (7, 7)), strict=True)
    ):
        colour = torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
        expected[i, :, max(0, y - half) : y + half, max(0, x - half) : x + half] = colour
    torch.testing.assert_close(geometry.cut_out(images, halves, centres, FILL), expected, rtol=0, atol=0)
