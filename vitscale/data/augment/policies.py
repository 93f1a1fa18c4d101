"""Which operations an image gets and how strong: RandAugment, 3-Augment, colour jitter and blur, drawn by position."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitscale.config.augment import AugmentSection, BlurSection, JitterSection, RandAugmentSection
from vitscale.data.augment.operations import Chosen, Operation
from vitscale.data.draws import BLUR, JITTER, RAND_AUGMENT, THREE_AUGMENT, between, normal, uniform

Array = NDArray[np.float64]
Level = Callable[[Array, Array], Array]
"""(magnitudes over 10, signs of -1 or 1) -> strengths, of one shape."""

EVERY_POLICY: Mapping[Operation, Level] = {
    Operation.AUTO_CONTRAST: lambda m, sign: 0 * m,
    Operation.EQUALIZE: lambda m, sign: 0 * m,
    Operation.INVERT: lambda m, sign: 0 * m,
    Operation.ROTATE: lambda m, sign: 30 * m * sign,
    Operation.SHEAR_X: lambda m, sign: 0.3 * m * sign,
    Operation.SHEAR_Y: lambda m, sign: 0.3 * m * sign,
}
AUGREG: Mapping[Operation, Level] = {
    **EVERY_POLICY,
    Operation.POSTERIZE: lambda m, sign: np.clip(np.trunc(4 * m), 1, 8),
    Operation.SOLARIZE: lambda m, sign: np.trunc(256 * m) % 256,
    Operation.SOLARIZE_ADD: lambda m, sign: np.trunc(110 * m),
    Operation.SATURATION: lambda m, sign: 0.1 + 1.8 * m,
    Operation.CONTRAST: lambda m, sign: 0.1 + 1.8 * m,
    Operation.BRIGHTNESS: lambda m, sign: 0.1 + 1.8 * m,
    Operation.SHARPNESS: lambda m, sign: 0.1 + 1.8 * m,
    Operation.TRANSLATE_X: lambda m, sign: 100 / 224 * m * sign,
    Operation.TRANSLATE_Y: lambda m, sign: 100 / 224 * m * sign,
    Operation.CUT_OUT: lambda m, sign: 40 / 224 * m,
}
"""The levels that AugReg ran with (Steiner et al. 2021, How to train your ViT?), as its code has them.

Its pixels of a 224 px image are shares of the side here. It gave solarize's threshold to an 8-bit number: at
magnitude 15 the 384 became 128, and at 10 and 20 it became 0, which inverts the image. Its last bit posterize keeps.
Three differences remain: its contrast moves away from a constant grey (196 at 224 px), not from the mean; it shears
about the centre of the first pixel, not its corner; and of values between pixels it took the nearest, as we do here,
with another rule for ties.
"""

TIMM: Mapping[Operation, Level] = {
    **EVERY_POLICY,
    Operation.POSTERIZE: lambda m, sign: 4 - np.trunc(4 * m),
    Operation.SOLARIZE: lambda m, sign: 256 - np.trunc(256 * m),
    Operation.SOLARIZE_ADD: lambda m, sign: np.trunc(110 * m),
    Operation.SATURATION: lambda m, sign: np.maximum(0.1, 1 + 0.9 * m * sign),
    Operation.CONTRAST: lambda m, sign: np.maximum(0.1, 1 + 0.9 * m * sign),
    Operation.BRIGHTNESS: lambda m, sign: np.maximum(0.1, 1 + 0.9 * m * sign),
    Operation.SHARPNESS: lambda m, sign: np.maximum(0.1, 1 + 0.9 * m * sign),
    Operation.TRANSLATE_X: lambda m, sign: 0.45 * m * sign,
    Operation.TRANSLATE_Y: lambda m, sign: 0.45 * m * sign,
}
"""The levels of timm's increasing operations."""


@dataclass(frozen=True)
class Policy:
    """RandAugment's operations, of which each layer takes one at random, and how it takes it."""

    levels: Mapping[Operation, Level]
    probability: float  # that the operation taken acts
    noise: float  # standard deviation of the magnitude
    most: float  # greatest magnitude


POLICIES = {
    "augreg": Policy(AUGREG, probability=1.0, noise=0.0, most=np.inf),
    "timm": Policy(TIMM, probability=0.5, noise=0.5, most=10.0),
}

THREE_AUGMENT_CHOICES = np.array([Operation.GREYSCALE, Operation.SOLARIZE, Operation.BLUR])


def draw_operations(section: AugmentSection, seed: int, positions: NDArray[np.int64]) -> Chosen:
    """The operations of the images at these positions [n], in k layers; k = 0 where the section has none."""
    layers = []
    if section.three_augment:
        layers.append(draw_three_augment(seed, positions))
    if section.rand_augment is not None:
        layers.append(draw_rand_augment(section.rand_augment, seed, positions))
    if section.jitter is not None:
        layers.append(draw_jitter(section.jitter, seed, positions))
    if section.blur is not None:
        layers.append(draw_blur(section.blur, seed, positions))
    n = len(positions)
    none = Chosen(np.zeros((n, 0), np.int8), np.zeros((n, 0), np.float32), np.zeros((n, 0, 2), np.float32))
    return Chosen(
        operations=np.concatenate([none.operations, *(chosen.operations for chosen in layers)], axis=1),
        strengths=np.concatenate([none.strengths, *(chosen.strengths for chosen in layers)], axis=1),
        centres=np.concatenate([none.centres, *(chosen.centres for chosen in layers)], axis=1),
    )


def draw_rand_augment(section: RandAugmentSection, seed: int, positions: NDArray[np.int64]) -> Chosen:
    """RandAugment (Cubuk et al. 2020): each layer takes an operation of the policy, all equally likely."""
    policy = POLICIES[section.policy]
    layers = np.arange(section.layers)[:, None]
    draws = uniform(seed, RAND_AUGMENT, positions[:, None, None], layers, np.arange(7))
    choice, acts, side, first, second = (draws[..., i] for i in range(5))
    magnitudes = np.clip(section.magnitude + policy.noise * normal(first, second), 0, policy.most) / 10
    signs = np.where(side < 0.5, -1.0, 1.0)
    strengths = np.stack([level(magnitudes, signs) for level in policy.levels.values()])
    chosen = (choice * len(policy.levels)).astype(np.int64)
    operations = np.where(acts < policy.probability, np.array(list(policy.levels))[chosen], Operation.NOTHING)
    return _chosen(operations, np.take_along_axis(strengths, chosen[None], 0)[0], draws[..., 5:])


def draw_three_augment(seed: int, positions: NDArray[np.int64]) -> Chosen:
    """3-Augment (Touvron et al. 2022, DeiT III): grey, solarized from 128 on or blurred by 0.1 to 2 px."""
    draws = uniform(seed, THREE_AUGMENT, positions[:, None], np.arange(2))
    operations = THREE_AUGMENT_CHOICES[(draws[:, :1] * 3).astype(np.int64)]
    return _chosen(operations, np.where(operations == Operation.SOLARIZE, 128.0, between(0.1, 2.0, draws[:, 1:])))


def draw_jitter(section: JitterSection, seed: int, positions: NDArray[np.int64]) -> Chosen:
    """Four layers: brightness, contrast, saturation and hue in an order of the image's own, as in torchvision."""
    ranges = {
        Operation.BRIGHTNESS: (max(0.0, 1 - section.brightness), 1 + section.brightness),
        Operation.CONTRAST: (max(0.0, 1 - section.contrast), 1 + section.contrast),
        Operation.SATURATION: (max(0.0, 1 - section.saturation), 1 + section.saturation),
        Operation.HUE: (-section.hue, section.hue),
    }
    draws = uniform(seed, JITTER, positions[:, None], np.arange(9))
    order = np.argsort(draws[:, :4], axis=1)
    low, high = np.array(list(ranges.values())).T
    acts = (draws[:, 8:] < section.probability) & (low < high)[order]
    operations = np.where(acts, np.array(list(ranges))[order], Operation.NOTHING)
    return _chosen(operations, np.take_along_axis(between(low, high, draws[:, 4:8]), order, 1))


def draw_blur(section: BlurSection, seed: int, positions: NDArray[np.int64]) -> Chosen:
    """One layer, for a share of the images."""
    draws = uniform(seed, BLUR, positions[:, None], np.arange(2))
    operations = np.where(draws[:, :1] < section.probability, Operation.BLUR, Operation.NOTHING)
    return _chosen(operations, between(*section.sigma, draws[:, 1:]))


def _chosen(operations: NDArray[np.int64], strengths: Array, centres: Array | None = None) -> Chosen:
    if centres is None:
        centres = np.zeros((*operations.shape, 2))
    return Chosen(operations.astype(np.int8), strengths.astype(np.float32), centres.astype(np.float32))
