import math
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data import random_erasing as timm_erasing

from vitscale.config.augment import ErasingSection
from vitscale.data.augment.erasing import draw_fill_keys, draw_rectangles, erase, hashed_normal
from vitscale.data.draws import ERASE, between, uniform

POSITIONS = np.arange(8000)


def images(count: int, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("area", [(0.02, 1 / 3), (0.5, 1.0)])
def test_erasing_is_timms_on_the_same_numbers(area: tuple[float, float]) -> None:
    """timm draws from `random` as it goes; here it is handed our numbers one by one. 0.5 to 1 seldom fits."""
    section = ErasingSection(probability=0.6, fill="const", area=area, rectangles=2)
    positions, side, seed = POSITIONS[:60], 32, 3
    originals = images(len(positions), side)
    rectangles, keys = draw_rectangles(section, seed, positions, side), draw_fill_keys(seed, positions, 2)
    result = erase(originals, rectangles, keys, "const")
    theirs = timm_erasing.RandomErasing(
        probability=0.6, min_area=area[0], max_area=area[1], min_aspect=0.3, mode="const", min_count=2, device="cpu"
    )
    for i, position in enumerate(positions.tolist()):
        draws = [uniform(seed, ERASE, position, r, np.arange(10)[:, None], np.arange(4)) for r in range(2)]
        expected = originals[i].clone()
        with mock.patch.object(timm_erasing, "random", Replayed(draws, float(uniform(seed, ERASE, position)))):
            theirs(expected)
        torch.testing.assert_close(result[i], expected, rtol=0, atol=0)


class Replayed:
    """Stands for the module `random`: hands out (area, shape, top, left) of each try, and moves on as timm does."""

    def __init__(self, draws: list[np.ndarray], erased: float) -> None:
        self.left = draws
        self.erased = erased
        self.numbers: list[float] = []
        self.tries = 0

    def random(self) -> float:
        return self.erased

    def uniform(self, low: float, high: float) -> float:
        if len(self.numbers) % 4 != 3:  # a new try: the last one's places may be unused
            if self.tries == 10:
                self.left, self.tries = self.left[1:], 0
            self.numbers = self.left[0][self.tries].tolist()
            self.tries += 1
        return float(between(low, high, np.array(self.numbers.pop(0))))

    def randint(self, low: int, high: int) -> int:
        if len(self.numbers) == 1:  # placed: the next number belongs to the next rectangle
            self.left, self.tries = self.left[1:], 0
        return low + int(self.numbers.pop(0) * (high - low + 1))


def test_rectangles_have_their_share_areas_and_shapes() -> None:
    """Small ones fit at the first try, so nothing is cut off."""
    section = ErasingSection(probability=0.4, area=(0.02, 0.1), ratio=(0.5, 2.0))
    boxes = draw_rectangles(section, 0, POSITIONS, 4000)[:, 0]
    erased = boxes[:, 2] > 0
    assert abs(erased.mean() - 0.4) < 5 * math.sqrt(0.24 / len(POSITIONS))
    top, left, height, width = boxes[erased].T
    assert stats.kstest((height * width / 4000**2 - 0.02) / 0.08, "uniform").pvalue > 1e-6
    assert stats.kstest((np.log(height / width) / math.log(2) + 1) / 2, "uniform").pvalue > 1e-6
    assert stats.kstest(top / (4000 - height), "uniform").pvalue > 1e-6
    assert stats.kstest(left / (4000 - width), "uniform").pvalue > 1e-6


@pytest.mark.parametrize("fill", ["const", "rand", "pixel"])
def test_only_the_rectangle_is_written_and_with_its_kind_of_colour(fill: str) -> None:
    originals = images(3)
    rectangles = np.array([[[4, 5, 10, 20]], [[0, 0, 0, 0]], [[30, 0, 2, 32]]], dtype=np.int32)
    before = originals.clone()
    result = erase(originals, rectangles, draw_fill_keys(0, np.arange(3), 1), fill)
    assert originals.equal(before)
    changed = (result != originals).any(1)
    inside = torch.zeros(3, 32, 32, dtype=torch.bool)
    inside[0, 4:14, 5:25] = inside[2, 30:] = True
    assert changed.equal(inside)
    colours = {tuple(pixel) for pixel in result[0, :, 4:14, 5:25].flatten(1).T.tolist()}
    assert len(colours) == {"const": 1, "rand": 1, "pixel": 200}[fill]
    assert ((0.0, 0.0, 0.0) in colours) == (fill == "const")


def test_colours_follow_from_the_position_alone() -> None:
    section = ErasingSection(probability=1.0, rectangles=2)
    originals, positions = images(8), np.arange(100, 108)

    def erased(part: slice) -> torch.Tensor:
        where = positions[part]
        return erase(originals[part], draw_rectangles(section, 0, where, 32), draw_fill_keys(0, where, 2), "pixel")

    whole = erased(slice(0, 8))
    assert torch.cat([erased(slice(0, 3)), erased(slice(3, 8))]).equal(whole)


def test_hashed_numbers_are_normal_and_unrelated() -> None:
    keys = torch.tensor([0, 1, 2, 2**32 - 1])
    values = hashed_normal(keys, 50_000).numpy()
    for row in values:
        assert stats.kstest(row, "norm").pvalue > 1e-6
    neighbours = np.concatenate([values[:, :-1], values[:, 1:]])
    related = np.corrcoef(neighbours) - np.eye(8)
    assert np.abs(related).max() < 6 / math.sqrt(50_000)
    np.testing.assert_array_equal(hashed_normal(keys[2:3], 50_000)[0].numpy(), values[2])
