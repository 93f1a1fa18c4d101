"""How well a batch mixes the classes: distinct classes in batches of the training order, against a full shuffle."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitscale.data.order import Order

LEAST_SCORE = 0.98
"""A build that was shuffled as a whole scores no less."""

# Batches are taken from fixed places of the first epoch, its end among them.
BATCHES = 128
SEED = 0


@dataclass(frozen=True)
class Mixing:
    """Distinct classes in a batch: the mean over some batches, and what a full shuffle would give on average."""

    batch: int
    lanes: int
    block: int
    distinct: float
    ideal: float

    @property
    def score(self) -> float:
        """1 where batches are as mixed as those of a full shuffle."""
        return self.distinct / self.ideal

    def line(self) -> str:
        """For people."""
        low = self.score < LEAST_SCORE
        return (
            f"{self.score:.3f}: {self.distinct:.1f} classes in a batch of {self.batch}, {self.ideal:.1f} after a full "
            f"shuffle ({self.lanes} lanes, blocks of {self.block})"
            f"{'; too low: shuffle it anew by `vitscale-data build --source shards`' if low else ''}"
        )


def measure_mixing(labels: NDArray[np.int32], *, batch: int, lanes: int, block: int) -> Mixing:
    """Compare batches of the training order with those of a full shuffle.

    Args:
        labels: [N], of all samples of a split, in the order of its index.
        batch: samples a batch; a split with fewer is one batch.
        lanes: canonical lanes of the order.
        block: neighbouring samples that a lane reads in sequence.
    """
    batch = min(batch, len(labels))
    order = Order(len(labels), SEED, lanes, block)
    starts = np.linspace(0, len(labels) - batch, BATCHES).astype(np.int64)
    distinct = [len(np.unique(labels[order.sample_at(np.arange(start, start + batch))])) for start in starts]
    ideal = expected_distinct(np.bincount(labels), batch)
    return Mixing(batch, lanes, block, float(np.mean(distinct)), ideal)


def expected_distinct(class_images: NDArray[np.int64], batch: int) -> float:
    """Mean number of distinct classes among `batch` of N images drawn without putting any back.

    A class of n images is missing from a draw with the chance C(N - n, batch) / C(N, batch), by the
    hypergeometric distribution; the sum of 1 - chance over the classes is the mean.

    Args:
        class_images: [C], images of each class; their sum is N.
        batch: at most N.
    """
    samples = int(class_images.sum())
    # Few sizes are shared by many classes.
    sizes, classes = np.unique(class_images, return_counts=True)
    return sum(
        int(count) * -math.expm1(_log_missing(samples, int(size), batch))
        for size, count in zip(sizes, classes, strict=True)
    )


def _log_missing(samples: int, size: int, batch: int) -> float:
    """Logarithm of the chance that no image of a class of this size is drawn."""
    others = samples - size
    if others < batch:
        return -math.inf
    log_factorial_ratio = math.lgamma(others + 1) - math.lgamma(samples + 1)
    return log_factorial_ratio + math.lgamma(samples - batch + 1) - math.lgamma(others - batch + 1)
