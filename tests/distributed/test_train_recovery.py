"""Runs whose course is not straight: phases, skipped updates, roll-backs, branches, averages and teachers."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from distributed_runner import run_distributed_test

from vitscale.checkpoint import CheckpointStore, export_model, stored_weights
from vitscale.config import load_config
from vitscale.engine import AVERAGE, MASTER
from vitscale.errors import DivergenceError, ExitStatus
from vitscale.train import build
from vitscale.train.course import Detour, read_detours
from vitscale.train.feed import Feed
from vitscale.train.ledger import read_ledger
from vitscale.train.loop import Trainer
from vitscale.train.run import run_training

IMAGES_A_STEP = 8


def records(run_dir: Path, tag: str = "train/loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[tag]) for line in lines if tag in line]
    assert len(found) == len(dict(found)), "a step has two values"
    return dict(found)


def run(world_size, path, *overrides, poisoned=(), cut_at=None):
    return run_distributed_test(_run, world_size, path, list(overrides), poisoned, cut_at, init=False)


def _run(rank, world_size, path, overrides, poisoned, cut_at):
    """Train. The images of a poisoned step (counted by data, from 0) are no numbers the first time they are met; at
    step `cut_at` the run is asked to stop."""
    on_device, train_step, left = Feed._on_device, Trainer.train_step, set()

    def poison(feed, batch):
        images, targets = on_device(feed, batch)
        key = int(batch.positions[0])
        if key // IMAGES_A_STEP in poisoned and key not in left:
            left.add(key)
            images = images * math.nan
        return images, targets

    def stop_in_time(trainer):
        train_step(trainer)
        if trainer.progress.step == cut_at:
            trainer.stop.reason = "asked to"

    Feed._on_device, Trainer.train_step = poison, stop_in_time
    try:
        return int(run_training(load_config(path, overrides)))
    except DivergenceError as error:
        return str(error)


FINISHED, AGAIN = int(ExitStatus.FINISHED), int(ExitStatus.RUN_AGAIN)


@pytest.mark.fault(31)
def test_a_poisoned_step_is_skipped_and_the_run_goes_on(micro_config, tmp_path):
    run_dir = tmp_path / "run"
    assert run(1, micro_config, poisoned=(3, 11)) == [FINISHED]
    assert records(run_dir, "train/skipped_steps")[12] == 2
    losses = records(run_dir)
    assert [step for step, loss in losses.items() if loss is None] == [4, 12]
    tag, manifest, _ = CheckpointStore(run_dir).newest_valid()
    assert (tag, manifest.step, manifest.optimizer_steps) == ("step-00000012", 12, 10)
    assert all(torch.isfinite(w).all() for w in stored_weights(run_dir / "checkpoints" / tag, manifest).values())


@pytest.mark.fault(31)
def test_a_run_that_diverges_goes_back_and_takes_other_data_first(micro_config, tmp_path):
    fixed = ["schedule.length=24", "guard={patience_steps: 2, roll_backs: 1}", "model.drop_path_rate=0"]
    straight, bent = tmp_path / "straight", tmp_path / "bent"
    assert run(2, micro_config, *fixed, f"run.dir={straight}") == [FINISHED] * 2
    # Steps 7 and 8 are skipped: back to step 5, steps 5 to 8 change places with 9 to 12.
    assert run(2, micro_config, *fixed, f"run.dir={bent}", poisoned=(7, 8)) == [FINISHED] * 2
    assert read_detours(bent) == (Detour(5, 4),)
    own, other = read_ledger(straight), read_ledger(bent)
    assert [other[step] for step in range(6, 14)] == [own[step] for step in (*range(10, 14), *range(6, 10))]
    assert Counter(key for keys in other.values() for key in keys) == Counter(
        dict.fromkeys({key for keys in own.values() for key in keys}, 2)
    )
    assert None not in records(bent).values(), "the skipped steps were done again"
    report = json.loads((bent / "divergence-00000009.json").read_text())
    assert report["why"] == "2 updates in a row were skipped, the last one's gradient is not finite"
    assert [step["skipped"] for step in report["last_steps"]] == [False] * 7 + [True] * 2


@pytest.mark.slow
def test_a_run_that_went_back_takes_the_same_way_after_a_restart(micro_config, tmp_path):
    fixed = ["schedule.length=24", "guard={patience_steps: 2, roll_backs: 1}", "model.drop_path_rate=0"]
    bent, cut = tmp_path / "bent", tmp_path / "cut"
    assert run(2, micro_config, *fixed, f"run.dir={bent}", poisoned=(7, 8)) == [FINISHED] * 2
    # A stop right after the roll-back, before any checkpoint knows of it, and one later.
    assert run(2, micro_config, *fixed, f"run.dir={cut}", poisoned=(7, 8), cut_at=9) == [AGAIN] * 2
    assert run(2, micro_config, *fixed, f"run.dir={cut}", cut_at=11) == [AGAIN] * 2
    assert run(2, micro_config, *fixed, f"run.dir={cut}") == [FINISHED] * 2
    assert records(cut) == records(bent)
    assert read_ledger(cut) == read_ledger(bent)


def test_phases_of_other_batch_and_input_size_resume_bitwise_and_lose_no_sample(micro_config, tmp_path):
    # 96 images: 6 steps of 4 small ones, 9 of 8 at the model's own size.
    phases = "schedule.phases=[{until: 6, img_size: 8, global_batch: 4, micro_batch: 2}]"
    fixed = [phases, "schedule.length=1 epoch", "batch.micro_batch=4", "engine.zero_stage=3", "engine.precision=fp32"]
    fixed += ["eval.every_steps=4", "average={decay: 0.9}", "optim.peak_lr=1e-3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(2, micro_config, *fixed[:1], *fixed[1:], f"run.dir={whole}") == [FINISHED] * 2
    assert [len(keys) for keys in read_ledger(whole).values()] == [4] * 6 + [8] * 9
    assert max(Counter(key for keys in read_ledger(whole).values() for key in keys).values()) == 1
    assert len(records(whole, "val/top1")) == len(records(whole, "val/average_top1")) == 4
    assert records(whole, "train/images_seen")[15] == 96
    assert run(2, micro_config, *fixed, f"run.dir={cut}", cut_at=4) == [AGAIN] * 2
    assert run(2, micro_config, *fixed, f"run.dir={cut}") == [FINISHED] * 2
    assert records(cut) == records(whole)
    assert records(cut, "val/average_loss") == records(whole, "val/average_loss")
    assert read_ledger(cut) == read_ledger(whole)

    tag, manifest, _ = CheckpointStore(whole).newest_valid()
    weights, average = (stored_weights(whole / "checkpoints" / tag, manifest, value) for value in (MASTER, AVERAGE))
    assert not torch.equal(weights["head.weight"], average["head.weight"])
    assert export_model(whole, tmp_path / "out", weights="ema").origin["weights"] == "ema"


def test_a_cool_down_branches_off_a_checkpoint_of_another_run(micro_config, tmp_path):
    rsqrt = ["schedule={kind: rsqrt, timescale: 4, warmup: 2, length: 12}", "checkpoint.keep_last=5"]
    assert run(1, micro_config, *rsqrt, f"run.dir={tmp_path / 'trunk'}") == [FINISHED]
    tag = tmp_path / "trunk" / "checkpoints" / "step-00000005"
    branch = [
        *rsqrt,
        "schedule.length=9",
        "schedule.cooldown=4",
        f"run.branch_from={tag}",
        f"run.dir={tmp_path / 'branch'}",
    ]
    assert run(1, micro_config, *branch, cut_at=7) == [AGAIN]
    assert run(1, micro_config, *branch) == [FINISHED], "its own checkpoint comes first"
    trunk, cooled = (records(tmp_path / name, "train/lr") for name in ("trunk", "branch"))
    assert list(cooled) == [6, 7, 8, 9]
    assert [cooled[step] / trunk[step] for step in cooled] == pytest.approx([1, 0.75, 0.5, 0.25])
    # The first step of the branch sees the weights and the data that the trunk's sixth saw.
    assert records(tmp_path / "branch")[6] == records(tmp_path / "trunk")[6]
    keys = [read_ledger(tmp_path / name)[8] for name in ("trunk", "branch")]
    assert keys[0] == keys[1]


def test_a_student_learns_from_a_teacher(micro_config, tmp_path):
    assert run(1, micro_config, f"run.dir={tmp_path / 'teacher'}", "model.drop_rate=0") == [FINISHED]
    export_model(tmp_path / "teacher", tmp_path / "model")
    distill = [
        f"loss.distill={{teacher: {tmp_path / 'model'}, kind: soft, tau: 2, alpha: 1}}",
        "model.drop_path_rate=0",
    ]
    student = ["model.representation_size=0", "model.drop_rate=0", "optim.peak_lr=1e-2", "schedule.length=40"]
    assert run(1, micro_config, *distill, *student, f"run.dir={tmp_path / 'student'}") == [FINISHED]
    losses = list(records(tmp_path / "student").values())
    assert sum(losses[-10:]) < sum(losses[:10])
    tuned = [
        *distill,
        "model.num_classes=3",
        f"init.path={tmp_path / 'model'}",
        f"run.dir={tmp_path / 'tuned'}",
    ]
    assert run(1, micro_config, *tuned, cut_at=7) == [AGAIN]
    assert run_distributed_test(_go_on, 1, micro_config, tuned, init=False) == [FINISHED]


def _go_on(rank, world_size, path, overrides):
    """Train, where the weights of `init.path` cannot be loaded: a checkpoint has its own."""
    build.load_initial_weights = None
    return int(run_training(load_config(path, overrides)))
