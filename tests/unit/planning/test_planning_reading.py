import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.planning import Reading

readings = st.builds(
    Reading,
    lanes=st.integers(1, 40).map(lambda half: 2 * half),
    block=st.integers(1, 80),
    world_size=st.integers(1, 12),
    workers=st.integers(0, 6),
)


def readers_by_lane(reading: Reading, turns: int) -> list[set[tuple[int, int]]]:
    """Ranks and workers that the positions of each lane fall to, by the rule of the loader."""
    positions = np.arange(reading.lanes * turns).reshape(turns, reading.lanes)
    ranks = positions // 2 % reading.world_size
    workers = positions // (2 * reading.world_size) % max(1, reading.workers)
    return [set(zip(ranks[:, lane], workers[:, lane], strict=True)) for lane in range(reading.lanes)]


@given(readings)
def test_readers_of_a_lane_are_those_of_the_loader(reading: Reading) -> None:
    many = readers_by_lane(reading, 200)
    assert reading.workers_own_lanes == all(len(readers) == 1 for readers in many)
    assert reading.ranks_own_lanes == all(len({rank for rank, _ in readers}) == 1 for readers in many)
    in_a_block = readers_by_lane(reading, reading.block)
    assert max(map(len, in_a_block)) == reading.readers_of_a_block


@given(readings)
def test_fitting_lanes_are_the_least_that_fit(reading: Reading) -> None:
    def with_lanes(lanes: int) -> Reading:
        return Reading(lanes, reading.block, reading.world_size, reading.workers)

    fitting = reading.fitting_lanes
    assert with_lanes(fitting).workers_own_lanes
    assert not any(with_lanes(lanes).workers_own_lanes for lanes in range(reading.lanes, fitting))


@pytest.mark.parametrize(("world_size", "samples"), [(1, 262_144), (64, 4096)])
def test_a_window_of_in21k(world_size: int, samples: int) -> None:
    assert Reading(4096, 64, world_size, 12).window_samples == samples
