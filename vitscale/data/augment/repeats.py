"""Repeated augmentation: which position of the data order stands at a position of the run."""

import numpy as np
from numpy.typing import NDArray


def repeated(positions: NDArray[np.int64], repeats: int, lanes: int) -> NDArray[np.int64]:
    """Positions of the order whose samples stand at these positions of the run, int64 of the same shape [n].

    Each sample comes `repeats` times (Hoffer et al. 2020, Augment your batch; Berman et al. 2019, MultiGrain), `lanes`
    positions apart: a group of repeats * lanes positions shows one sample of each lane, over and over. So a position
    keeps its lane; the partners p and p xor 1 are different samples (from two lanes on); the repeats of a sample are in
    one batch where repeats * lanes divides the global batch. Augmentation is drawn from the position of the run, so
    no two repeats are alike. An epoch is `repeats` times as long.
    """
    return positions // (repeats * lanes) * lanes + positions % lanes
