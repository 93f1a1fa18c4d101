import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.data.augment import repeated


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 6))
def test_each_sample_comes_as_often_as_asked_and_lanes_apart(repeats: int, lanes: int, groups: int) -> None:
    positions = np.arange(groups * repeats * lanes)
    order = repeated(positions, repeats, lanes)
    for sample in range(groups * lanes):
        places = np.flatnonzero(order == sample)
        assert len(places) == repeats
        assert (np.diff(places) == lanes).all()


@given(st.integers(0, 2**50), st.integers(1, 5), st.integers(1, 9000))
def test_a_position_keeps_its_lane_and_partners_differ(position: int, repeats: int, lanes: int) -> None:
    mine, partner = repeated(np.array([position, position ^ 1]), repeats, lanes)
    assert mine % lanes == position % lanes
    assert lanes == 1 or mine != partner


@given(st.integers(0, 2**50), st.integers(1, 9000))
def test_one_repeat_changes_nothing(position: int, lanes: int) -> None:
    assert repeated(np.array([position]), 1, lanes) == position


def test_a_batch_of_whole_groups_holds_all_repeats_of_its_samples() -> None:
    batches = repeated(np.arange(60), 3, 4).reshape(5, 12)
    assert [np.unique(batch).tolist() for batch in batches] == [list(range(4 * i, 4 * i + 4)) for i in range(5)]


@pytest.mark.parametrize(("repeats", "expected"), [(2, [0, 1, 2, 0, 1, 2, 3, 4]), (3, [0, 1, 2, 0, 1, 2, 0, 1])])
def test_the_order_of_three_lanes(repeats: int, expected: list[int]) -> None:
    assert repeated(np.arange(8), repeats, 3).tolist() == expected
