"""Random numbers as functions of a position: each is a hash of (seed, purpose, position, ...).

What a loader process draws for an image so follows from its position alone, whatever the worker, the rank, the
batch or the restart. The transforms from uniform numbers to other distributions are written out here for the same
reason: numpy does not promise the streams of its generators.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitscale.data.order import hash64

# Purposes of augmentation; those of `vitscale.data.order` are below 100.
RAND_AUGMENT, THREE_AUGMENT, JITTER, BLUR, ERASE, ERASE_FILL, MIX = range(100, 107)


def uniform(*words: ArrayLike) -> NDArray[np.float64]:
    """Uniform in [0, 1): the top 53 bits of the words' hash, as many as a float64 holds."""
    return (hash64(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def between(low: ArrayLike, high: ArrayLike, share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Uniform in [low, high) from uniform shares in [0, 1)."""
    low = np.asarray(low)
    return np.asarray(low + (np.asarray(high) - low) * share)


def normal(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard normal from two uniform numbers in [0, 1) each (Box and Muller 1958)."""
    return np.asarray(np.sqrt(-2 * np.log(1 - first)) * np.cos(2 * np.pi * second))


def symmetric_beta(alpha: float, first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Beta(alpha, alpha) from two uniform numbers in [0, 1) each, in closed form and for every alpha > 0.

    Student's t with 2 alpha degrees of freedom is a radius times the cosine of a uniform angle (Bailey 1994, Polar
    generation of random variates with the t-distribution), and t / sqrt(2 alpha + t^2), halved and shifted by a
    half, is Beta(alpha, alpha) (Devroye 1996, Random variate generation in one line of code).
    """
    u = first ** (1 / alpha)
    cosine = np.cos(2 * np.pi * second)
    signed = cosine * np.sqrt((1 - u) / (u + (1 - u) * cosine**2))
    return np.asarray(np.clip(0.5 + 0.5 * signed, 0.0, 1.0))  # rounding may reach past the ends
