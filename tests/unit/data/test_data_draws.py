import math

import numpy as np
import pytest
from scipy import stats

from vitscale.data import draws, order

POSITIONS = np.arange(20_000)
# Distances between the distributions of a sample and of a law stay below this but once in a million.
DISTANCE = 2.7 / math.sqrt(len(POSITIONS))


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.8, 1.0, 3.0, 50.0])
def test_the_symmetric_beta_follows_its_law(alpha: float) -> None:
    first, second = (draws.uniform(0, draws.MIX, POSITIONS, word) for word in range(2))
    values = draws.symmetric_beta(alpha, first, second)
    # A strongly bent law has mass nearer to its ends than float64 reaches from a half: 1e-15 is the nearest looked at.
    low = np.geomspace(1e-15, 0.5, 500)
    law = stats.beta(alpha, alpha).cdf(low)
    assert np.abs((values[:, None] < low).mean(0) - law).max() < DISTANCE
    assert np.abs((1 - values[:, None] < low).mean(0) - law).max() < DISTANCE


@pytest.mark.parametrize("alpha", [1e-3, 0.2, 1.0])
@pytest.mark.parametrize("first", [0.0, 2.0**-53, 1 - 2.0**-53])
@pytest.mark.parametrize("second", [0.0, 0.25, 0.5, 1 - 2.0**-53])
def test_the_symmetric_beta_stays_in_its_range_at_the_ends(alpha: float, first: float, second: float) -> None:
    assert 0 <= draws.symmetric_beta(alpha, np.array(first), np.array(second)) <= 1


def test_normal_numbers_follow_their_law() -> None:
    first, second = (draws.uniform(0, draws.RAND_AUGMENT, POSITIONS, word) for word in range(2))
    values = draws.normal(first, second)
    assert stats.kstest(values, "norm").statistic < DISTANCE
    assert np.isfinite(draws.normal(np.array([0.0, 1 - 2.0**-53]), np.array([0.0, 0.5]))).all()


def test_uniform_numbers_follow_their_law_and_scale_to_a_range() -> None:
    values = draws.uniform(0, draws.JITTER, POSITIONS)
    assert stats.kstest(values, "uniform").statistic < DISTANCE
    assert stats.kstest(draws.between(-3, 5, values), stats.uniform(-3, 8).cdf).statistic < DISTANCE


def test_no_purpose_shares_its_randomness_with_another() -> None:
    purposes = [
        value
        for module in (draws, order)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, int) and name != "ROUNDS"
    ]
    assert len(purposes) >= 14
    assert len(set(purposes)) == len(purposes)
