"""Mixed labels, a teacher and a padded head, under every engine, against one process without padding."""

import pytest
import torch
from distributed_runner import run_distributed_test
from engine_cases import CLASSES, GLOBAL_BATCH, IMAGE_PX, MICRO_BATCH

from vitscale.config import BatchSplit, EngineSection
from vitscale.config.loss import DistillSection
from vitscale.engine import create_engine
from vitscale.losses import Targets, classification_loss
from vitscale.model import create_model
from vitscale.optim import parameter_groups

CASES = [("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("torch", 0)]


def build(kind, stage, rank, world_size, head_multiple):
    torch.manual_seed(0)
    small = {"img_size": IMAGE_PX, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = create_model(
        "vit_tiny_patch16_224",
        num_classes=CLASSES,
        **small,
        distilled=True,
        weight_init="trunc_normal",
        head_multiple=head_multiple,
    )
    engine = create_engine(
        model,
        torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95)),
        classification_loss("softmax", 0.1, distill=DistillSection(teacher="t", kind="soft", tau=2.0, alpha=0.3)),
        EngineSection(kind=kind, zero_stage=stage, precision="fp32", bucket_elements=1000),
        split=BatchSplit(GLOBAL_BATCH, MICRO_BATCH, GLOBAL_BATCH // (MICRO_BATCH * world_size), world_size),
        clip_norm=0.5,
        device=torch.device("cpu"),
        rank=rank,
    )
    return engine, sum(fragment.numel for fragment in engine.fragments() if fragment.saved_here)


def micro_batches(step, rank, world_size):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, IMAGE_PX, IMAGE_PX, generator=generator)
    labels = torch.randint(CLASSES, (GLOBAL_BATCH,), generator=generator)
    teacher_logits = torch.randn(GLOBAL_BATCH, CLASSES, generator=generator)
    targets = Targets(labels, labels.roll(1), torch.rand(GLOBAL_BATCH, generator=generator), teacher_logits)
    for rows in torch.arange(GLOBAL_BATCH)[rank::world_size].split(MICRO_BATCH):
        yield images[rows], targets.rows(rows)


def curve(kind, stage, rank, world_size, head_multiple=64):
    engine, saved = build(kind, stage, rank, world_size, head_multiple)
    results = [engine.train_step(micro_batches(step, rank, world_size), 5e-3) for step in range(5)]
    logits = engine.predict(next(micro_batches(0, 0, 1))[0])
    return [float(result.loss) for result in results], [float(result.grad_norm) for result in results], saved, logits


def all_curves(rank, world_size):
    return [curve(kind, stage, rank, world_size) for kind, stage in CASES]


def test_mixed_labels_a_teacher_and_a_padded_head_under_every_engine():
    losses, norms, saved, logits = curve("torch", 0, 0, 1, head_multiple=1)
    ranks = run_distributed_test(all_curves, 2)
    for case, (first, second) in zip(CASES, zip(*ranks, strict=True), strict=True):
        assert [(a + b) / 2 for a, b in zip(first[0], second[0], strict=True)] == pytest.approx(losses, rel=1e-5), case
        assert first[1] == pytest.approx(norms, rel=1e-4), case
        assert first[2] + second[2] == saved, "the padding is no state"
        torch.testing.assert_close(first[3], logits, rtol=0, atol=1e-4)
