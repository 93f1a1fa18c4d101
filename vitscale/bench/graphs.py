"""Graphs that compiled blocks become at each ZeRO stage, the breaks between them, and the gathers of a step."""

from dataclasses import dataclass

import torch
from torch._dynamo.utils import counters

from vitscale.bench.communication import BUCKET_ELEMENTS, CLASSES, EMBED_DIM, HEADS, IMAGE_PX, MICRO_BATCH, PATCH_PX
from vitscale.config import BatchSplit, EngineSection
from vitscale.engine import create_engine, record_communication
from vitscale.losses import classification_loss
from vitscale.model import create_model
from vitscale.optim import parameter_groups
from vitscale.ranks import Ranks

_WARMUP_STEPS = 2


@dataclass(frozen=True)
class GraphRow:
    """Of one ZeRO stage."""

    zero_stage: int
    depth: int
    graphs: int
    """Compiled in all steps; blocks of one shape share theirs."""
    breaks: int
    gathers: int
    """All-gathers of the step after those that compile."""


def count_graphs(ranks: Ranks, zero_stage: int, depth: int = 3) -> GraphRow:
    """Train a small ViT with compiled blocks for three steps. Collective; forgets what was compiled before."""
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224",
        num_classes=CLASSES,
        img_size=IMAGE_PX,
        patch_size=PATCH_PX,
        embed_dim=EMBED_DIM,
        num_heads=HEADS,
        depth=depth,
    ).to(ranks.device)
    engine = create_engine(
        model,
        torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4),
        classification_loss("softmax"),
        EngineSection.model_validate(
            {"zero_stage": zero_stage, "precision": "fp32", "compile": True, "bucket_elements": BUCKET_ELEMENTS}
        ),
        split=BatchSplit(MICRO_BATCH * ranks.world_size, MICRO_BATCH, 1, ranks.world_size),
        clip_norm=1.0,
        device=ranks.device,
        rank=ranks.rank,
    )
    images = torch.randn(MICRO_BATCH, 3, IMAGE_PX, IMAGE_PX, device=ranks.device)
    micro_batches = [(images, torch.arange(MICRO_BATCH, device=ranks.device))]
    for _ in range(_WARMUP_STEPS):
        engine.train_step(micro_batches, 1e-4)
    with record_communication() as record:
        engine.train_step(micro_batches, 1e-4)
    gathers = record.by_kind["all_gather"].calls if "all_gather" in record.by_kind else 0
    breaks = sum(counters["graph_break"].values())
    return GraphRow(zero_stage, depth, counters["stats"]["unique_graphs"], breaks, gathers)
