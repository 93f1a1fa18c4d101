import pytest
import torch
import torch.nn.functional as F
from float64_loops import draw, sigmoid_loop, soft_teacher_loop, softmax_loop
from hypothesis import given
from hypothesis import strategies as st

from vitscale.config.loss import DistillSection
from vitscale.losses import Targets, classification_loss

HARD = DistillSection(teacher="teacher")
SOFT = DistillSection(teacher="teacher", kind="soft", tau=3.0, alpha=0.1)


def draw_with_teacher(images, classes, seed=0, mixed=False, dtype=torch.float32):
    logits, targets = draw(images, classes, 2.0, seed, mixed, dtype)
    teacher_logits = draw(images, classes, 3.0, seed + 1)[0]
    return logits, targets._replace(teacher_logits=teacher_logits)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 3.0]), st.booleans())
def test_soft_distillation_against_float64_loops(images, classes, seed, tau, mixed):
    logits, targets = draw_with_teacher(images, classes, seed, mixed)
    section = DistillSection(teacher="teacher", kind="soft", tau=tau, alpha=0.3)
    loss = classification_loss("softmax", 0.1, distill=section)
    of_labels = softmax_loop(logits, targets, 0.1)
    of_teacher = soft_teacher_loop(logits, targets.teacher_logits, tau)
    assert loss(logits, targets).item() == pytest.approx(0.7 * of_labels + 0.3 * of_teacher, rel=1e-5, abs=1e-6)
    second = draw(images, classes, 1.0, seed + 2)[0]
    of_second = soft_teacher_loop(second, targets.teacher_logits, tau)
    assert loss((logits, second), targets).item() == pytest.approx(
        0.7 * of_labels + 0.3 * of_second, rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize(("kind", "loop"), [("softmax", softmax_loop), ("sigmoid", sigmoid_loop)])
def test_hard_distillation_takes_the_teachers_class_without_smoothing(kind, loop):
    (logits, targets), (second, _) = draw_with_teacher(6, 9, mixed=True), draw(6, 9, 1.0, 5)
    by_teacher = Targets(targets.teacher_logits.argmax(1))
    loss = classification_loss(kind, 0.1, distill=HARD)
    of_labels = loop(logits, targets, 0.1)
    assert loss(logits, targets).item() == pytest.approx(of_labels / 2 + loop(logits, by_teacher) / 2, rel=1e-5)
    assert loss((logits, second), targets).item() == pytest.approx(of_labels / 2 + loop(second, by_teacher) / 2)


def test_soft_distillation_is_deits_but_for_its_division_by_the_classes():
    logits, targets = draw_with_teacher(6, 9)
    log_p, log_q = (F.log_softmax(z / 3.0, dim=1) for z in (logits, targets.teacher_logits))
    theirs = F.kl_div(log_p, log_q, reduction="sum", log_target=True) * 3.0**2 / logits.numel()
    section = DistillSection(teacher="teacher", kind="soft", tau=3.0, alpha=1.0)
    ours = classification_loss("softmax", distill=section)(logits, targets)
    torch.testing.assert_close(ours / 9, theirs)


@pytest.mark.parametrize("section", [HARD, SOFT], ids=["hard", "soft"])
def test_gradients_are_the_slopes_in_float64(section):
    loss = classification_loss("softmax", 0.1, distill=section)
    logits, targets = draw_with_teacher(4, 7, mixed=True, dtype=torch.float64)
    second = draw(4, 7, 1.0, 3, dtype=torch.float64)[0]
    logits.requires_grad_(), second.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, targets), logits)
    assert torch.autograd.gradcheck(lambda *heads: loss(heads, targets), (logits, second))


def test_labels_teach_the_first_head_and_the_teacher_the_second():
    loss = classification_loss("softmax", distill=HARD)
    (first, targets), (second, _) = draw_with_teacher(4, 7), draw(4, 7, 1.0, 3)
    first.requires_grad_(), second.requires_grad_()

    def gradients(changed):
        return torch.autograd.grad(loss((first, second), changed), (first, second))

    before = gradients(targets)
    other_labels = gradients(targets._replace(labels=(targets.labels + 1) % 7))
    other_teacher = gradients(targets._replace(teacher_logits=targets.teacher_logits.roll(1, dims=1)))
    assert not other_labels[0].equal(before[0])
    assert other_labels[1].equal(before[1])
    assert other_teacher[0].equal(before[0])
    assert not other_teacher[1].equal(before[1])


def test_distillation_without_a_teachers_logits_is_a_mistake_of_the_caller():
    logits, targets = draw(2, 3, 1.0, 0)
    with pytest.raises(AssertionError, match="teacher's logits"):
        classification_loss("softmax", distill=HARD)(logits, targets)
