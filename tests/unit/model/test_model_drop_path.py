import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitscale.model.drop_path import DropPath, add_branch, drop_path_rates, kept_samples, take


def branch_of(x):
    """Anything that takes its samples one by one and is not linear."""
    return torch.sin(3 * x) + x.square()


def applied(x, draw):
    return add_branch(x, branch_of(take(x, draw)), draw)


def test_a_mask_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    rate, samples = 0.25, 4000
    factors = DropPath(rate).train().draw(torch.ones(samples, 2, 3))
    assert factors.shape == (samples, 1, 1)
    kept = factors != 0
    assert torch.equal(factors, kept / (1 - rate))
    # Five standard errors of a binomial share.
    assert abs(kept.float().mean().item() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / samples)


@pytest.mark.parametrize("mode", ["mask", "subset"])
@pytest.mark.parametrize(("rate", "training"), [(0.5, False), (0.0, True)])
def test_nothing_is_dropped(rate, training, mode):
    x = torch.randn(4, 2, 3)
    draw = DropPath(rate, mode).train(training).draw(x)
    assert draw is None
    assert take(x, draw) is x
    assert torch.equal(applied(x, draw), x + branch_of(x))


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_the_mean_over_all_subsets_is_the_whole_branch(kept):
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    subsets = [torch.tensor(rows) for rows in itertools.combinations(range(5), kept)]
    mean = torch.stack([applied(x, rows) for rows in subsets]).mean(0)
    torch.testing.assert_close(mean, x + branch_of(x), rtol=0, atol=1e-12)


def test_a_subset_equals_the_mask_that_keeps_the_same_samples_and_so_do_gradients():
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 0, 5])
    factors = torch.zeros(6, 1, 1, dtype=torch.float64).index_fill(0, rows, 2.0)
    outputs = [applied(x, draw) for draw in (rows, factors)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    weights = torch.randn_like(outputs[0])
    torch.testing.assert_close(*(torch.autograd.grad((o * weights).sum(), x)[0] for o in outputs), rtol=0, atol=1e-12)


def test_a_subset_computes_the_branch_for_its_samples_alone():
    draw = DropPath(0.4, "subset").train().draw(torch.zeros(10, 2, 3))
    assert take(torch.zeros(10, 2, 3), draw).shape == (6, 2, 3)


def test_every_sample_is_as_likely_to_be_in_a_subset():
    torch.manual_seed(0)
    path, x, times = DropPath(0.25, "subset").train(), torch.zeros(8, 1, 1), 2000
    draws = torch.stack([path.draw(x) for _ in range(times)])
    assert draws.shape == (times, 6)
    assert all(len(set(row)) == 6 for row in draws.tolist())
    shares = draws.flatten().bincount(minlength=8) / times
    assert (shares - 0.75).abs().max() < 5 * math.sqrt(0.25 * 0.75 / times)


def test_a_subset_that_would_be_the_whole_draws_nothing_and_one_sample_is_always_kept():
    assert DropPath(0.1, "subset").train().draw(torch.zeros(4, 1, 1)) is None
    assert DropPath(0.99, "subset").train().draw(torch.zeros(4, 1, 1)).shape == (1,)


@given(st.integers(1, 4096), st.floats(0, 1, exclude_max=True))
def test_the_kept_samples_are_the_share_rounded(samples, rate):
    kept = kept_samples(samples, rate)
    assert 1 <= kept <= samples
    assert kept == 1 or abs(kept - samples * (1 - rate)) <= 0.5 + 1e-9 * samples


def test_autocast_leaves_the_residual_stream_as_it_is():
    x = torch.randn(4, 2, 3)
    out = add_branch(x, torch.ones(2, 2, 3, dtype=torch.bfloat16), torch.tensor([1, 3]))
    assert out.dtype == torch.float32
    assert torch.equal(out - x, (x + 2 * torch.tensor([0.0, 1.0, 0.0, 1.0]).reshape(4, 1, 1)) - x)


def test_rates_grow_linearly_from_zero():
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0.0]
