"""How well batches mix classes, against every draw there is, exact fractions, and sorted or shuffled samples."""

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.mixing import LEAST_SCORE, expected_distinct, measure_mixing


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any), st.data())
def test_the_ideal_is_the_mean_over_all_draws(class_images, data):
    labels = np.repeat(np.arange(len(class_images)), class_images)
    batch = data.draw(st.integers(1, len(labels)))
    distinct = [len(set(draw)) for draw in combinations(labels.tolist(), batch)]
    assert expected_distinct(np.array(class_images), batch) == pytest.approx(np.mean(distinct), rel=1e-12)


def test_the_ideal_is_exact_for_millions_of_samples():
    class_images = [1, 1, 50, 700, 1400, 3000, 14_000_000]
    samples = sum(class_images)
    exact = sum(1 - Fraction(comb(samples - size, 1024), comb(samples, 1024)) for size in class_images)
    assert expected_distinct(np.array(class_images), 1024) == pytest.approx(float(exact), rel=1e-6)


def test_a_full_permutation_of_imagenet_1k_has_641_classes_in_a_batch():
    assert expected_distinct(np.full(1000, 1281), 1024) == pytest.approx(641, abs=0.5)


def test_shuffled_samples_mix_and_sorted_ones_do_not():
    labels = np.repeat(np.arange(500, dtype=np.int32), 100)
    shuffled = np.random.default_rng(0).permutation(labels)
    assert measure_mixing(shuffled, batch=1024, lanes=64, block=64).score >= LEAST_SCORE
    assert measure_mixing(labels, batch=1024, lanes=64, block=64).score < 0.3
    # Blocks of one sample are a full shuffle, whatever the shards hold.
    assert measure_mixing(labels, batch=1024, lanes=64, block=1).score >= LEAST_SCORE


def test_a_split_smaller_than_a_batch_is_one_batch():
    mixing = measure_mixing(np.array([3, 3, 0, 1], dtype=np.int32), batch=1024, lanes=64, block=64)
    assert (mixing.batch, mixing.distinct, mixing.ideal, mixing.score) == (4, 3, 3, 1)
