"""A small ViT under DeepSpeed, for what is counted and not timed."""

from typing import Any

import torch

from vitscale.config import BatchSplit, EngineSection
from vitscale.engine import MicroBatch, TrainEngine, create_engine
from vitscale.losses import classification_loss
from vitscale.model import create_model
from vitscale.optim import parameter_groups
from vitscale.ranks.groups import Ranks

_CLASSES, _IMAGE_PX, _MICRO_BATCH = 64, 16, 2
# A block has 49,984 elements: one is gathered ahead, and of 6 not all are kept from forward to backward.
_BUCKET_ELEMENTS = 100_000


def small_engine(
    ranks: Ranks, *, depth: int, grad_accum: int = 1, **engine: Any
) -> tuple[TrainEngine, list[MicroBatch], int]:
    """An engine, the micro-batches of a step, and the number of parameters; `engine` has keys of the section."""
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224",
        num_classes=_CLASSES,
        img_size=_IMAGE_PX,
        patch_size=8,
        embed_dim=64,
        num_heads=2,
        depth=depth,
    ).to(ranks.device)
    parameters = sum(p.numel() for p in model.parameters())
    built = create_engine(
        model,
        torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4),
        classification_loss("softmax"),
        EngineSection.model_validate({"bucket_elements": _BUCKET_ELEMENTS, **engine}),
        split=BatchSplit(_MICRO_BATCH * grad_accum * ranks.world_size, _MICRO_BATCH, grad_accum, ranks.world_size),
        clip_norm=1.0,
        device=ranks.device,
        rank=ranks.rank,
    )
    images = torch.randn(_MICRO_BATCH, 3, _IMAGE_PX, _IMAGE_PX, device=ranks.device)
    return built, [(images, torch.arange(_MICRO_BATCH, device=ranks.device))] * grad_accum, parameters
