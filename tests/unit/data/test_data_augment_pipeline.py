import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from vitscale.config.augment import AugmentSection
from vitscale.data.augment import Augmentation, flips, normalise
from vitscale.data.augment.operations import Operation
from vitscale.data.augment.pipeline import mirror
from vitscale.data.mixup import MixedLabels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVERYTHING = {
    "three_augment": True,
    "rand_augment": {"policy": "augreg", "magnitude": 9},
    "jitter": {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1},
    "blur": {"probability": 0.5},
    "erasing": {"probability": 0.5, "rectangles": 2},
    "mix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
}


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 20, 20), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 7, (count,), generator=generator)


def augmentation(section: dict[str, Any]) -> Augmentation:
    return Augmentation(AugmentSection.model_validate(section), seed=3, img_size=20, flip=0.5, mean=MEAN, std=STD)


def test_without_a_section_images_are_flipped_and_normalised_bit_for_bit() -> None:
    images, labels = batch(16)
    positions = np.arange(50, 66)
    plain = augmentation({})
    drawn = plain.draw(positions)
    assert set(drawn) == {"flip"}
    prepared, targets = plain.apply(images, labels, drawn)
    mirrored = images.clone()
    mirrored[flips(3, positions, 0.5)] = mirrored[flips(3, positions, 0.5)].flip(-1)
    centre, spread = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    assert prepared.equal((mirrored.float() / 255 - centre) / spread)
    assert targets is labels


@pytest.mark.parametrize("policy", ["augreg", "timm"])
def test_the_result_follows_from_the_position_however_batches_are_cut(policy: str) -> None:
    """Pairs in any order of ranks, workers and micro-batches: every image and target is the same to the bit."""
    section = EVERYTHING | {"rand_augment": {"policy": policy, "magnitude": 9, "layers": 3}}
    whole = pickle.loads(pickle.dumps(augmentation(section)))  # a loader process gets it so
    images, labels = batch(64)
    positions = np.arange(1000, 1064)
    expected, targets = whole.apply(images, labels, whole.draw(positions))
    assert isinstance(targets, MixedLabels)
    for part in (slice(0, 2), slice(2, 38), slice(38, 64)):
        here, there = whole.apply(images[part], labels[part], whole.draw(positions[part]))
        assert here.equal(expected[part])
        assert isinstance(there, MixedLabels)
        assert all(own.equal(of_all[part]) for own, of_all in zip(there, targets, strict=True))


def test_another_seed_or_position_gives_another_image() -> None:
    images, labels = batch(8)
    section = AugmentSection.model_validate(EVERYTHING)
    results = []
    for seed, first in ((0, 0), (1, 0), (0, 8)):
        changed = Augmentation(section, seed, 20, 0.5, MEAN, STD)
        results.append(changed.apply(images, labels, changed.draw(np.arange(first, first + 8)))[0])
    assert not results[0].equal(results[1])
    assert not results[0].equal(results[2])


def test_drawn_arrays_are_small_and_one_row_an_image() -> None:
    drawn = augmentation(EVERYTHING).draw(np.arange(10))
    assert {len(array) for array in drawn.values()} == {10}
    assert sum(array.nbytes for array in drawn.values()) < 10 * 400
    for name, array in augmentation(EVERYTHING).draw(np.arange(4, 5)).items():
        np.testing.assert_array_equal(array[0], drawn[name][4])


def test_what_a_position_draws_stays_as_it_is_between_versions() -> None:
    """A resumed run goes on with the same randomness; a change here breaks that and belongs into the changelog."""
    drawn = augmentation(EVERYTHING).draw(np.array([0, 2**40]))
    assert drawn["flip"].tolist() == [True, False]
    assert drawn["operations"].tolist() == [[13, 12, 17, 11, 9, 8, 10, 0], [13, 5, 19, 9, 10, 8, 11, 13]]
    assert drawn["strengths"][1, :3].tolist() == pytest.approx([0.456497222, 230, 0.160714284])
    assert drawn["strengths"][0, 3:7].tolist() == pytest.approx([-0.0700224638, 0.716918468, 0.938190818, 1.04730415])
    assert drawn["centres"][0, 1].tolist() == pytest.approx([0.918485105, 0.125667274])
    assert drawn["rectangles"].tolist() == [[[14, 13, 4, 4], [9, 5, 5, 4]], [[1, 7, 10, 6], [13, 2, 6, 4]]]
    assert drawn["fill_keys"].tolist() == [[3725117346, 3417602320], [2736004521, 2205755563]]
    assert drawn["mix_boxes"].tolist() == [[7, 9, 20, 20], [13, 10, 20, 20]]
    assert drawn["mix_weights"].tolist() == pytest.approx([0.6425, 0.825])


def test_stages_follow_in_their_order() -> None:
    """Flip, grey of 3-Augment, normalisation, erasing with the mean colour, CutMix: done again by hand."""
    section = {
        "erasing": {"probability": 1.0, "fill": "const"},
        "mix": {"cutmix_alpha": 1.0},
        "blur": {"probability": 1.0},
    }
    changed = augmentation(section)
    images, labels = batch(2)
    drawn = changed.draw(np.arange(2))
    drawn["flip"] = np.array([True, False])
    drawn["strengths"][:] = 1.0
    drawn["rectangles"] = np.array([[[0, 0, 5, 5]], [[10, 10, 4, 4]]], dtype=np.int32)
    drawn["mix_boxes"] = np.array([[0, 0, 4, 20]] * 2, dtype=np.int32)
    drawn["mix_weights"] = np.float32([0.8, 0.8])
    result, targets = changed.apply(images, labels, drawn)

    padded = torch.nn.functional.pad(torch.stack([images[0].flip(-1), images[1]]).float(), (6,) * 4, mode="replicate")
    blurred = v2.functional.gaussian_blur(padded.to(torch.uint8), 13, 1.0)[..., 6:-6, 6:-6]
    expected = v2.functional.normalize(blurred.float() / 255, MEAN, STD)
    expected[0, :, :5, :5] = expected[1, :, 10:14, 10:14] = 0
    expected[:, :, :4] = expected.flip(0)[:, :, :4]
    torch.testing.assert_close(result, expected, rtol=0, atol=1.01 / 255 / min(STD))
    assert ((result - expected).abs() > 1e-5).float().mean() < 0.001
    assert isinstance(targets, MixedLabels)
    assert targets.weights.tolist() == pytest.approx([0.8, 0.8])


@pytest.mark.parametrize(("policy", "interpolates"), [("augreg", False), ("timm", True)])
def test_augreg_takes_the_nearest_pixel_and_timm_interpolates(policy: str, interpolates: bool) -> None:
    moved = augmentation({"rand_augment": {"policy": policy, "layers": 1}})
    images = torch.randint(0, 2, (1, 3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8) * 255
    drawn = moved.draw(np.arange(1))
    drawn["operations"][:], drawn["strengths"][:] = Operation.SHEAR_X, 0.3
    values = moved.apply(images, torch.zeros(1, dtype=torch.int64), drawn)[0][0, 0].unique()
    assert (len(values) > 3) == interpolates  # else black, white and the fill


def test_the_fill_is_the_mean_colour() -> None:
    assert augmentation({}).fill == (124, 116, 104)
    moved = augmentation({"rand_augment": {"layers": 1}})
    images, labels = batch(1)
    drawn = moved.draw(np.arange(1))
    drawn["operations"][:], drawn["strengths"][:] = Operation.TRANSLATE_X, 1.0
    images = moved.apply(images, labels, drawn)[0]
    assert images.abs().max() < 1 / 255 / min(STD)


def test_normalised_images_are_torchvisions() -> None:
    images, _ = batch(4)
    expected = v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), MEAN, STD)
    result = normalise(images, MEAN, STD)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_mirrored_images_are_torchvisions() -> None:
    images, _ = batch(3)
    result = mirror(images, torch.tensor([True, False, True]))
    assert result[1].equal(images[1])
    assert result[::2].equal(v2.functional.horizontal_flip(images[::2]))
