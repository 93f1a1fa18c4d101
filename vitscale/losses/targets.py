"""What a micro-batch is to be taught: labels, mixed pairs of labels, a teacher's logits."""

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """Targets of B images, as few numbers as say it: there is no tensor [B, C] but a teacher's.

    An image of mixup or CutMix is worth `weights` of its label and the rest of its partner's; partner_labels and
    weights are both there or both None.
    """

    labels: Tensor
    """int64 [B]."""
    partner_labels: Tensor | None = None
    """int64 [B]; None where images are not mixed."""
    weights: Tensor | None = None
    """fp32 [B], 0 to 1: the share of `labels`."""
    teacher_logits: Tensor | None = None
    """[B, C] of any float dtype, detached; None without distillation."""
    image_weights: Tensor | None = None
    """fp32 [B]: how often each image counts in the mean over the batch, 0 where it is padding; None for once each."""

    def rows(self, rows: slice | Tensor) -> "Targets":
        """The targets of some of the images."""
        return Targets(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]

    def shares(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Classes int64 [B, k] and how much of the image each of them is worth [B, k]; k is 1, or 2 for mixed images.

        An image's shares sum to 1. Both classes of a mixed image may be the same one.
        """
        if self.partner_labels is None:
            return self.labels[:, None], torch.ones_like(self.labels, dtype=dtype)[:, None]
        assert self.weights is not None
        weights = self.weights.to(dtype)
        return torch.stack([self.labels, self.partner_labels], 1), torch.stack([weights, 1 - weights], 1)


def total_shares(classes: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The whole share of the class at each place [B, k], and whether the place is the first of its class.

    Args:
        classes, shares: of `Targets.shares`.
    """
    same = classes[:, :, None] == classes[:, None, :]
    return (same * shares[:, None, :]).sum(2), ~same.tril(-1).any(2)
