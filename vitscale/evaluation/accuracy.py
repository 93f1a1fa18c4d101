"""Accuracy over a validation split, every sample counted exactly once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.data.augment import normalise
from vitscale.data.batch import Batch
from vitscale.ranks.groups import Ranks

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Accuracy:
    """Results over all samples of a split."""

    loss: float
    """Mean softmax cross-entropy in nats."""
    top1: float
    """Share of samples whose label has the highest logit, 0 to 1."""
    top5: float
    """Share of samples whose label is among the five highest logits (or all, with fewer classes)."""
    samples: int


def measure_accuracy(
    predict: Callable[[Tensor], Tensor], batches: Iterable[Batch], *, mean: RGB, std: RGB, ranks: Ranks
) -> Accuracy:
    """Evaluate over all ranks. Collective: every rank brings equally many batches, padding is masked out.

    Args:
        predict: logits [B, C] of normalised images [B, 3, S, S] on the ranks' device.
        batches: this rank's share of the split.
        mean, std: normalisation of the pixels, in units of 0 to 1.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        images = normalise(batch.images.to(ranks.device).contiguous(), mean, std)
        logits = predict(images).cpu()[batch.valid]
        labels = batch.labels[batch.valid]
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
        totals += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels))]).double()
    loss_sum, top1, top5, samples = ranks.sum(totals).tolist()
    return Accuracy(loss_sum / samples, top1 / samples, top5 / samples, int(samples))
