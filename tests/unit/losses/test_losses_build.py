import pytest
import torch
from float64_loops import draw, draw_line

from vitscale.losses import Targets, classification_loss

KINDS = {"softmax": {}, "sigmoid": {}, "semantic": {"line": draw_line(5, 1)}}


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_teacher_two_heads_learn_from_the_labels_alike(kind):
    loss = classification_loss(kind, 0.1, **KINDS[kind])
    (first, targets), (second, _) = draw(6, 5, 1.0, 0, mixed=True), draw(6, 5, 1.0, 1)
    of_both = loss((first, second), targets).item()
    assert of_both == pytest.approx((loss(first, targets) + loss(second, targets)).item() / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_alone_are_targets(kind):
    logits, targets = draw(6, 5, 1.0, 0)
    loss = classification_loss(kind, 0.1, **KINDS[kind])
    assert loss(logits, targets.labels).equal(loss(logits, targets))


@pytest.mark.parametrize("kind", KINDS)
def test_shares_weigh_what_the_labels_cost(kind):
    """All losses are linear in their targets."""
    loss = classification_loss(kind, 0.1, **KINDS[kind])
    logits, (labels, *_) = draw(6, 5, 1.0, 0)
    partners = labels.flip(0)
    mixed = loss(logits, Targets(labels, partners, torch.full((6,), 0.3))).item()
    assert mixed == pytest.approx(0.3 * loss(logits, labels).item() + 0.7 * loss(logits, partners).item())


def test_a_semantic_loss_without_a_hierarchy_is_a_mistake_of_the_caller():
    with pytest.raises(AssertionError, match="hierarchy"):
        classification_loss("semantic")
