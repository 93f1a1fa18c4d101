"""Training losses on integer labels or on probabilities of the classes."""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor | tuple[Tensor, Tensor], Tensor], Tensor]
"""(logits [B, C] of any float dtype, labels int64 [B] or fp32 [B, C]) -> fp32 scalar, the mean over the batch.

The two logits of a distilled model in training give the mean of both losses: without a teacher, both heads
learn from the labels."""

SIGMOID_HEAD_BIAS = -10.0
"""First head bias for the sigmoid loss. With zero weights every class starts at a probability of 4.5e-5, so that
the first loss over 21,843 classes is 10.99 (10 from the right class, 0.99 from all others) and not 15,140."""


def classification_loss(kind: Literal["softmax", "sigmoid"], label_smoothing: float) -> Loss:
    """The loss of this kind, computed in fp32 whatever the dtype of the logits.

    softmax is cross-entropy; `label_smoothing` is the mass its targets spread evenly over all C classes
    (Szegedy et al. 2016). sigmoid is binary cross-entropy summed over the classes, as ViT pretrains on
    ImageNet-21k (Beyer et al. 2020); it takes no smoothing.
    """

    def softmax(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

    assert kind == "softmax" or label_smoothing == 0.0  # the config refuses the combination
    of_one = softmax if kind == "softmax" else _sigmoid_loss

    def loss(logits: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        if isinstance(logits, tuple):
            return (of_one(logits[0], labels) + of_one(logits[1], labels)) / 2
        return of_one(logits, labels)

    return loss


def _sigmoid_loss(logits: Tensor, labels: Tensor) -> Tensor:
    # A class costs softplus(-z) as far as it is the right one, and softplus(z) as far as it is not. torch's own binary
    # cross-entropy takes the difference of two numbers near 10 where z is near -10, and is 0.8 % off there in fp32.
    logits = logits.float()
    if labels.is_floating_point():
        return (labels * F.softplus(-logits) + (1 - labels) * F.softplus(logits)).sum() / logits.shape[0]
    sign = 1 - 2 * F.one_hot(labels, logits.shape[1])
    return F.softplus(sign * logits).sum() / logits.shape[0]
