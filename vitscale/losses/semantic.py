"""Semantic softmax: a softmax over each level of a hierarchy of classes."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.losses.targets import Targets

_LARGEST_WEIGHT = 20.0


class SemanticSoftmax:
    """A row loss: the sum over levels of weight x softmax cross-entropy among the classes of that level.

    As Ridnik et al. 2021 (ImageNet-21K pretraining for the masses, arXiv 2104.10972) and their code: on each level
    the target is the label's ancestor there, or the label itself on its own level; a level that the label does not
    reach costs nothing. A level's weight is C over the number of classes that reach it, at most 20, so that deep
    levels count though few images have a label on them. Label smoothing spreads its mass over the classes of the
    level. Both labels of a mixed image go up the hierarchy, each with its share.

    Args:
        line: [C, levels], as `vitscale.data.labels.Hierarchy.line`: the label of each class's ancestor on each level,
            on its own level the class itself, -1 on deeper ones.
        label_smoothing: mass spread evenly over the classes of a level; their recipe has 0.2.
    """

    def __init__(self, line: NDArray[np.int32], label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing
        reached = line >= 0
        level = reached.sum(1) - 1
        self.sizes: list[int] = np.bincount(level, minlength=line.shape[1]).tolist()
        weights = np.minimum(len(line) / reached.sum(0), _LARGEST_WEIGHT)
        # Columns are sorted by level, so that each level is one run of them.
        order = np.argsort(level, kind="stable")
        place = np.argsort(order)
        self._order, self._place = torch.from_numpy(order), torch.from_numpy(place)
        # Of each class and level: the sorted column of its ancestor, and the level's weight. Where there is none the
        # weight is 0 and the column is any.
        self._columns = torch.from_numpy(place[np.maximum(line, 0)])
        self._weights = torch.from_numpy(np.where(reached, weights, 0.0))

    def __call__(self, logits: Tensor, targets: Targets, gradient: Tensor) -> Tensor:
        """See `RowLoss`."""
        self._move(logits.device)
        smoothing = self.label_smoothing
        classes, shares = targets.shares(logits.dtype)
        columns = self._columns[classes]  # [n, k, levels], as all that follows but for what says otherwise
        weights = self._weights[classes].to(logits.dtype) * shares[:, :, None]
        level_weights = weights.sum(1)  # [n, levels]

        sorted_logits = logits.index_select(1, self._order)
        log_p = torch.empty_like(sorted_logits)
        by_level = zip(*(torch.split(one, self.sizes, 1) for one in (sorted_logits, log_p)), strict=True)
        losses = torch.zeros_like(logits[:, 0])
        for index, (of_logits, of_log_p) in enumerate(by_level):
            of_log_p.copy_(torch.log_softmax(of_logits, dim=1))
            if smoothing:
                losses -= smoothing * level_weights[:, index] * of_log_p.mean(1)
        at_targets = log_p.gather(1, columns.flatten(1)).view_as(weights)
        losses -= (1 - smoothing) * (weights * at_targets).sum((1, 2))

        slopes = log_p.exp_()
        for index, of_level in enumerate(torch.split(slopes, self.sizes, 1)):
            if smoothing:
                of_level -= smoothing / self.sizes[index]
            of_level *= level_weights[:, index, None]
        # Label by label: the columns of one label differ, those of two may not.
        for of_columns, of_weights in zip(columns.unbind(1), weights.unbind(1), strict=True):
            slopes.scatter_add_(1, of_columns, -(1 - smoothing) * of_weights)
        gradient.copy_(slopes.index_select(1, self._place))
        return losses

    def _move(self, device: torch.device) -> None:
        """Bring the tables to the device of the logits, once."""
        if self._order.device != device:
            for name in ("_order", "_place", "_columns", "_weights"):
                setattr(self, name, getattr(self, name).to(device))
