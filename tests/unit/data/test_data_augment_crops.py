import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vitscale.data.augment import crop_box, draw_crops, flips
from vitscale.data.decode import Box


def box_at(
    seed: int, position: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    (draws,) = draw_crops(seed, np.array([position]))
    return crop_box(draws, height, width, scale, ratio)


sides = st.integers(1, 700)


@given(st.integers(0, 2**40), sides, sides, st.floats(0.01, 1.0), st.floats(0.2, 1.0), st.floats(1.0, 5.0))
def test_crops_lie_inside_the_image(
    position: int, height: int, width: int, least: float, narrow: float, wide: float
) -> None:
    box = box_at(3, position, height, width, (least, 1.0), (narrow, wide))
    assert box.height >= 1
    assert box.width >= 1
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width


def test_areas_are_uniform_and_shapes_log_uniform() -> None:
    """A crop of a tenth of the image at most always fits at the first try, so nothing is cut off."""
    boxes = np.array([box_at(0, p, 4000, 4000, (0.02, 0.1), (0.5, 2.0)) for p in range(4000)])
    areas = boxes[:, 2] * boxes[:, 3] / 4000**2
    shapes = np.log(boxes[:, 3] / boxes[:, 2]) / math.log(2)
    assert_uniform((areas - 0.02) / 0.08)
    assert_uniform((shapes + 1) / 2)
    assert_uniform(boxes[:, 0] / (4000 - boxes[:, 2]))
    assert_uniform(boxes[:, 1] / (4000 - boxes[:, 3]))
    assert abs(np.corrcoef(areas, shapes)[0, 1]) < 4 / math.sqrt(4000)


def assert_uniform(values: np.ndarray) -> None:
    """Kolmogorov-Smirnov at about one in a million."""
    n = len(values)
    distance = np.abs(np.sort(values) - (np.arange(n) + 0.5) / n).max()
    assert distance < 2.7 / math.sqrt(n)


def test_a_shape_that_never_fits_gives_the_largest_central_box() -> None:
    assert box_at(0, 0, 10, 100, (1.0, 1.0), (3 / 4, 4 / 3)) == (0, 43, 10, 13)
    assert box_at(0, 0, 100, 10, (1.0, 1.0), (3 / 4, 4 / 3)) == (43, 0, 13, 10)


def test_crops_depend_on_seed_and_position_alone() -> None:
    box = box_at(1, 2, 90, 80, (0.05, 1.0), (3 / 4, 4 / 3))
    assert box == box_at(1, 2, 90, 80, (0.05, 1.0), (3 / 4, 4 / 3))
    others = [box_at(s, p, 90, 80, (0.05, 1.0), (3 / 4, 4 / 3)) for s, p in ((1, 3), (2, 2), (2, 1))]
    assert box not in others
    assert draw_crops(1, np.arange(5))[2] == draw_crops(1, np.array([2]))[0]


def test_flips_have_their_probability() -> None:
    positions = np.arange(20_000)
    for probability in (0.25, 0.5):
        share = flips(0, positions, probability).mean()
        assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / 20_000)
    assert not flips(0, positions, 0.0).any()
    assert flips(0, positions, 1.0).all()
    np.testing.assert_array_equal(flips(0, positions, 0.5)[7:9], flips(0, positions[7:9], 0.5))
