from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from micro_data import CLASSES, jpeg, mixture_of, write_dataset

from vitscale.config import DataSection
from vitscale.data.mixture import Mixture, Samples, share_out
from vitscale.data.order import Order
from vitscale.data.split import SplitIndex, open_split

# fmt: off
GOLDEN = [12, 2, 10, 13, 3, 11, 9, 4, 6, 8, 5, 7, 14, 0, 15, 8, 1, 12, 9, 4, 13, 15, 5, 10, 14, 0, 11, 7, 1, 6]
# fmt: on


class Counted:
    """As much of an index as the order of a mixture asks for."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.hash = f"hash of {samples}"

    def __len__(self) -> int:
        return self.samples


def mixture(sizes: list[int], weights: list[float] | None, lanes: int, block: int = 3, repeats: int = 1) -> Mixture:
    indexes: tuple[SplitIndex, ...] = tuple(Counted(size) for size in sizes)  # type: ignore[misc]
    return Mixture(Samples(indexes), tuple(weights) if weights else None, 5, lanes, block, repeats)


sizes_of_sources = st.lists(st.integers(1, 60), min_size=1, max_size=4)


@given(sizes_of_sources, st.integers(4, 20), st.integers(1, 9), st.integers(1, 3))
def test_each_source_comes_in_exact_epochs_in_its_lanes_share(
    sizes: list[int], lanes: int, block: int, repeats: int
) -> None:
    found = mixture(sizes, None, lanes, block, repeats)
    turns = 2 * max(sizes)  # enough for every source to pass at least once
    positions = np.arange(turns * repeats * lanes)
    rows = found.rows_at(positions)
    sources = found.samples.sources(rows)
    for turn in sources.reshape(-1, lanes):
        assert np.bincount(turn, minlength=len(sizes)).tolist() == list(found.lane_counts)
    # One pass over the samples without their repeats.
    once = rows.reshape(turns, repeats, lanes)[:, 0].ravel()
    assert (rows.reshape(turns, repeats, lanes) == once.reshape(turns, 1, lanes)).all()
    for source, size in enumerate(sizes):
        own = once[found.samples.sources(once) == source] - found.samples.first_rows[source]
        whole = len(own) // size * size
        assert (np.sort(own[:whole].reshape(-1, size), axis=1) == np.arange(size)).all()
        assert len(set(own[whole:])) == len(own) - whole


@given(sizes_of_sources, st.integers(4, 20), st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_a_row_is_a_function_of_its_position(sizes: list[int], lanes: int, batches: list[int]) -> None:
    found = mixture(sizes, None, lanes)
    whole = found.rows_at(np.arange(sum(batches)))
    ends = np.cumsum(batches)
    parts = [found.rows_at(np.arange(end - size, end)) for end, size in zip(ends, batches, strict=True)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_one_source_is_the_plain_order() -> None:
    positions = np.arange(200)
    np.testing.assert_array_equal(mixture([45], None, 4).rows_at(positions), Order(45, 5, 4, 3).sample_at(positions))
    assert mixture([45], None, 4).hash == "hash of 45"


def test_golden_mixture() -> None:
    """Checkpoints hold positions: if this changes, every running training changes its data."""
    found = mixture([6, 10], [1.0, 2.0], lanes=3, block=2)
    assert found.rows_at(np.arange(30)).tolist() == GOLDEN


@given(st.integers(1, 300), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
def test_shares_are_whole_at_least_one_and_near_their_weights(whole: int, weights: list[float]) -> None:
    assume(whole >= len(weights))
    counts = share_out(whole, weights)
    assert sum(counts) == whole
    assert min(counts) >= 1
    asked = np.array(weights) / sum(weights) * whole
    assert (np.abs(counts - asked) < 1).all() or (asked < 1).any()
    assert share_out(64, [0.99, 0.01]) == (63, 1)


def test_hash_tells_sources_and_shares_apart() -> None:
    hashes = {
        mixture([6, 10], None, 8).hash,
        mixture([10, 6], None, 8).hash,
        mixture([6, 10], [1.0, 1.0], 8).hash,
        mixture([6], None, 8).hash,
    }
    assert len(hashes) == 4
    assert mixture([6, 10], [6.0, 10.0], 8).hash == mixture([6, 10], None, 8).hash


def test_rows_of_real_splits(dataset: Path, images: list[bytes], tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", [jpeg(100 + i) for i in range(5)])
    samples = Samples((open_split(str(dataset), "train"), open_split(str(other), "train")))
    rows = np.array([0, 44, 45, 49])
    assert samples.column("label", rows).tolist() == [0, 44 % 3, 0, 4 % 3]
    assert [samples.key(row) for row in rows] == ["image0", "image44", "image0", "image4"]
    assert samples.shard_path(49) == f"{other}/train-000000.tar"
    assert len(samples) == 50


def test_replacements_stay_in_the_source() -> None:
    found = mixture([6, 10], None, 8)
    assert {found.replacement(p, 3, a) for p in range(40) for a in (1, 2)} == set(range(6))
    assert {found.replacement(p, 9, a) for p in range(80) for a in (1, 2)} == set(range(6, 16))


@pytest.mark.parametrize("position", [0, 11, 12, 40, 48])
def test_rounds_change_where_lanes_begin_a_block(position: int) -> None:
    found = mixture([45], None, 4)  # blocks of 3: a round is 12 positions, an epoch 45
    epoch, q = divmod(position, 45)
    assert found.round_of(position) == (epoch, q // 12)


def test_the_section_says_what_is_mixed(section: DataSection, dataset: Path) -> None:
    sources = [{"path": str(dataset), "split": "train", "weight": weight} for weight in (1, 3)]
    mixed = DataSection.model_validate({"mix": sources, "lanes": 8})
    assert mixture_of(mixed).lane_counts == (2, 6)
    assert mixture_of(section).lane_counts == (4,)
    assert mixture_of(mixed).classes == CLASSES
