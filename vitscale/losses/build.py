"""From the config's words to the loss that an engine calls."""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitscale.config.loss import DistillSection, LossKind
from vitscale.errors import ConfigError
from vitscale.losses.distillation import hard_teacher_loss, soft_teacher_loss, weighted_sum
from vitscale.losses.rows import RowLoss, mean_over_rows
from vitscale.losses.semantic import SemanticSoftmax
from vitscale.losses.sigmoid import sigmoid_loss
from vitscale.losses.softmax import softmax_loss
from vitscale.losses.targets import Targets

Loss = Callable[[Tensor | tuple[Tensor, Tensor], Tensor | Targets], Tensor]
"""(logits [B, C] in bf16 or fp32, or those of both heads of a distilled model; labels int64 [B] or Targets) -> fp32
scalar: the mean over the batch. Ranks with equal micro-batches have the global mean where they average it, and so
have their gradients; with padding in them too, by the `Targets.image_weights` that the trainer gives."""

SIGMOID_HEAD_BIAS = -10.0
"""First head bias for the sigmoid loss. With zero weights every class starts at a probability of 4.5e-5, so that
the first loss over 21,843 classes is 10.99 (10 from the right class, 0.99 from all others) and not 15,140."""


def classification_loss(
    kind: LossKind,
    label_smoothing: float = 0.0,
    *,
    line: NDArray[np.int32] | None = None,
    distill: DistillSection | None = None,
) -> Loss:
    """The loss of this kind, computed in fp32 whatever the dtype of the logits, and kept as one gradient (`rows`).

    Without a teacher, both heads of a distilled model learn from the labels, and the loss is the mean of theirs.
    With one, the loss is (1 - alpha) x the labels' + alpha x the teacher's: of a distilled model the labels teach
    the first head and the teacher the second, of another model both teach the only head.

    Args:
        kind: softmax cross-entropy (`softmax_loss`), sigmoid cross-entropy summed over the classes (`sigmoid_loss`) or
            the semantic softmax over a hierarchy (`SemanticSoftmax`).
        label_smoothing: mass of the targets that is spread evenly over the classes; the teacher's stay as they are.
        line: the hierarchy of the classes, [C, levels] as `vitscale.data.labels.Hierarchy.line`; semantic only.
        distill: how a teacher's logits, in `Targets.teacher_logits`, are learned from.

    Raises:
        ConfigError: the hierarchy has a single level.
    """

    def labels_loss(smoothing: float) -> RowLoss:
        if kind == "semantic":
            assert line is not None, "the semantic loss needs a hierarchy"
            if line.shape[1] == 1:
                raise ConfigError(
                    "loss.kind=semantic: none of the training classes is above another, so it would be the softmax "
                    "loss: set loss.kind=softmax, or data.label_space to one with general classes, such as "
                    "in21k_p_fall11"
                )
            return SemanticSoftmax(line, smoothing)
        return (softmax_loss if kind == "softmax" else sigmoid_loss)(smoothing)

    of_labels = labels_loss(label_smoothing)
    if distill is None:
        return partial(_loss, of_labels, of_labels, of_labels, 0.5)
    of_teacher = soft_teacher_loss(distill.tau) if distill.kind == "soft" else hard_teacher_loss(labels_loss(0.0))
    both = weighted_sum(of_labels, of_teacher, distill.alpha)
    return partial(_loss, both, of_labels, of_teacher, distill.alpha)


def _loss(
    of_one: RowLoss,
    of_first: RowLoss,
    of_second: RowLoss,
    alpha: float,
    logits: Tensor | tuple[Tensor, Tensor],
    targets: Tensor | Targets,
) -> Tensor:
    """The loss of an only head, or that of two: alpha is the second's part."""
    if isinstance(targets, Tensor):
        targets = Targets(targets)
    if isinstance(logits, Tensor):
        return mean_over_rows(of_one, logits, targets)
    first, second = (
        mean_over_rows(loss, of_head, targets) for loss, of_head in zip((of_first, of_second), logits, strict=True)
    )
    return (1 - alpha) * first + alpha * second
