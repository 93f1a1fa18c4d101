import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.data.order import Order, _permute, hash64, rank_positions

# fmt: off
GOLDEN = [
    7, 0, 16, 5, 1, 17, 6, 2, 18, 4, 3, 19, 11, 14, 21, 8, 15, 22, 9, 12, 20, 10, 13,
    1, 14, 5, 2, 13, 6, 3, 12, 4, 0, 15, 7, 19, 11, 21, 18, 10, 22, 16, 9, 20, 17, 8,
]
# fmt: on

orders = st.builds(
    Order,
    samples=st.integers(1, 400),
    seed=st.integers(0, 2**32),
    lanes=st.integers(1, 40),
    block=st.integers(1, 70),
)


@given(orders, st.integers(0, 3))
def test_every_epoch_is_a_permutation(order: Order, epoch: int) -> None:
    positions = np.arange(epoch * order.samples, (epoch + 1) * order.samples)
    assert sorted(order.sample_at(positions)) == list(range(order.samples))


@given(orders, st.lists(st.integers(1, 150), min_size=1, max_size=8))
def test_batches_and_joins_of_epochs_do_not_matter(order: Order, batches: list[int]) -> None:
    total = sum(batches)
    ends = np.cumsum(batches)
    pieces = [order.sample_at(np.arange(end - size, end)) for end, size in zip(ends, batches, strict=True)]
    np.testing.assert_array_equal(np.concatenate(pieces), order.sample_at(np.arange(total)))


@given(orders)
def test_lanes_read_whole_blocks_in_sequence(order: Order) -> None:
    rounds = order.samples // order.block // order.lanes
    q = np.arange(rounds * order.lanes * order.block)
    for lane in range(order.lanes):
        read = order.sample_at(q[lane :: order.lanes]).reshape(rounds, order.block) // order.block
        assert (read == read[:, :1]).all()


@given(st.integers(1, 8), st.integers(1, 50), st.integers(0, 1000), st.integers(0, 3))
def test_ranks_share_a_batch_in_whole_pairs(world_size: int, pairs: int, half_start: int, step: int) -> None:
    global_batch = 2 * pairs
    start = 2 * half_start + step * global_batch
    shares = [rank_positions(start, global_batch, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} <= {pairs // world_size * 2, -(-pairs // world_size) * 2}
    assert sorted(np.concatenate(shares)) == list(range(start, start + global_batch))
    for share in shares:
        assert (np.diff(share) > 0).all()
        assert set(share.tolist()) == {p ^ 1 for p in share.tolist()}


def test_golden_order() -> None:
    """Checkpoints hold positions: if this changes, every running training changes its data."""
    order = Order(samples=23, seed=7, lanes=3, block=4)
    assert order.sample_at(np.arange(46)).tolist() == GOLDEN


def test_hash_of_known_words() -> None:
    """The first outputs of splitmix64 from seed 0, which one word 0 and its continuation must give."""
    assert int(hash64(0)) == 0xE220A8397B1DCDAF
    assert int(hash64(0x9E3779B97F4A7C15)) == 0x6E789E6AA1B965F4
    assert int(hash64(1, 2)) != int(hash64(2, 1))


def test_epochs_and_seeds_differ() -> None:
    positions = np.arange(200)
    order = Order(200, 0, 4, 1)
    epochs = [order.sample_at(positions + 200 * e).tolist() for e in range(3)]
    epochs.append(Order(200, 1, 4, 1).sample_at(positions).tolist())
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("size", [2, 3, 16, 33, 64])
def test_permutation_inside_a_block_is_uniform(size: int) -> None:
    """Chi-square of places, and of differences of neighbours, within 5 standard deviations."""
    trials = 20_000
    x = np.tile(np.arange(size), trials)
    keys = np.repeat(hash64(1, np.arange(trials)), size)
    image = _permute(x, np.full(len(x), size), keys)
    places = np.bincount(x * size + image, minlength=size**2)
    assert_uniform(places, freedom=(size - 1) ** 2)
    differences = np.diff(image.reshape(trials, size), axis=1).ravel() % size
    assert_uniform(np.bincount(differences, minlength=size)[1:], freedom=size - 2)


def assert_uniform(counts: np.ndarray, freedom: int) -> None:
    expected = counts.mean()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - freedom) <= 5 * np.sqrt(2 * freedom)
