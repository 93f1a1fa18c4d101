"""A micro model and its steps, run by every engine in the distributed tests."""

from collections.abc import Iterator
from pathlib import Path

import torch

from vitscale.checkpoint import Manifest, rank_file_name, read_fragments, write_fragments
from vitscale.config import AverageSection, BatchSplit, EngineSection, OptimSection
from vitscale.engine import MicroBatch, TrainEngine, create_engine
from vitscale.losses import classification_loss
from vitscale.model import VisionTransformer, create_model
from vitscale.optim import build_optimizer, learning_rate

GLOBAL_BATCH, MICRO_BATCH, CLASSES, IMAGE_PX = 24, 4, 7, 16
ADAMW = OptimSection(peak_lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))


def micro_model(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return create_model(
        "vit_tiny_patch16_224",
        num_classes=CLASSES,
        img_size=IMAGE_PX,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        representation_size=16,
    )


def build(
    kind: str,
    stage: int,
    rank: int,
    world_size: int,
    precision: str = "fp32",
    average: AverageSection | None = None,
    optim: OptimSection = ADAMW,
    micro_batch: int = MICRO_BATCH,
) -> TrainEngine:
    model = micro_model()
    split = BatchSplit(GLOBAL_BATCH, micro_batch, GLOBAL_BATCH // (micro_batch * world_size), world_size)
    return create_engine(
        model,
        build_optimizer(model, optim),
        classification_loss("softmax", 0.1),
        EngineSection(kind=kind, zero_stage=stage, precision=precision, bucket_elements=1000),
        split=split,
        clip_norm=0.5,
        device=torch.device("cpu"),
        rank=rank,
        average=average,
    )


def micro_batches(step: int, rank: int, world_size: int, micro_batch: int = MICRO_BATCH) -> Iterator[MicroBatch]:
    """A rank's share of the step's batch, which is the same whatever the number of ranks."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (GLOBAL_BATCH,), generator=generator)
    patterns = torch.randn(CLASSES, 3, IMAGE_PX, IMAGE_PX, generator=torch.Generator().manual_seed(99))
    images = patterns[labels] + torch.randn(GLOBAL_BATCH, 3, IMAGE_PX, IMAGE_PX, generator=generator)
    rows = torch.arange(GLOBAL_BATCH)[rank::world_size].split(micro_batch)
    yield from ((images[piece], labels[piece]) for piece in rows)


def train(
    engine: TrainEngine, steps: range, rank: int, world_size: int, micro_batch: int = MICRO_BATCH
) -> list[tuple[float, float]]:
    """This rank's loss and the global gradient norm of each step."""
    curve = []
    for step in steps:
        lr = learning_rate(step, kind="cosine", peak_lr=5e-3, total_steps=50, warmup_steps=2, final_lr=0.0)
        result = engine.train_step(micro_batches(step, rank, world_size, micro_batch), lr)
        curve.append((float(result.loss), float(result.grad_norm)))
    return curve


def save(engine: TrainEngine, directory: Path, rank: int) -> int:
    directory.mkdir(exist_ok=True)
    write_fragments(engine.fragments(), directory / rank_file_name(rank))
    return engine.optimizer_steps()


def load(engine: TrainEngine, directory: Path, saved_by: int, optimizer_steps: int) -> None:
    read_fragments(engine.fragments(), directory, manifest_of(saved_by, optimizer_steps))
    engine.state_loaded(optimizer_steps)


def manifest_of(world_size: int, optimizer_steps: int) -> Manifest:
    return Manifest(
        step=optimizer_steps, generation=1, world_size=world_size, optimizer_steps=optimizer_steps,
        cursor={"position": 0}, config={}, model={}, labels=[],
        shapes={name: list(p.shape) for name, p in micro_model().named_parameters()},
        metrics={}, versions={}, saved_at="", files=[],
    )  # fmt: skip
