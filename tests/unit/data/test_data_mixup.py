import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from timm.data import mixup as timm_mixup

from vitscale.config.augment import MixSection
from vitscale.data.draws import MIX, symmetric_beta, uniform
from vitscale.data.mixup import MixedLabels, draw_mix, mix

SIDE = 32
POSITIONS = np.arange(12_000)


class Replayed:
    """Stands for `numpy.random` in timm: hands out the centres of our boxes, row first."""

    def __init__(self, centres: np.ndarray) -> None:
        self.centres = iter(centres)

    def randint(self, low: int, high: int, size: int | None = None) -> int:
        assert (low, high) == (0, SIDE)
        return int(SIDE * next(self.centres))


def probabilities(mixed: MixedLabels, num_classes: int) -> torch.Tensor:
    """What the targets say of every class, [B, C]."""
    own, partner = (F.one_hot(labels, num_classes) for labels in mixed[:2])
    weights = mixed.weights[:, None]
    return weights * own + (1 - weights) * partner


def test_images_and_targets_are_timms_on_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm pairs the first with the last; our pairs are neighbours. Its CutMix counts pixels as ours."""
    section = MixSection(mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.9)
    positions = np.arange(40, 80)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(0, 10, (40,), generator=generator)
    weights, boxes = draw_mix(section, 7, positions, SIDE)
    mixed, targets = mix(images, labels, torch.from_numpy(weights), torch.from_numpy(boxes))

    draws = uniform(7, MIX, positions[::2, None] // 2, np.arange(6))
    cut = boxes[::2, 2] > boxes[::2, 0]
    assert 5 < cut.sum() < 15
    lam = np.where(cut, symmetric_beta(1.0, draws[:, 2], draws[:, 3]), weights[::2])
    theirs = timm_mixup.Mixup(mode="pair", num_classes=10, label_smoothing=0.0)
    monkeypatch.setattr(theirs, "_params_per_elem", lambda count: (lam.copy(), cut))
    monkeypatch.setattr(timm_mixup.np, "random", Replayed(draws[cut][:, 4:].ravel()))
    first_then_last = torch.cat([torch.arange(0, 40, 2), torch.arange(1, 40, 2).flip(0)])
    expected, expected_targets = theirs(images[first_then_last].clone(), labels[first_then_last])
    torch.testing.assert_close(mixed[first_then_last], expected, rtol=0, atol=1e-6)
    dense = probabilities(targets, 10)
    torch.testing.assert_close(dense[first_then_last], expected_targets, rtol=0, atol=1e-6)


def test_both_of_a_pair_have_the_same_numbers_and_every_pair_its_own() -> None:
    weights, boxes = draw_mix(MixSection(mixup_alpha=0.5, cutmix_alpha=0.5), 0, POSITIONS, SIDE)
    np.testing.assert_array_equal(weights[::2], weights[1::2])
    np.testing.assert_array_equal(boxes[::2], boxes[1::2])
    mixup = weights[::2][boxes[::2, 2] == 0]
    assert len(np.unique(mixup)) > 0.9 * len(mixup)  # the ends of the law are many times the same in fp32
    some = np.array([6, 7, 900, 901])
    np.testing.assert_array_equal(
        draw_mix(MixSection(mixup_alpha=0.5), 0, some, SIDE)[0][:2],
        draw_mix(MixSection(mixup_alpha=0.5), 0, some[:2], SIDE)[0],
    )


@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_mixups_share_is_beta(alpha: float) -> None:
    weights, boxes = draw_mix(MixSection(mixup_alpha=alpha), 0, POSITIONS, SIDE)
    assert not boxes.any()
    values = np.geomspace(1e-15, 0.5, 200)
    law = stats.beta(alpha, alpha).cdf(values)
    assert np.abs((weights[::2, None] < values).mean(0) - law).max() < 2.7 / math.sqrt(len(POSITIONS) / 2)


def test_cutmixs_boxes_have_uniform_centres_and_beta_areas() -> None:
    """In an image so large that whole pixels do not show; area where the box is not cut off at the rim."""
    side = 100_000
    weights, boxes = draw_mix(MixSection(cutmix_alpha=1.0), 0, POSITIONS, side)
    top, left, bottom, right = boxes[::2].astype(np.int64).T
    np.testing.assert_allclose(weights[::2], 1 - (bottom - top) * (right - left) / side**2, atol=1e-6)
    draws = uniform(0, MIX, POSITIONS[::2, None] // 2, np.arange(6))
    whole = (top > 0) & (left > 0) & (bottom < side) & (right < side)
    np.testing.assert_allclose((top + bottom)[whole] / 2 / side, draws[whole, 4], atol=2e-5)
    np.testing.assert_allclose((left + right)[whole] / 2 / side, draws[whole, 5], atol=2e-5)
    np.testing.assert_array_equal((bottom - top)[whole], (right - left)[whole])
    # P(whole box of area s inside) is (1 - sqrt(s))^2, so the areas of whole boxes have that density times 6.
    areas = (1 - weights[::2])[whole]
    root = np.sqrt(np.sort(areas))
    cdf = 6 * (root**2 - 4 / 3 * root**3 + root**4 / 2)
    assert abs(whole.mean() - 1 / 6) < 5 * math.sqrt(5 / 36 / len(whole))
    assert np.abs(cdf - (np.arange(len(cdf)) + 0.5) / len(cdf)).max() < 2.7 / math.sqrt(len(cdf))


@pytest.mark.parametrize(
    ("section", "mixup", "cutmix"),
    [
        ({"mixup_alpha": 1.0, "cutmix_alpha": 1.0, "probability": 0.6, "cutmix_share": 0.25}, 0.45, 0.15),
        ({"mixup_alpha": 1.0, "probability": 0.5}, 0.5, 0.0),
        ({"cutmix_alpha": 1.0, "probability": 0.5}, 0.0, 0.5),
        ({"mixup_alpha": 1.0, "cutmix_alpha": 1.0, "probability": 0.0}, 0.0, 0.0),
    ],
)
def test_mixup_and_cutmix_take_their_shares(section: dict[str, float], mixup: float, cutmix: float) -> None:
    weights, boxes = draw_mix(MixSection.model_validate(section), 0, POSITIONS, 1000)
    cut = (boxes[::2, 2] > boxes[::2, 0]) & (boxes[::2, 3] > boxes[::2, 1])
    blended = ~cut & (weights[::2] < 1)
    tolerance = 5 * 0.5 / math.sqrt(len(cut)) + 0.002  # some boxes of CutMix have no pixel
    assert abs(cut.mean() - cutmix) < tolerance
    assert abs(blended.mean() - mixup) < tolerance


def test_a_weight_of_1_leaves_an_image_and_its_label() -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3])
    mixed, targets = mix(images, labels, torch.ones(4), torch.zeros(4, 4, dtype=torch.int32))
    assert mixed.equal(images)
    assert targets.partner_labels.tolist() == [1, 0, 3, 2]
    assert probabilities(targets, 4).equal(torch.eye(4))
