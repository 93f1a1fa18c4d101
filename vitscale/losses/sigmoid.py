"""Sigmoid cross-entropy, one loss an image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.losses.rows import RowLoss
from vitscale.losses.targets import Targets, total_shares


def sigmoid_loss(label_smoothing: float = 0.0) -> RowLoss:
    """-sum_c [t_c log p_c + (1 - t_c) log(1 - p_c)], p the sigmoid of the logits: the sum over classes.

    t is as for `softmax_loss`, and without smoothing the loss is that of ViT's pretraining on ImageNet-21k (Beyer et
    al. 2020). The binary cross-entropy that DeiT III trains with (Touvron et al. 2022) is the mean over classes: C
    times smaller, of the same t.
    """

    def row_loss(logits: Tensor, targets: Targets, gradient: Tensor) -> Tensor:
        classes, shares = targets.shares(logits.dtype)
        total, first = total_shares(classes, shares)
        everywhere = label_smoothing / logits.shape[1]
        wanted = (1 - label_smoothing) * total + everywhere
        at_labels = logits.gather(1, classes)

        # A class costs softplus(-z) as far as it is the right one, and softplus(z) as far as it is not. torch's own
        # binary cross-entropy takes the difference of two numbers near 10 where z is near -10, and is 0.8 % off there
        # in fp32. So the labels are taken out of the sum over all classes, and added in both parts.
        losses = F.softplus(logits).scatter_(1, classes, 0.0).sum(1)
        right, wrong = F.softplus(-at_labels), F.softplus(at_labels)
        losses += (first * (wanted * right + (1 - wanted) * wrong)).sum(1)
        if label_smoothing:
            losses -= everywhere * (logits.sum(1) - (first * at_labels).sum(1))
            torch.sub(torch.sigmoid(logits), everywhere, out=gradient)
        else:
            torch.sigmoid(logits, out=gradient)
        gradient.scatter_(1, classes, (torch.sigmoid(at_labels) - wanted).to(gradient.dtype))
        return losses

    return row_loss
