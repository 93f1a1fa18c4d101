"""Step time of the DeepSpeed engine over the plain torch engine, same model and images, in alternation."""

import statistics
import time
from dataclasses import dataclass

import torch

from vitscale.config import BatchSplit, EngineSection, OptimSection
from vitscale.engine import TrainEngine, create_engine
from vitscale.losses import classification_loss
from vitscale.model import create_model, resolve_variant
from vitscale.optim import build_optimizer
from vitscale.ranks.groups import Ranks


@dataclass(frozen=True)
class EngineTimes:
    """Step times of one comparison, in seconds."""

    torch_s: list[float]
    deepspeed_s: list[float]

    @property
    def ratios(self) -> list[float]:
        """DeepSpeed's time over torch's, pair by pair."""
        return [b / a for a, b in zip(self.torch_s, self.deepspeed_s, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)


def compare_engines(
    ranks: Ranks, *, model_name: str, micro_batch: int, zero_stage: int, pairs: int, warmup_pairs: int = 2
) -> EngineTimes:
    """Time single steps of both engines in turn, so that a drift of the machine's speed hits both. Collective.

    Args:
        ranks: a started process group.
        model_name: a variant of the table.
        micro_batch: images a rank and step.
        zero_stage: ZeRO stage of the DeepSpeed engine.
        pairs: counted pairs of steps.
        warmup_pairs: pairs that are run first and not counted.
    """
    engines = [_engine(kind, ranks, model_name, micro_batch, zero_stage) for kind in ("torch", "deepspeed")]
    image_px = resolve_variant(model_name).image_px
    images = torch.randn(micro_batch, 3, *image_px, device=ranks.device)
    labels = torch.arange(micro_batch, device=ranks.device)
    times: list[list[float]] = [[], []]
    for pair in range(warmup_pairs + pairs):
        for engine, kept in zip(engines, times, strict=True):
            started_s = time.perf_counter()
            float(engine.train_step([(images, labels)], 1e-4).loss)  # waits for the device
            if pair >= warmup_pairs:
                kept.append(time.perf_counter() - started_s)
    return EngineTimes(*times)


def _engine(kind: str, ranks: Ranks, model_name: str, micro_batch: int, zero_stage: int) -> TrainEngine:
    torch.manual_seed(0)
    model = create_model(model_name, num_classes=1000).to(ranks.device)
    return create_engine(
        model,
        build_optimizer(model, OptimSection(peak_lr=1e-4)),
        classification_loss("softmax", 0.0),
        EngineSection.model_validate({"kind": kind, "zero_stage": zero_stage}),
        split=BatchSplit(micro_batch * ranks.world_size, micro_batch, 1, ranks.world_size),
        clip_norm=1.0,
        device=ranks.device,
        rank=ranks.rank,
    )
