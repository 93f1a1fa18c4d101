"""The order of training samples as a pure function of the position.

A run sees the positions 0, 1, 2, ...; position = images seen before. Which sample stands at a position
follows from the dataset's size, the seed, the lanes and the block alone: not from ranks, workers, batch or
restarts. So resuming costs nothing, and every topology sees the same stream.

Randomness is a hash of (seed, purpose, ...), not a generator with a state, and the hash is written out
here: numpy does not promise that its generators' streams stay the same between versions.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)

# First words of a hash after the seed, one a purpose, so that no two uses share their randomness.
BLOCKS, WITHIN_BLOCK, CROP, FLIP, SUBSTITUTE, BUILD_SPLIT, BUILD_SHUFFLE, MIXTURE, STREAM = range(9)

# Rounds of the permutation inside a block: from 8 on, neighbours are as independent as a test can tell.
ROUNDS = 8


def hash64(*words: ArrayLike) -> NDArray[np.uint64]:
    """Hash integers to 64 well-mixed bits; arrays broadcast, and the order of the words matters.

    Each word is absorbed by one round of splitmix64 (Steele, Lea and Flood 2014, Fast splittable
    pseudorandom number generators).
    """
    state = np.zeros((), dtype=np.uint64)
    for word in words:
        state = _absorb(state, np.asarray(word).astype(np.uint64))
    return state


def _absorb(state: NDArray[np.uint64], word: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        mixed = np.asarray(state ^ word)  # a new array, so the rest is done in its place
        mixed += GOLDEN_GAMMA
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


@dataclass(frozen=True)
class Order:
    """Which sample stands at which position: every epoch is a permutation, epochs join end to end.

    Samples are cut into blocks of neighbours, which are read in sequence, each by one lane. Position q of an
    epoch belongs to lane q mod lanes, so neighbouring positions come from different blocks. What does not
    fill a block in every lane (leftover blocks, then the short last one) is cut into one run a lane.
    """

    samples: int
    seed: int
    lanes: int
    block: int

    def __post_init__(self) -> None:
        """Refuse sizes that have no order."""
        assert min(self.samples, self.lanes, self.block) >= 1

    def sample_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples (rows of the index) at these positions, int64 of the same shape [n]."""
        samples = np.empty_like(positions)
        epochs = positions // self.samples
        for epoch in range(epochs.min(initial=0), epochs.max(initial=-1) + 1):
            chosen = epochs == epoch
            samples[chosen] = self._sample_in_epoch(epoch, positions[chosen] - epoch * self.samples)
        return samples

    def _sample_in_epoch(self, epoch: int, q: NDArray[np.int64]) -> NDArray[np.int64]:
        full_blocks = self.samples // self.block
        slot, offset = self._slot(q)
        # Slot s of the epoch holds block permuted[s]; the short block is always in the last slot.
        permuted = _permuted_blocks(self.seed, epoch, full_blocks)
        blocks = np.where(slot < full_blocks, permuted[np.minimum(slot, full_blocks - 1)], full_blocks)
        sizes = np.minimum(self.block, self.samples - blocks * self.block)
        keys = hash64(self.seed, WITHIN_BLOCK, epoch, blocks)
        return blocks * self.block + _permute(offset, sizes, keys)

    def _slot(self, q: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Slot in the epoch's sequence of blocks, and place in that block, of the positions q of an epoch."""
        rounds = self.samples // self.block // self.lanes
        even = self.block * self.lanes * rounds
        lane, row = q % self.lanes, q // self.lanes
        slot, offset = lane + self.lanes * (row // self.block), row % self.block
        if q.max(initial=0) < even:
            return slot, offset

        run, longer_runs = divmod(self.samples - even, self.lanes)
        tail_lane, tail_row = (q - even) % self.lanes, (q - even) // self.lanes
        element = even + tail_lane * run + np.minimum(tail_lane, longer_runs) + tail_row
        in_tail = q >= even
        return np.where(in_tail, element // self.block, slot), np.where(in_tail, element % self.block, offset)


def rank_positions(start: int, global_batch: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """Positions of the global batch [start, start + global_batch) that a rank takes, ascending.

    The pairs (p, p xor 1) go round the ranks in turn: mixup's partner is p xor 1, so pairs stay together,
    and neighbouring lanes fall on different ranks. Where they do not come out even, some ranks take a pair more.
    """
    assert start % 2 == 0
    assert global_batch % 2 == 0
    positions = np.arange(start, start + global_batch, dtype=np.int64)
    mine: NDArray[np.int64] = positions[positions // 2 % world_size == rank]
    return mine


@lru_cache(maxsize=2)  # a batch may lie across the end of an epoch
def _permuted_blocks(seed: int, epoch: int, full_blocks: int) -> NDArray[np.int64]:
    """The blocks in the order of their keys; the block's own bits in each key's low end decide between equals.

    Distinct keys need no stable sort, and sorting them directly is several times faster than argsort.
    """
    blocks = np.arange(max(full_blocks, 1), dtype=np.uint64)
    low_bits = np.uint64((1 << full_blocks.bit_length()) - 1)
    keys = (hash64(seed, BLOCKS, epoch, blocks) & ~low_bits) | blocks
    keys.sort()
    return (keys & low_bits).astype(np.int64)


def _permute(x: NDArray[np.int64], sizes: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Image of each x under the permutation of range(size) that its key picks.

    Rounds of multiply, add and fold permute the next power of two; applied until the image falls below the
    size, they permute range(size) (cycle walking, Black and Rogaway 2002, Ciphers with arbitrary finite domains).
    """
    bits = np.ceil(np.log2(sizes)).astype(np.uint64)
    masks, folds = (np.uint64(1) << bits) - np.uint64(1), (bits + np.uint64(1)) // np.uint64(2)
    image = x.astype(np.uint64)
    seeds = hash64(keys)
    walking: NDArray[np.int64] | slice = slice(None)  # all of them, and none is copied
    while True:
        stirred = _stir(image[walking], masks[walking], folds[walking], seeds[walking])
        image[walking] = stirred
        beyond = np.flatnonzero(stirred >= sizes[walking].astype(np.uint64))
        if not len(beyond):
            return image.astype(np.int64)
        walking = beyond if isinstance(walking, slice) else walking[beyond]


def _stir(
    image: NDArray[np.uint64], masks: NDArray[np.uint64], folds: NDArray[np.uint64], seeds: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """One walk: a permutation of range(mask + 1)."""
    for round_number in range(ROUNDS):
        keys = _absorb(seeds, np.uint64(round_number))
        image = image * (keys | np.uint64(1))
        keys >>= np.uint64(32)
        image += keys
        image &= masks
        image ^= image >> folds
    return image
