import math

import pytest
import torch
import torch.nn.functional as F
from float64_loops import batches, draw, sigmoid_loop, wanted
from hypothesis import given
from hypothesis import strategies as st
from timm.loss import BinaryCrossEntropy

from vitscale.losses import SIGMOID_HEAD_BIAS, classification_loss


@given(batches, st.sampled_from([0.0, 0.1, 0.9]))
def test_sigmoid_against_float64_loops(batch, smoothing):
    logits, targets = draw(*batch)
    loss = classification_loss("sigmoid", smoothing)(logits, targets)
    assert loss.item() == pytest.approx(sigmoid_loop(logits, targets, smoothing), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_and_its_gradient_are_those_of_torch_on_dense_targets(smoothing, mixed):
    logits, targets = draw(40, 300, 3.0, 0, mixed, dtype=torch.float64)
    dense = torch.tensor([wanted(targets, image, 300, smoothing) for image in range(40)], dtype=torch.float64)
    theirs = F.binary_cross_entropy_with_logits(logits.requires_grad_(), dense, reduction="sum") / 40
    (expected,) = torch.autograd.grad(theirs, logits)
    ours = classification_loss("sigmoid", smoothing)(logits, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], expected, rtol=1e-10, atol=1e-15)


def test_deit_iii_takes_the_mean_over_classes_of_the_same_terms():
    logits, targets = draw(8, 50, 2.0, 0)
    theirs = BinaryCrossEntropy(smoothing=0.1)(logits, targets.labels)
    ours = classification_loss("sigmoid", 0.1)(logits, targets)
    torch.testing.assert_close(ours / 50, theirs)


@pytest.mark.parametrize("partner", [0, 1])
def test_a_class_that_is_right_and_known_costs_what_is_left(partner):
    """Near 10 the difference of two numbers would have an error of 1e-6, 2 % of what is left."""
    logits = torch.tensor([[10.0, -10.0]], requires_grad=True)
    weights = torch.tensor([0.5 if partner == 0 else 1.0])
    targets = draw(1, 2, 1.0, 0)[1]._replace(
        labels=torch.tensor([0]), partner_labels=torch.tensor([partner]), weights=weights
    )
    loss = classification_loss("sigmoid")(logits, targets)
    assert loss.item() == pytest.approx(2 * math.log1p(math.exp(-10)), rel=1e-6)


def test_first_losses_of_a_zero_head_over_in21k():
    classes, labels = 21_843, torch.tensor([0, 21_842])
    biased = torch.full((2, classes), SIGMOID_HEAD_BIAS)
    right, others = math.log1p(math.exp(10)), (classes - 1) * math.log1p(math.exp(-10))
    assert f"{right:.2f} + {others:.2f} = {right + others:.2f}" == "10.00 + 0.99 = 10.99"
    assert classification_loss("sigmoid")(biased, labels).item() == pytest.approx(right + others, rel=1e-5)
    zero = torch.zeros(2, classes)
    assert classification_loss("softmax")(zero, labels).item() == pytest.approx(math.log(classes), rel=1e-6)
