"""What the collectives of a step carry at each ZeRO stage, counted on a small ViT."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vitscale.config import BatchSplit, EngineSection
from vitscale.engine import Precision, Traffic, TrainEngine, create_engine, record_communication
from vitscale.losses import classification_loss
from vitscale.model import create_model
from vitscale.optim import parameter_groups
from vitscale.ranks import Ranks

CLASSES, IMAGE_PX, PATCH_PX, EMBED_DIM, HEADS = 64, 16, 8, 64, 2
MICRO_BATCH = 2
# A block has 49,984 elements: one is gathered ahead, and of 6 not all are kept from forward to backward.
BUCKET_ELEMENTS = 100_000


@dataclass(frozen=True)
class CommunicationRow:
    """One rank's collectives in one optimizer step."""

    zero_stage: int
    grad_accum: int
    precision: Precision
    world_size: int
    depth: int
    parameters: int
    by_kind: dict[str, Traffic]

    @property
    def payload_bytes_a_parameter(self) -> float:
        """Bytes of the tensors that collectives worked on, over the model's parameters."""
        return sum(traffic.payload_bytes for traffic in self.by_kind.values()) / self.parameters

    @property
    def wire_bytes_a_parameter(self) -> float:
        """Bytes that the rank sent in rings, over the model's parameters."""
        return sum(traffic.wire_bytes for traffic in self.by_kind.values()) / self.parameters

    @property
    def gathers(self) -> int:
        """All-gathers in the step."""
        return self.by_kind["all_gather"].calls if "all_gather" in self.by_kind else 0


def measure(
    ranks: Ranks,
    *,
    precision: Precision = "bf16",
    zero_stages: Sequence[int] = (1, 2, 3),
    grad_accums: Sequence[int] = (1, 3),
    depth: int = 6,
    warmup_steps: int = 2,
) -> list[CommunicationRow]:
    """Count the collectives of one step at each stage and accumulation. Collective.

    Args:
        ranks: a started process group.
        precision: of weights and gradients.
        zero_stages: to be counted.
        grad_accums: micro-steps of a step, to be counted at each stage.
        depth: blocks of the model.
        warmup_steps: that go before; at stage 3 the first records what is gathered when.
    """
    rows = []
    for stage in zero_stages:
        for grad_accum in grad_accums:
            engine, parameters = _engine(ranks, precision, stage, grad_accum, depth)
            images = torch.randn(MICRO_BATCH, 3, IMAGE_PX, IMAGE_PX, device=ranks.device)
            micro_batches = [(images, torch.arange(MICRO_BATCH, device=ranks.device))] * grad_accum
            for _ in range(warmup_steps):
                engine.train_step(micro_batches, 1e-4)
            with record_communication() as record:
                engine.train_step(micro_batches, 1e-4)
            rows.append(
                CommunicationRow(stage, grad_accum, precision, ranks.world_size, depth, parameters, record.by_kind)
            )
    return rows


def _engine(ranks: Ranks, precision: Precision, stage: int, grad_accum: int, depth: int) -> tuple[TrainEngine, int]:
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
    parameters = sum(p.numel() for p in model.parameters())
    engine = create_engine(
        model,
        torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4),
        classification_loss("softmax"),
        EngineSection.model_validate({"zero_stage": stage, "precision": precision, "bucket_elements": BUCKET_ELEMENTS}),
        split=BatchSplit(MICRO_BATCH * grad_accum * ranks.world_size, MICRO_BATCH, grad_accum, ranks.world_size),
        clip_norm=1.0,
        device=ranks.device,
        rank=ranks.rank,
    )
    return engine, parameters
