"""Segments of flat tensors, and the optimizers' state seen through them."""

import pytest
import torch
from torch import nn

from vitscale.optim import Flat, Segment, whole_parameters
from vitscale.optim.adafactor import Adafactor
from vitscale.optim.lamb import Lamb


def test_a_segment_is_a_view_of_its_run():
    flat = torch.arange(10.0)
    view = Segment("weight", (3, 4), 5, 2, 4).of(flat)
    assert view.tolist() == [2, 3, 4, 5]
    view.zero_()
    assert flat.tolist() == [0, 1, 0, 0, 0, 0, 6, 7, 8, 9]


def test_whole_parameters_are_flats_of_their_own_but_for_frozen_ones():
    module = nn.Linear(3, 2)
    module.bias.requires_grad = False
    (flat,) = whole_parameters(module.named_parameters())
    assert flat.tensor is module.weight
    assert flat.segments == (Segment("weight", (2, 3), 0, 0, 6),)


@pytest.mark.parametrize("make", [Lamb, Adafactor])
def test_state_is_there_before_the_first_step_and_is_the_one_that_steps_use(make):
    flat = nn.Parameter(torch.ones(40 * 33 + 7 + 3))
    segments = (Segment("weight", (40, 33), 0, 0, 40 * 33), Segment("bias", (7,), 0, 40 * 33, 7))
    optimizer = make([flat], lr=0.1, weight_decay=0.1)
    optimizer.bind([Flat(flat, segments)], None)
    views = [optimizer.segment_state(flat, segment) for segment in segments]
    factors = dict(optimizer.parameter_state(flat))
    values = [value for state in [*views, *factors.values()] for value in state.values()]
    assert not any(value.any() for value in values)
    flat.grad = torch.ones_like(flat)
    optimizer.step()
    assert all(value.all() for value in values)
    assert [view["exp_avg"].numel() for view in views] == [40 * 33, 7]
    assert set(factors) == ({"weight"} if make is Adafactor else set())
