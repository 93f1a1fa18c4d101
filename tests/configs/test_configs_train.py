"""Every recipe, at micro size: it trains three steps on real images, with its own optimizer, loss and augmentation."""

import io
import json
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from builder_command import succeeded, vitscale_data
from distributed_runner import run_distributed_test
from micro_run import REPOSITORY
from PIL import Image
from sklearn.datasets import load_digits

from vitscale.checkpoint import export_model
from vitscale.config import load_config
from vitscale.errors import ExitStatus
from vitscale.ranks import groups as process_group
from vitscale.train.run import run_training

CONFIGS = REPOSITORY / "configs"
RECIPES = sorted(path for folder in ("in21k", "finetune") for path in (CONFIGS / folder).glob("*.yaml"))
# Classes that WordNet knows, with one above another: dog and two of its kinds.
WNIDS = ("n02084071", "n02085620", "n02085782")
MICRO = [
    "model.embed_dim=32", "model.depth=2", "model.num_heads=2", "model.mlp_ratio=2", "model.patch_size=4",
    "model.num_classes=3", "model.img_size=16", "batch.global_batch=8", "batch.micro_batch=4", "engine.precision=fp32",
    "engine.compile=false", "data.workers=0", "data.lanes=4", "data.block=1", "data.label_space=null",
    "schedule.length=3", "schedule.warmup=1", "eval.micro_batch=8", "log.every_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def dogs(tmp_path_factory) -> Path:
    """Handwritten zeros, ones and twos under the names of dogs."""
    source, out = tmp_path_factory.mktemp("dog-tars"), tmp_path_factory.mktemp("dogs") / "dataset"
    digits = load_digits()
    for digit, wnid in enumerate(WNIDS):
        with tarfile.open(source / f"{wnid}.tar", "w") as tar:
            for row in np.flatnonzero(digits.target == digit)[:12]:
                content = io.BytesIO()
                image = Image.fromarray((digits.images[row] * (255 / 16)).astype(np.uint8)).resize((32, 32))
                image.convert("RGB").save(content, "JPEG")
                member = tarfile.TarInfo(f"{wnid}_{row}.JPEG")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)
    succeeded(vitscale_data("build", "--source", "class-tars", source, "--out", out, "--val-fraction", 0.2))
    return out


def micro(path: Path, data: Path, run_dir: Path) -> list[str]:
    """Overrides that make a recipe small and leave what it is: optimizer, loss, augmentation, schedule, phases."""
    config = load_config(path)
    overrides = [*MICRO, f"run.dir={run_dir}", *(f"data.{s}={{path: {data}, split: {s}}}" for s in ("train", "val"))]
    if config.model.representation_size or "in21k" in config.model.name:
        overrides.append("model.representation_size=16")
    if config.schedule.cooldown.amount:
        overrides.append("schedule.cooldown=1")
    if config.schedule.phases:
        overrides.append("schedule.phases=[{until: 2, img_size: 12, micro_batch: 2}]")
    return overrides


def _train_all(rank, world_size, recipes):
    # DeepSpeed holds on to the first process group that it sees, so all runs of this process share one.
    ranks = process_group.start()
    with mock.patch.multiple(process_group, start=lambda: ranks, stop=lambda: None):
        return [int(run_training(load_config(path, overrides))) for path, overrides in recipes]


def test_every_recipe_trains_three_steps(dogs, tmp_path):
    pretraining = [(path, micro(path, dogs, tmp_path / path.stem)) for path in RECIPES if path.parent.name == "in21k"]
    assert len(pretraining) >= 10
    done = run_distributed_test(_train_all, 1, pretraining, init=False, timeout_s=280)
    assert done == [[ExitStatus.FINISHED] * len(pretraining)]

    # Fine-tuning starts from what the last of them exports; the paper's own has the representation layer to drop.
    export_model(tmp_path / "vit_huge_patch14", tmp_path / "model")
    tuning = [
        (path, [*micro(path, dogs, tmp_path / path.stem), f"init.path={tmp_path / 'model'}"])
        for path in RECIPES
        if path.parent.name == "finetune"
    ]
    done = run_distributed_test(_train_all, 1, tuning, init=False, timeout_s=280)
    assert done == [[ExitStatus.FINISHED] * len(tuning)]
    for path, _ in [*pretraining, *tuning]:
        lines = (tmp_path / path.stem / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["train/loss"] for line in lines if "train/loss" in json.loads(line)]
        assert len(losses) == 3
        assert np.isfinite(losses).all(), path.name
