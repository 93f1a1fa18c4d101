"""A small real dataset, and a run that trains on it in seconds."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

REPOSITORY = Path(__file__).resolve().parents[1]
DIGITS = {f"n{10_000_000 + digit:08d}": digit for digit in range(3)}
A_CLASS = 40


def write_class_tars(folder: Path) -> None:
    """The handwritten zeros, ones and twos that scikit-learn ships, as one tar of 32x32 JPEGs a class."""
    digits = load_digits()
    for wnid, digit in DIGITS.items():
        with tarfile.open(folder / f"{wnid}.tar", "w") as tar:
            for row in np.flatnonzero(digits.target == digit)[:A_CLASS]:
                image = Image.fromarray((digits.images[row] * (255 / 16)).astype(np.uint8)).resize((32, 32))
                content = io.BytesIO()
                image.convert("RGB").save(content, "JPEG", quality=95)
                member = tarfile.TarInfo(f"{wnid}_{row}.JPEG")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)


def micro_tree(dataset: Path, run_dir: Path) -> dict:
    """The micro config as plain values: 12 steps of 8 images, saved every 5, everything recorded but pictures."""
    return {
        "run": {"dir": str(run_dir)},
        "model": {
            "name": "vit_tiny_patch16_224", "num_classes": 3, "img_size": 16, "patch_size": 8, "embed_dim": 32,
            "depth": 2, "num_heads": 2, "representation_size": 16, "drop_rate": 0.1, "drop_path_rate": 0.1,
        },
        "data": {
            "train": {"path": str(dataset), "split": "train"}, "val": {"path": str(dataset), "split": "val"},
            "lanes": 4, "block": 4, "workers": 0,
        },
        "batch": {"global_batch": 8, "micro_batch": 2},
        "optim": {"peak_lr": 3e-3},
        "schedule": {"length": 12, "warmup": 2},
        "engine": {"zero_stage": 2, "precision": "fp32", "activation_checkpointing": "full"},
        "checkpoint": {"every_steps": 5},
        "eval": {"micro_batch": 7},
        "log": {"every_steps": 1, "samples": True, "pictures": 0},
    }  # fmt: skip


def losses(run_dir: Path) -> dict[int, float]:
    """The training loss of each step so far, in the order of the file; of a run that goes on too.

    A start purges what it does again before it writes, and replaces the file at once: so a step never has two values.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        return {}
    whole_lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
    records = [record for record in map(json.loads, whole_lines) if "train/loss" in record]
    found = {record["step"]: record["train/loss"] for record in records}
    assert len(found) == len(records), "a step has two values"
    return found
