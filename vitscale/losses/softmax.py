"""Softmax cross-entropy, one loss an image."""

import torch
from torch import Tensor

from vitscale.losses.rows import RowLoss
from vitscale.losses.targets import Targets, total_shares


def softmax_loss(label_smoothing: float = 0.0) -> RowLoss:
    """-sum_c t_c log p_c, p the softmax of the logits.

    t is (1 - label_smoothing) x the shares of the image's labels + label_smoothing / C for every class (Szegedy et
    al. 2016).
    """

    def row_loss(logits: Tensor, targets: Targets, gradient: Tensor) -> Tensor:
        classes, shares = targets.shares(logits.dtype)
        log_p = torch.log_softmax(logits, dim=1)
        everywhere = label_smoothing / logits.shape[1]
        wanted = (1 - label_smoothing) * total_shares(classes, shares)[0] + everywhere
        at_labels = log_p.gather(1, classes)
        losses = -(1 - label_smoothing) * (shares * at_labels).sum(1)
        if label_smoothing:
            losses -= label_smoothing * log_p.mean(1)
            torch.sub(log_p.exp_(), everywhere, out=gradient)
        else:
            torch.exp(log_p, out=gradient)
        gradient.scatter_(1, classes, (at_labels.exp() - wanted).to(gradient.dtype))
        return losses

    return row_loss
