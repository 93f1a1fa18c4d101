import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitscale.losses import SIGMOID_HEAD_BIAS, classification_loss


def softmax_reference(logits, labels, smoothing):
    """Mean over the batch of -sum_c target_c log p_c, in float64."""
    logits = logits.astype(np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    targets = np.full(logits.shape, smoothing / logits.shape[1])
    targets[np.arange(len(labels)), labels] += 1 - smoothing
    return -(targets * log_p).sum(axis=1).mean()


def sigmoid_reference(logits, labels):
    """Mean over the batch of -sum_c log p(right answer for class c), in float64."""
    sign = -np.ones(logits.shape)
    sign[np.arange(len(labels)), labels] = 1
    return np.logaddexp(0, -sign * logits.astype(np.float64)).sum(axis=1).mean()


batches = st.tuples(st.integers(1, 6), st.integers(1, 9), st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 2**31))


def draw(batch, classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, generator=generator)
    return logits, torch.randint(classes, (batch,), generator=generator)


@given(batches, st.sampled_from([0.0, 0.1, 0.9]))
def test_softmax_against_float64(shape, smoothing):
    logits, labels = draw(*shape)
    loss = classification_loss("softmax", smoothing)(logits, labels)
    expected = softmax_reference(logits.numpy(), labels.numpy(), smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(batches)
def test_sigmoid_against_float64(shape):
    logits, labels = draw(*shape)
    loss = classification_loss("sigmoid", 0.0)(logits, labels)
    assert loss.item() == pytest.approx(sigmoid_reference(logits.numpy(), labels.numpy()), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("kind", "smoothing"), [("softmax", 0.1), ("sigmoid", 0.0)])
def test_bf16_logits_are_computed_in_fp32(kind, smoothing):
    logits, labels = draw(8, 50, 3.0, 0)
    logits = logits.bfloat16()
    loss = classification_loss(kind, smoothing)
    assert loss(logits, labels).dtype == torch.float32
    assert torch.equal(loss(logits, labels), loss(logits.float(), labels))


def test_softmax_gradient_is_probability_less_target():
    logits, labels = draw(4, 5, 1.0, 0)
    logits = logits.double().requires_grad_()
    classification_loss("softmax", 0.0)(logits, labels).backward()
    expected = (logits.detach().softmax(1) - torch.nn.functional.one_hot(labels, 5)) / 4
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-7)


def test_sigmoid_gradient_is_probability_less_target():
    logits, labels = draw(4, 5, 1.0, 0)
    logits = logits.double().requires_grad_()
    classification_loss("sigmoid", 0.0)(logits, labels).backward()
    expected = (logits.detach().sigmoid() - torch.nn.functional.one_hot(labels, 5)) / 4
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-7)


def test_first_losses_of_a_zero_head_over_in21k():
    classes, labels = 21_843, torch.tensor([0, 21_842])
    biased = torch.full((2, classes), SIGMOID_HEAD_BIAS)
    right, others = math.log1p(math.exp(10)), (classes - 1) * math.log1p(math.exp(-10))
    assert f"{right:.2f} + {others:.2f} = {right + others:.2f}" == "10.00 + 0.99 = 10.99"
    assert classification_loss("sigmoid", 0.0)(biased, labels).item() == pytest.approx(right + others, rel=1e-5)
    zero = torch.zeros(2, classes)
    assert classification_loss("softmax", 0.0)(zero, labels).item() == pytest.approx(math.log(classes), rel=1e-6)


def test_sigmoid_takes_no_smoothing():
    with pytest.raises(AssertionError):
        classification_loss("sigmoid", 0.1)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_two_heads_learn_from_the_labels_alike(kind):
    loss = classification_loss(kind, 0.0)
    (first, labels), (second, _) = draw(6, 5, 1.0, 0), draw(6, 5, 1.0, 1)
    assert loss((first, second), labels).item() == pytest.approx(
        (loss(first, labels) + loss(second, labels)).item() / 2
    )


@pytest.mark.parametrize(("kind", "label_smoothing"), [("softmax", 0.0), ("softmax", 0.1), ("sigmoid", 0.0)])
def test_probabilities_weigh_what_the_labels_cost(kind, label_smoothing):
    """Both losses are linear in their targets."""
    loss = classification_loss(kind, label_smoothing)
    logits, labels = draw(6, 5, 1.0, 0)
    own, partner = (torch.nn.functional.one_hot(wanted, 5).float() for wanted in (labels, labels.flip(0)))
    mixed = loss(logits, 0.3 * own + 0.7 * partner).item()
    assert mixed == pytest.approx(0.3 * loss(logits, labels).item() + 0.7 * loss(logits, labels.flip(0)).item())
    assert loss(logits, own).item() == pytest.approx(loss(logits, labels).item())
