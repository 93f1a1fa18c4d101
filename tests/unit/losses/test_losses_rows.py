"""The mean over a batch with its gradient: chunks, dtypes, memory, and what it does not do."""

import pytest
import torch
import torch.nn.functional as F
from float64_loops import draw, draw_line
from torch.utils._python_dispatch import TorchDispatchMode

from vitscale.config.loss import DistillSection
from vitscale.losses import Targets, classification_loss, rows

CLASSES = 30
LOSSES = {
    "softmax": classification_loss("softmax", 0.1),
    "sigmoid": classification_loss("sigmoid", 0.1),
    "semantic": classification_loss("semantic", 0.2, line=draw_line(CLASSES, 0)),
    "soft": classification_loss("softmax", distill=DistillSection(teacher="t", kind="soft", tau=2.0)),
}


def draw_all(images, dtype=torch.float32, mixed=True):
    logits, targets = draw(images, CLASSES, 2.0, 0, mixed, dtype)
    return logits, targets._replace(teacher_logits=draw(images, CLASSES, 2.0, 1)[0])


def loss_and_gradient(loss, logits, targets):
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, targets)
    (0.25 * value).backward()  # as an engine's accumulation has it
    return value.detach(), logits.grad


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


@pytest.mark.parametrize("mixed", [False, True])
def test_gradcheck_in_float64(loss, mixed):
    logits, targets = draw_all(4, torch.float64, mixed)
    assert loss(logits, targets).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda z: loss(z, targets), logits.requires_grad_())


def test_chunks_do_not_show(loss, monkeypatch):
    logits, targets = draw_all(11)
    whole = loss_and_gradient(loss, logits, targets)
    for elements in (1, 4 * CLASSES, 11 * CLASSES - 1):
        monkeypatch.setattr(rows, "_CPU_CHUNK_ELEMENTS", elements)
        value, gradient = loss_and_gradient(loss, logits, targets)
        torch.testing.assert_close(value, whole[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, whole[1], rtol=1e-6, atol=1e-9)


def test_bf16_logits_are_computed_in_fp32_and_get_their_gradient_in_bf16(loss):
    logits, targets = draw_all(8)
    value, gradient = loss_and_gradient(loss, logits.bfloat16(), targets)
    expected, exact = loss_and_gradient(loss, logits.bfloat16().float(), targets)
    assert value.dtype == torch.float32
    assert value.equal(expected)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, exact.bfloat16(), rtol=2**-8, atol=0)


def test_the_batch_mean_of_equal_parts_is_the_mean_of_all(loss):
    """What engines do over micro-batches and ranks."""
    logits, targets = draw_all(12)
    value, gradient = loss_and_gradient(loss, logits, targets)
    parts = [
        loss_and_gradient(loss, logits[part], targets.rows(part)) for part in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    torch.testing.assert_close(sum(part for part, _ in parts) / 3, value)
    torch.testing.assert_close(torch.cat([part for _, part in parts]) / 3, gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_mean_over_padded_parts_is_the_mean_of_the_images(loss, mixed, heads, monkeypatch):
    """Ten images in 4 micro-batches of 4 places, one of them all padding."""
    monkeypatch.setattr(rows, "_CPU_CHUNK_ELEMENTS", 3 * CLASSES)
    logits, targets = draw_all(16, mixed=mixed)
    valid = torch.tensor([1.0] * 8 + [1, 1, 0, 0] + [0.0] * 4)
    images = valid.bool()
    weights = valid * 16 / 10

    def on_heads(logits, targets):
        return loss(logits if heads == 1 else (logits, logits.flip(1)), targets)

    value, gradient = loss_and_gradient(
        on_heads, logits[images], Targets(*(part if part is None else part[images] for part in targets))
    )
    padded = targets._replace(image_weights=weights)
    parts = [
        loss_and_gradient(on_heads, logits[part], padded.rows(part))
        for part in (slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 16))
    ]
    torch.testing.assert_close(sum(part for part, _ in parts) / 4, value)
    found = torch.cat([part for _, part in parts]) / 4
    torch.testing.assert_close(found[images], gradient, rtol=1e-5, atol=1e-9)
    assert not found[~images].any()


def test_what_lies_between_the_rows_is_not_looked_at(loss):
    """The logits of a padded head are a part of a larger tensor."""
    logits, targets = draw_all(5)
    padded = torch.full((5, 64), torch.nan)
    padded[:, :CLASSES] = logits
    found = loss_and_gradient(loss, logits, targets)
    padded.requires_grad_()
    value = loss(padded[:, :CLASSES], targets)
    (0.25 * value).backward()
    torch.testing.assert_close(value, found[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(padded.grad[:, :CLASSES], found[1], rtol=1e-6, atol=1e-9)
    assert not padded.grad[:, CLASSES:].any()


class LiveElements(TorchDispatchMode):
    """The most elements that new tensors of a dtype held at one time, storage by storage."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.live, self.most = dtype, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == self.dtype:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage), tensor.numel()
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return result


def kept_for_backward(compute):
    """dtype and elements of what autograd keeps."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, t.numel())) or t, lambda t: t):
        compute().backward()
    return kept


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_of_bf16_logits_one_bf16_gradient_is_kept_and_no_fp32_copy(kind):
    images, classes = 512, 21_843
    logits, targets = draw(images, classes, 2.0, 0)
    logits = logits.bfloat16().requires_grad_()
    of_kind = classification_loss(kind)
    assert kept_for_backward(lambda: of_kind(logits, targets)) == [(torch.bfloat16, images * classes)]
    with LiveElements(torch.float32) as ours:
        value = of_kind(logits, targets)
        value.backward()
    assert ours.most < images * classes / 4  # a few tensors of the size of a chunk

    plain = kept_for_backward(lambda: F.cross_entropy(logits.float(), targets.labels))
    assert (torch.float32, images * classes) in plain
    with LiveElements(torch.float32) as theirs:
        F.cross_entropy(logits.float(), targets.labels).backward()
    assert theirs.most >= 2 * images * classes  # so the count sees what there is


def test_a_second_derivative_is_refused():
    logits, targets = draw_all(3)
    value = LOSSES["softmax"](logits.requires_grad_(), targets)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, logits, create_graph=True)


def test_fp16_logits_are_a_mistake_of_the_caller():
    with pytest.raises(AssertionError, match="fp16"):
        LOSSES["softmax"](torch.zeros(2, CLASSES).half(), Targets(torch.tensor([0, 1])))


def test_a_compiled_caller_breaks_its_graph_here_and_has_the_same_numbers(loss):
    torch._dynamo.reset()
    logits, targets = draw_all(6)
    value, gradient = loss_and_gradient(loss, logits, targets)
    compiled = torch.compile(lambda z: loss(2 * z, targets) + 1, backend="eager")
    logits = (logits / 2).requires_grad_()
    found = compiled(logits)
    (0.25 * found).backward()
    torch.testing.assert_close(found, value + 1)
    torch.testing.assert_close(logits.grad, 2 * gradient)
