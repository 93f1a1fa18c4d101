import pytest
import torch
import torch.nn.functional as F
from float64_loops import batches, draw, softmax_loop, wanted
from hypothesis import given
from hypothesis import strategies as st
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy

from vitscale.losses import Targets, classification_loss

smoothings = st.sampled_from([0.0, 0.1, 0.9])


@given(batches, smoothings)
def test_softmax_against_float64_loops(batch, smoothing):
    logits, targets = draw(*batch)
    loss = classification_loss("softmax", smoothing)(logits, targets)
    assert loss.item() == pytest.approx(softmax_loop(logits, targets, smoothing), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_and_its_gradient_are_those_of_torch_on_dense_targets(smoothing, mixed):
    logits, targets = draw(40, 300, 3.0, 0, mixed, dtype=torch.float64)
    if not mixed:
        dense = targets.labels
        theirs = F.cross_entropy(logits.requires_grad_(), dense, label_smoothing=smoothing)
    else:
        dense = torch.tensor([wanted(targets, image, 300, smoothing) for image in range(40)], dtype=torch.float64)
        theirs = F.cross_entropy(logits.requires_grad_(), dense)
    (expected,) = torch.autograd.grad(theirs, logits)
    ours = classification_loss("softmax", smoothing)(logits, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], expected, rtol=1e-10, atol=1e-15)


def test_timms_targets_of_mixed_images_give_the_same_loss():
    logits, targets = draw(8, 20, 2.0, 0)
    mixed = Targets(targets.labels, targets.labels.flip(0), torch.full((8,), 0.3))
    theirs = mixup_target(targets.labels, 20, lam=0.3, smoothing=0.1)
    expected = SoftTargetCrossEntropy()(logits, theirs)
    torch.testing.assert_close(classification_loss("softmax", 0.1)(logits, mixed), expected)


def test_equal_labels_of_a_mixed_image_are_one_label():
    logits, targets = draw(6, 5, 1.0, 0, mixed=True)
    same = targets._replace(partner_labels=targets.labels)
    loss = classification_loss("softmax", 0.1)
    logits.requires_grad_()
    mixed, plain = loss(logits, same), loss(logits, targets.labels)
    torch.testing.assert_close(mixed, plain)
    grads = [torch.autograd.grad(one, logits)[0] for one in (mixed, plain)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-7)


def test_the_gradient_survives_logits_far_from_zero():
    logits = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]], requires_grad=True)
    loss = classification_loss("softmax")(logits, torch.tensor([0, 0]))
    assert loss.item() == 500.0
    loss.backward()
    assert logits.grad.tolist() == [[0.0, 0.0], [-0.5, 0.5]]
