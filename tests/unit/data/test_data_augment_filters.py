import pytest
import torch
import torch.nn.functional as F
from timm.data import auto_augment as timm_ops
from torchvision.transforms import v2
from unit.data.test_data_augment_colour import by_pillow, pictures

from vitscale.data.augment import filters


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.8, 1.0, 1.9, 3.7])
def test_sharpness_is_pillows(factor: float) -> None:
    images = pictures()
    expected = by_pillow(images, lambda image: timm_ops.sharpness(image, factor))
    torch.testing.assert_close(filters.sharpness(images, torch.full((5,), factor)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.3, 2.0])
def test_blur_is_torchvisions_inside_a_continued_rim(sigma: float) -> None:
    """Both sum 13 x 13 products in fp32 in orders of their own and then round: 1 of 255 may lie between."""
    images = pictures()
    radius = filters.BLUR_RADIUS
    wider = F.pad(images.float(), (radius,) * 4, mode="replicate").to(torch.uint8)
    expected = v2.functional.gaussian_blur(wider, 2 * radius + 1, sigma)[..., radius:-radius, radius:-radius]
    result = filters.gaussian_blur(images, torch.full((5,), sigma))
    torch.testing.assert_close(result, expected, rtol=0, atol=1)
    assert (result != expected).float().mean() < 0.001


def test_each_image_has_its_own_blur_whatever_else_is_in_the_batch() -> None:
    images, sigmas = pictures(), torch.tensor([0.1, 0.6, 1.1, 1.6, 2.0])
    alone = [filters.gaussian_blur(images[i : i + 1], sigmas[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(filters.gaussian_blur(images, sigmas), torch.cat(alone), rtol=0, atol=0)
