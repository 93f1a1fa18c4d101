"""Every operation against Pillow, through timm's functions where it has them, on the same strengths: bit for bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from torch import Tensor
from torchvision.transforms import v2

from vitscale.data.augment import colour


def pictures() -> Tensor:
    """Noise, a dim ramp, two flat images and one with few values, uint8 [5, 3, 24, 37]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 24, 37), generator=generator)
    ramp = torch.arange(24)[:, None] * 3 + torch.arange(37) + torch.tensor([20, 60, 100])[:, None, None]
    few = torch.tensor([3, 4, 200])[torch.randint(0, 3, (3, 24, 37), generator=generator)]
    flat = torch.tensor([[7, 130, 250], [0, 255, 128]])[:, :, None, None].expand(2, 3, 24, 37)
    return torch.cat([noise[None], ramp[None], few[None], flat]).to(torch.uint8)


def by_pillow(images: Tensor, operation: Callable[[Image.Image], Image.Image]) -> Tensor:
    changed = [operation(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in changed])).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (colour.invert, timm_ops.invert),
        (colour.auto_contrast, timm_ops.auto_contrast),
        (colour.equalize, timm_ops.equalize),
        (colour.greyscale, lambda image: image.convert("L").convert("RGB")),
    ],
)
def test_operations_without_strength_are_pillows(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Image.Image], Image.Image]
) -> None:
    images = pictures()
    torch.testing.assert_close(ours(images), by_pillow(images, theirs), rtol=0, atol=0)


@pytest.mark.parametrize("value_range", range(2, 256, 7))
def test_auto_contrast_and_equalize_are_pillows_for_every_range(value_range: int) -> None:
    generator = torch.Generator().manual_seed(value_range)
    images = torch.randint(255 - value_range, 256, (4, 3, 20, 20), generator=generator).to(torch.uint8)
    images[1] -= images[1].min()
    theirs = by_pillow(images, timm_ops.auto_contrast)
    torch.testing.assert_close(colour.auto_contrast(images), theirs, rtol=0, atol=0)
    torch.testing.assert_close(colour.equalize(images), by_pillow(images, timm_ops.equalize), rtol=0, atol=0)


FACTORS = [0.0, 0.1, 0.37, 1.0, 1.9, 2.8, 3.7]


@pytest.mark.parametrize(
    ("ours", "theirs", "strengths"),
    [
        (colour.solarize, timm_ops.solarize, [0, 1, 100, 128, 255, 256]),
        (colour.solarize_add, timm_ops.solarize_add, [0, 1, 60, 110, 165, 220]),
        (colour.brightness, timm_ops.brightness, FACTORS),
        (colour.contrast, timm_ops.contrast, FACTORS),
        (colour.saturation, timm_ops.color, FACTORS),
    ],
)
def test_operations_with_a_strength_are_pillows(
    ours: Callable[[Tensor, Tensor], Tensor],
    theirs: Callable[[Image.Image, float], Image.Image],
    strengths: list[float],
) -> None:
    for strength in strengths:
        images = pictures()
        expected = by_pillow(images, lambda image, strength=strength: theirs(image, strength))
        result = ours(images, torch.full((len(images),), float(strength)))
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_posterize_is_pillows_and_keeps_0_to_8_bits() -> None:
    images = pictures()[:1].expand(9, -1, -1, -1)
    result = colour.posterize(images, torch.arange(9.0))
    assert not result[0].any()
    for bits in range(1, 9):  # Pillow takes no 0
        expected = by_pillow(images[:1], lambda image, bits=bits: timm_ops.posterize(image, bits))
        torch.testing.assert_close(result[bits : bits + 1], expected, rtol=0, atol=0)


def test_each_image_has_its_own_strength() -> None:
    images = pictures()
    strengths = torch.tensor([0.2, 0.7, 1.3, 2.0, 0.0])
    for operation in (colour.brightness, colour.contrast, colour.saturation, colour.hue):
        strengths = strengths if operation is not colour.hue else strengths / 4
        alone = [operation(images[i : i + 1], strengths[i : i + 1]) for i in range(5)]
        torch.testing.assert_close(operation(images, strengths), torch.cat(alone), rtol=0, atol=0)


@pytest.mark.parametrize("turn", [-0.5, -0.21, 0.0, 0.07, 0.33, 0.5])
def test_hue_is_torchvisions(turn: float) -> None:
    """torchvision takes 255.999 times a channel and cuts the fraction off, we round 255 times it: 1 may lie between."""
    images = pictures()
    expected = v2.functional.adjust_hue(images, turn)
    result = colour.hue(images, torch.full((len(images),), turn))
    torch.testing.assert_close(result, expected, rtol=0, atol=1)
    assert (result != expected).float().mean() < 0.1
