"""Operations on the colours of uint8 images [n, 3, H, W], each with a strength for every image, [n].

They give Pillow's values, which the published augmentations were made with. Pillow cuts fractions off where an
image is blended with another, and so does this module.
"""

import torch
from torch import Tensor

LEVELS = 256


def invert(images: Tensor) -> Tensor:
    """The negative."""
    return 255 - images


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """The negative of all values from the threshold on; a threshold of 256 changes nothing."""
    return torch.where(images < _spread(thresholds), images, 255 - images)


def solarize_add(images: Tensor, additions: Tensor) -> Tensor:
    """Values below 128 get the (whole) addition, up to 255."""
    return torch.where(images < 128, (images.int() + _spread(additions).int()).clamp(0, 255).to(torch.uint8), images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep this many of the high bits of each value, 0 to 8."""
    kept = 256 - 2 ** (8 - bits.int())
    return images & _spread(kept).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """Luma of ITU-R BT.601 in Pillow's fixed point, int32 [n, 1, H, W]."""
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None]


def greyscale(images: Tensor) -> Tensor:
    """The luma in all three channels."""
    return grey(images).to(torch.uint8).expand_as(images)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Away from black: 0 is black, 1 the image, more is brighter."""
    return blend(torch.zeros_like(images), images, factors)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Away from the mean luma: 0 is flat, 1 the image, more is steeper."""
    mean = grey(images).double().mean((1, 2, 3), keepdim=True)
    return blend((mean + 0.5).floor(), images, factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Away from grey: 0 is grey, 1 the image, more is more colourful."""
    return blend(grey(images), images, factors)


def blend(start: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """start + factor * (images - start), cut to whole values from 0 to 255; `start` broadcasts to the images."""
    start = start.float()
    return (start + _spread(factors) * (images.float() - start)).clamp(0, 255).to(torch.uint8)


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch each channel so that its least value becomes 0 and its greatest 255; a flat channel stays."""
    low, high = (edge(images.flatten(2), dim=2, keepdim=True).double() for edge in (torch.amin, torch.amax))
    # Pillow's sum, in its form and in fp64: where the exact value is whole, others fall on its other side. (torch
    # takes 255 / tensor for 255 times the reciprocal, which is another number.)
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)
    stretched = (_all_values(images).double() * scale - low * scale).clamp(0, 255)
    return _look_up(torch.where(high > low, stretched, _all_values(images)), images)


def equalize(images: Tensor) -> Tensor:
    """Spread the values of each channel so that their histogram is flat, as far as whole values can."""
    counts = _histograms(images)
    greatest = images.flatten(2).amax(2, keepdim=True).long()
    step = (counts.sum(2, keepdim=True) - counts.gather(2, greatest)) // 255
    below = counts.cumsum(2) - counts
    spread = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return _look_up(torch.where(step > 0, spread, _all_values(images)), images)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue by this part of the colour circle, -0.5 to 0.5, through HSV as torchvision does."""
    rgb = images.float() / 255
    value, chroma = rgb.amax(1), rgb.amax(1) - rgb.amin(1)
    red, green, blue = rgb.unbind(1)
    divisor = chroma.clamp(min=1e-6)  # where it is 0 there is no hue, and none is needed
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    turned = sector + 6 * turns[:, None, None]
    # Each channel stands at full value for two sectors of six, ramps for one, and is down for two (Smith 1978).
    places = 5 - 2 * torch.arange(3, device=images.device)  # of red, green and blue
    phase = (turned[:, None] + places[:, None, None]) % 6
    ramp = torch.minimum(phase, 4 - phase).clamp(0, 1)
    return ((value[:, None] - chroma[:, None] * ramp) * 255).round().to(torch.uint8)


def _spread(strengths: Tensor) -> Tensor:
    return strengths[:, None, None, None]


def _all_values(images: Tensor) -> Tensor:
    return torch.arange(LEVELS, device=images.device)


def _histograms(images: Tensor) -> Tensor:
    """How often each value occurs in each channel, int64 [n, 3, 256]."""
    values = images.flatten(2).long()
    counts = torch.zeros(*values.shape[:2], LEVELS, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, values, torch.ones_like(values))


def _look_up(tables: Tensor, images: Tensor) -> Tensor:
    """Each value through its channel's table [n, 3, 256], whose fractions are cut off."""
    return tables.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)
