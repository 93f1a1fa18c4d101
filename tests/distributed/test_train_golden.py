"""Loss curves of the micro recipes, kept: a change of numbers has to be meant.

`PYTHONPATH=tests python tests/distributed/test_train_golden.py` writes them anew; say in the commit why they changed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from distributed_runner import run_distributed_test
from micro_run import REPOSITORY, write_class_tars

from vitscale.config import load_config
from vitscale.train.run import run_training

GOLDEN = REPOSITORY / "tests/golden/losses"
# Two orders of summation drift apart by 2e-6 in 50 steps of AdamW, and by 1e-3 in as many of Adafactor.
STEPS = {"augreg": 50, "scaling": 10}


def overrides(data: Path, run_dir: Path, steps: int) -> list[str]:
    return [
        f"run.dir={run_dir}", "model.num_classes=3", f"data.train={{path: {data}, split: train}}", "data.val=null",
        "data.lanes=4", "batch={global_batch: 32, micro_batch: 16}", "engine.precision=fp32", "log.every_steps=1",
        f"schedule.length={steps}", f"schedule.warmup={steps // 10}",
    ]  # fmt: skip


def _train(rank, world_size, recipe, data, run_dir, steps):
    extra = ["schedule.cooldown=2"] if recipe == "scaling" else []
    config = load_config(REPOSITORY / f"configs/micro/{recipe}.yaml", [*overrides(data, run_dir, steps), *extra])
    run_training(config)


def curve(recipe: str, data: Path, run_dir: Path) -> list[float]:
    run_distributed_test(_train, 1, recipe, data, run_dir, STEPS[recipe], init=False)
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize("recipe", STEPS)
def test_the_loss_curve_is_the_kept_one(recipe, digits_dataset, tmp_path):
    golden = json.loads((GOLDEN / f"{recipe}.json").read_text())
    losses = curve(recipe, digits_dataset, tmp_path / "run")
    assert len(losses) == STEPS[recipe]
    assert losses == pytest.approx(golden["losses"], rel=1e-5), f"kept with torch {golden['torch']}"


def write() -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "tars").mkdir()
        write_class_tars(folder / "tars")
        build = ["build", "--source", "class-tars", str(folder / "tars"), "--out", str(folder / "data")]
        command = [sys.executable, "-m", "data_tools", *build, "--val-fraction", "0.2"]
        subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True)
        GOLDEN.mkdir(exist_ok=True)
        for recipe in STEPS:
            found = {"torch": torch.__version__, "losses": curve(recipe, folder / "data", folder / recipe)}
            (GOLDEN / f"{recipe}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    write()
