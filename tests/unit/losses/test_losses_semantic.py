import numpy as np
import pytest
import torch
from float64_loops import draw, draw_line, semantic_loop, softmax_loop
from hypothesis import given
from hypothesis import strategies as st

from vitscale.data.labels import build_hierarchy, load_label_space
from vitscale.errors import ConfigError
from vitscale.losses import Targets, classification_loss
from vitscale.losses.rows import mean_over_rows
from vitscale.losses.semantic import SemanticSoftmax

trees = st.tuples(st.integers(1, 40), st.integers(0, 2**31))


@given(trees, st.booleans(), st.sampled_from([0.0, 0.2, 0.9]), st.sampled_from([0.1, 1.0, 30.0]))
def test_semantic_against_float64_loops(tree, mixed, smoothing, scale):
    line = draw_line(*tree)
    logits, targets = draw(5, tree[0], scale, tree[1], mixed)
    loss = mean_over_rows(SemanticSoftmax(line, smoothing), logits, targets)
    assert loss.item() == pytest.approx(semantic_loop(logits, targets, line, smoothing), rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_is_the_slope_in_float64(mixed, smoothing):
    line = draw_line(12, 3)
    assert line.shape[1] > 2
    logits, targets = draw(4, 12, 1.0, 0, mixed, dtype=torch.float64)
    loss = classification_loss("semantic", smoothing, line=line)
    assert torch.autograd.gradcheck(lambda z: loss(z, targets), logits.requires_grad_())


def test_the_hierarchy_of_in21k_p():
    line = build_hierarchy(load_label_space("in21k_p_fall11").wnids).line
    logits, targets = draw(3, len(line), 2.0, 0, mixed=True)
    deepest = int((line >= 0).sum(1).argmax())
    targets.labels[0] = deepest
    assert (line[deepest] >= 0).all(), "one image has a label on every level"
    loss = classification_loss("semantic", 0.2, line=line)(logits, targets)
    assert loss.item() == pytest.approx(semantic_loop(logits, targets, line, 0.2), rel=2e-6)


def test_levels_below_the_label_neither_cost_nor_teach():
    # 0 is above 1, 1 above 2 and 3.
    line = np.array([[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 1, 3]], dtype=np.int32)
    logits = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = classification_loss("semantic", 0.2, line=line)
    for label in (0, 1):  # levels of one class have nothing to choose
        loss(logits, torch.tensor([label])).backward()
        assert logits.grad.tolist() == [[0.0] * 4]
    loss(logits, torch.tensor([2])).backward()
    assert (logits.grad[0, :2] == 0).all()
    assert (logits.grad[0, 2:] != 0).all()


def test_one_level_is_plain_softmax():
    logits, targets = draw(6, 8, 1.0, 0, mixed=True)
    loss = mean_over_rows(SemanticSoftmax(np.arange(8, dtype=np.int32)[:, None], 0.1), logits, targets)
    assert loss.item() == pytest.approx(softmax_loop(logits, targets, 0.1), rel=1e-6)


def test_a_hierarchy_of_one_level_is_refused():
    line = build_hierarchy(load_label_space("in1k").wnids).line
    with pytest.raises(ConfigError, match=r"^loss.kind=semantic: none of the training classes is above another"):
        classification_loss("semantic", line=line)


def test_a_level_weighs_the_inverse_of_its_share_of_the_classes_but_at_most_20():
    """60 general classes; the last one has two children."""
    line = np.full((62, 2), -1, dtype=np.int32)
    line[:60, 0], line[60:, 0], line[60:, 1] = np.arange(60), 59, [60, 61]
    logits, labels = torch.zeros(2, 62), Targets(torch.tensor([60, 61]))
    loss = classification_loss("semantic", line=line)
    assert loss(logits, labels).item() == pytest.approx(np.log(60) + 20 * np.log(2))
    only = line[57:62] - np.where(line[57:62] >= 0, 57, 0)  # 5 classes, 2 of them below
    assert classification_loss("semantic", line=only)(torch.zeros(2, 5), Targets(torch.tensor([3, 4]))).item() == (
        pytest.approx(np.log(3) + 5 / 2 * np.log(2))
    )
