import math
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from timm.data import auto_augment as timm_ops

from vitscale.config.augment import AugmentSection, BlurSection, JitterSection, RandAugmentSection
from vitscale.data.augment import policies
from vitscale.data.augment.operations import Operation
from vitscale.data.augment.policies import AUGREG, POLICIES, TIMM, draw_operations

POSITIONS = np.arange(1000, 21_000)
TIMM_NAMES = {
    Operation.AUTO_CONTRAST: "AutoContrast",
    Operation.EQUALIZE: "Equalize",
    Operation.INVERT: "Invert",
    Operation.ROTATE: "Rotate",
    Operation.POSTERIZE: "PosterizeIncreasing",
    Operation.SOLARIZE: "SolarizeIncreasing",
    Operation.SOLARIZE_ADD: "SolarizeAdd",
    Operation.SATURATION: "ColorIncreasing",
    Operation.CONTRAST: "ContrastIncreasing",
    Operation.BRIGHTNESS: "BrightnessIncreasing",
    Operation.SHARPNESS: "SharpnessIncreasing",
    Operation.SHEAR_X: "ShearX",
    Operation.SHEAR_Y: "ShearY",
    Operation.TRANSLATE_X: "TranslateXRel",
    Operation.TRANSLATE_Y: "TranslateYRel",
}


def test_timms_policy_is_rand_m9_mstd05_inc1() -> None:
    theirs = timm_ops.rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    assert {op.name for op in theirs.ops} == {TIMM_NAMES[operation] for operation in TIMM}
    assert len(theirs.ops) == len(TIMM)
    assert {(op.prob, op.magnitude_std, op.magnitude_max) for op in theirs.ops} == {(0.5, 0.5, None)}
    policy = POLICIES["timm"]
    assert (policy.probability, policy.noise, policy.most) == (0.5, 0.5, timm_ops._LEVEL_DENOM)
    assert theirs.num_layers == RandAugmentSection().layers == 2


@pytest.mark.parametrize("operation", TIMM)
@pytest.mark.parametrize("magnitude", [0.0, 2.4, 7.5, 9.0, 10.0])
def test_timms_levels_are_timms(operation: Operation, magnitude: float) -> None:
    level = timm_ops.LEVEL_TO_ARG[TIMM_NAMES[operation]]
    for sign, thrown in ((1.0, 0.1), (-1.0, 0.9)):
        with mock.patch.object(timm_ops.random, "random", return_value=thrown):
            (expected,) = level(magnitude, {}) if level else (0,)
        strength = TIMM[operation](np.array([magnitude / 10]), np.array([sign]))
        assert strength == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("magnitude", "posterize", "solarize", "addition", "factor", "degrees", "shear", "moved_px", "half_px"),
    [
        (0, 1, 0, 0, 0.1, 0, 0, 0, 0),
        (10, 4, 0, 110, 1.9, 30, 0.3, 100, 40),
        (15, 6, 128, 165, 2.8, 45, 0.45, 150, 60),
        (20, 8, 0, 220, 3.7, 60, 0.6, 200, 80),
    ],
)
def test_augregs_levels_at_224_px(
    magnitude: float,
    posterize: int,
    solarize: int,
    addition: int,
    factor: float,
    degrees: float,
    shear: float,
    moved_px: float,
    half_px: float,
) -> None:
    """The numbers that AugReg's TensorFlow code gives its operations, for the magnitudes of the paper."""
    levels = {operation: level(np.array([magnitude / 10]), np.array([-1.0]))[0] for operation, level in AUGREG.items()}
    expected = {
        Operation.AUTO_CONTRAST: 0,
        Operation.EQUALIZE: 0,
        Operation.INVERT: 0,
        Operation.POSTERIZE: posterize,
        Operation.SOLARIZE: solarize,
        Operation.SOLARIZE_ADD: addition,
        Operation.SATURATION: factor,
        Operation.CONTRAST: factor,
        Operation.BRIGHTNESS: factor,
        Operation.SHARPNESS: factor,
        Operation.ROTATE: -degrees,
        Operation.SHEAR_X: -shear,
        Operation.SHEAR_Y: -shear,
        Operation.TRANSLATE_X: -moved_px / 224,
        Operation.TRANSLATE_Y: -moved_px / 224,
        Operation.CUT_OUT: half_px / 224,
    }
    assert levels == pytest.approx(expected)


def assert_share(chosen: np.ndarray, expected: float) -> None:
    """A share within five standard deviations of its expectation."""
    assert abs(chosen.mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / chosen.size)


@pytest.mark.parametrize("policy", ["augreg", "timm"])
def test_each_layer_takes_every_operation_equally_often(policy: str) -> None:
    section = AugmentSection.model_validate({"rand_augment": {"policy": policy, "layers": 3, "magnitude": 9}})
    drawn = draw_operations(section, 5, POSITIONS)
    assert drawn.operations.shape == drawn.strengths.shape == (len(POSITIONS), 3)
    found = POLICIES[policy]
    for operation in found.levels:
        assert_share(drawn.operations == operation, found.probability / len(found.levels))
    for first, second in pairwise(drawn.operations.T):
        assert_share(first == second, (1 - found.probability) ** 2 + found.probability**2 / len(found.levels))
    signs = np.sign(drawn.strengths[drawn.operations == Operation.ROTATE])
    assert set(signs) == {-1.0, 1.0}
    assert_share(signs > 0, 0.5)


def test_augregs_strengths_are_fixed_and_timms_spread() -> None:
    augreg, timm = (
        draw_operations(AugmentSection(rand_augment=RandAugmentSection(policy=policy, magnitude=9)), 0, POSITIONS)
        for policy in ("augreg", "timm")
    )
    assert set(augreg.strengths[augreg.operations == Operation.BRIGHTNESS].tolist()) == {np.float32(0.1 + 1.8 * 0.9)}
    angles = np.abs(timm.strengths[timm.operations == Operation.ROTATE])
    # 30 degrees at magnitude 10, which cuts two sigmas and more off: sd of the cut normal is about 0.97 of 1.5 degrees.
    assert abs(angles.mean() - 27) < 0.3
    assert 1.3 < angles.std() < 1.6
    assert angles.max() == 30
    assert_share(angles == 30, 0.02275)


def test_a_square_is_cut_out_anywhere() -> None:
    drawn = draw_operations(AugmentSection(rand_augment=RandAugmentSection()), 0, POSITIONS)
    for axis in range(2):
        centres = np.sort(drawn.centres[:, 0, axis])
        assert np.abs(centres - (np.arange(len(centres)) + 0.5) / len(centres)).max() < 2.7 / math.sqrt(len(centres))
    assert abs(np.corrcoef(drawn.centres[:, 0].T)[0, 1]) < 5 / math.sqrt(len(POSITIONS))


def test_3_augment_takes_one_of_three() -> None:
    drawn = draw_operations(AugmentSection(three_augment=True), 0, POSITIONS)
    operations, strengths = drawn.operations[:, 0], drawn.strengths[:, 0]
    for operation in (Operation.GREYSCALE, Operation.SOLARIZE, Operation.BLUR):
        assert_share(operations == operation, 1 / 3)
    assert set(strengths[operations == Operation.SOLARIZE]) == {128}
    sigmas = np.sort(strengths[operations == Operation.BLUR])
    assert sigmas[0] >= 0.1
    assert sigmas[-1] <= 2
    assert np.abs((sigmas - 0.1) / 1.9 - (np.arange(len(sigmas)) + 0.5) / len(sigmas)).max() < 2.7 / math.sqrt(
        len(sigmas)
    )


def test_jitter_has_torchvisions_ranges_in_every_order() -> None:
    section = JitterSection(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1, probability=0.8)
    drawn = draw_operations(AugmentSection(jitter=section), 0, POSITIONS)
    acts = drawn.operations[:, 0] != Operation.NOTHING
    assert_share(acts, 0.8)
    assert (drawn.operations[~acts] == Operation.NOTHING).all()
    orders, counts = np.unique(drawn.operations[acts], axis=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > acts.sum() / 24 - 5 * math.sqrt(acts.sum() / 24)
    ranges = {
        Operation.BRIGHTNESS: (0.6, 1.4),
        Operation.CONTRAST: (0.0, 2.5),
        Operation.SATURATION: (0.8, 1.2),
        Operation.HUE: (-0.1, 0.1),
    }
    for operation, (low, high) in ranges.items():
        values = np.sort((drawn.strengths[drawn.operations == operation] - low) / (high - low))
        assert np.abs(values - (np.arange(len(values)) + 0.5) / len(values)).max() < 2.7 / math.sqrt(len(values))


def test_jitter_leaves_out_what_has_no_range() -> None:
    drawn = draw_operations(AugmentSection(jitter=JitterSection(contrast=0.3)), 0, POSITIONS[:100])
    assert (np.sort(drawn.operations, axis=1)[:, 3] == Operation.CONTRAST).all()
    assert (np.sort(drawn.operations, axis=1)[:, :3] == Operation.NOTHING).all()


def test_blur_has_its_probability_and_range() -> None:
    drawn = draw_operations(AugmentSection(blur=BlurSection(probability=0.3, sigma=(0.5, 1.0))), 0, POSITIONS)
    assert set(drawn.operations[:, 0].tolist()) == {Operation.NOTHING, Operation.BLUR}
    assert_share(drawn.operations == Operation.BLUR, 0.3)
    assert drawn.strengths.min() >= 0.5
    assert drawn.strengths.max() <= 1.0


def test_layers_stand_in_the_order_of_the_config() -> None:
    section = AugmentSection(
        three_augment=True,
        rand_augment=RandAugmentSection(layers=1),
        jitter=JitterSection(hue=0.1),
        blur=BlurSection(probability=1.0),
    )
    drawn = draw_operations(section, 0, POSITIONS[:50])
    assert set(drawn.operations[:, 0].tolist()) <= set(policies.THREE_AUGMENT_CHOICES.tolist())
    assert set(drawn.operations[:, 1].tolist()) <= set(AUGREG)
    assert set(drawn.operations[:, 2:6].ravel().tolist()) == {Operation.NOTHING, Operation.HUE}
    assert (drawn.operations[:, 6] == Operation.BLUR).all()
    assert draw_operations(AugmentSection(), 0, POSITIONS[:50]).operations.shape == (50, 0)
