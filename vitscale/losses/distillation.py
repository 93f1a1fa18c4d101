"""Learning from a teacher's logits (Touvron et al. 2021, DeiT, arXiv 2012.12877)."""

import torch
from torch import Tensor

from vitscale.losses.rows import RowLoss
from vitscale.losses.targets import Targets


def soft_teacher_loss(tau: float) -> RowLoss:
    """tau^2 x KL(teacher || student), both softmaxed at temperature tau: equation 2 of the paper, its second part.

    The sum over classes. DeiT's own code divides by the number of classes too.
    """

    def row_loss(logits: Tensor, targets: Targets, gradient: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits / tau, dim=1)
        log_q = torch.log_softmax(_teacher_logits(targets).to(logits.dtype) / tau, dim=1)
        q = log_q.exp()
        losses = tau**2 * (q * (log_q - log_p)).sum(1)
        torch.mul(log_p.exp_().sub_(q), tau, out=gradient)
        return losses

    return row_loss


def hard_teacher_loss(label_loss: RowLoss) -> RowLoss:
    """A loss on the class that the teacher finds likeliest, in place of the label: equation 3, its second part.

    Args:
        label_loss: without label smoothing, as in the paper.
    """

    def row_loss(logits: Tensor, targets: Targets, gradient: Tensor) -> Tensor:
        return label_loss(logits, Targets(_teacher_logits(targets).argmax(1)), gradient)

    return row_loss


def weighted_sum(of_labels: RowLoss, of_teacher: RowLoss, alpha: float) -> RowLoss:
    """(1 - alpha) x the loss on labels + alpha x the loss on the teacher, of the same logits."""

    def row_loss(logits: Tensor, targets: Targets, gradient: Tensor) -> Tensor:
        gradients = torch.empty_like(logits), torch.empty_like(logits)
        losses = of_labels(logits, targets, gradients[0]), of_teacher(logits, targets, gradients[1])
        torch.lerp(*gradients, alpha, out=gradient)
        return torch.lerp(*losses, alpha)

    return row_loss


def _teacher_logits(targets: Targets) -> Tensor:
    assert targets.teacher_logits is not None, "distillation needs the teacher's logits in the targets"
    return targets.teacher_logits
