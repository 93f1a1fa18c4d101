"""A batch that the ranks do not divide: padded, a run sees the same images and ends where one process does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from distributed_runner import run_distributed_test

from vitscale.checkpoint import CheckpointStore, stored_weights
from vitscale.config import load_config, split_batch
from vitscale.errors import ExitStatus
from vitscale.ranks import groups as process_group
from vitscale.ranks.groups import Ranks
from vitscale.telemetry import tags
from vitscale.train.build import draw_blueprint
from vitscale.train.ledger import read_ledger
from vitscale.train.loop import Trainer
from vitscale.train.run_directory import RunDirectory
from vitscale.train.stop import StopRequest
from vitscale.train.watchdog import Watchdog

ENGINES = {
    "torch": ["engine.kind=torch"],
    **{f"stage {stage}": [f"engine.zero_stage={stage}"] for stage in range(4)},
}
FIXED = [
    # Masks of dropout and drop path depend on the rank.
    "model.drop_rate=0", "model.drop_path_rate=0", "data.augment.mix={mixup_alpha: 0.8, cutmix_alpha: 1.0}",
    "batch={global_batch: 16, micro_batch: 4, pad: true}", "schedule.length=10", "optim.clip_norm=0.25",
    "loss.label_smoothing=0.1", "data.val=null", "engine.activation_checkpointing=none",
]  # fmt: skip


def train(config, ranks):
    """A whole run in a group that is up already."""
    stop = StopRequest()
    directory = RunDirectory.open(config, ranks)
    trainer = Trainer(
        draw_blueprint(config, ranks), ranks, stop, directory, Watchdog(config.watchdog, ranks, directory, stop)
    )
    status = trainer.run()
    directory.close(status, "finished", trainer.progress.step)
    return status


def _train_all(rank, world_size, path, runs):
    ranks = process_group.start()
    return [int(train(load_config(path, [*FIXED, *overrides]), ranks)) for overrides in runs]


def metrics(run_dir: Path, tag: str) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record[tag] for record in records if tag in record]


def final_weights(run_dir: Path) -> torch.Tensor:
    """All of them as one vector: by itself a key's bias, which has no gradient, is what Adam makes of rounding."""
    store = CheckpointStore(run_dir)
    tag, manifest, _ = store.newest_valid()
    assert manifest.step == 10
    assert manifest.cursor["position"] == 160
    weights = stored_weights(store.path(tag), manifest)
    return torch.cat([weights[name].flatten() for name in manifest.shapes])


def assert_same_run(found: Path, expected: Path, what: str) -> None:
    assert metrics(found, tags.TRAIN_LOSS) == pytest.approx(metrics(expected, tags.TRAIN_LOSS), rel=1e-5), what
    assert metrics(found, tags.TRAIN_GRAD_NORM) == pytest.approx(metrics(expected, tags.TRAIN_GRAD_NORM), rel=1e-4)
    assert metrics(found, tags.TRAIN_IMAGES_SEEN) == [16 * step for step in range(1, 11)], what
    weights, wanted = final_weights(found), final_weights(expected)
    assert (weights - wanted).norm() <= 1e-5 * wanted.norm(), what
    ledgers = [{step: sorted(keys) for step, keys in read_ledger(run).items()} for run in (found, expected)]
    assert ledgers[0] == ledgers[1], what


def test_a_padded_run_is_that_of_one_process_and_goes_on_with_a_rank_less(micro_config, tmp_path):
    alone, four, cut = tmp_path / "alone", tmp_path / "four", tmp_path / "run"
    overrides = [*FIXED, *ENGINES["torch"], f"run.dir={alone}"]
    config = load_config(micro_config, overrides)
    assert train(config, Ranks(0, 1, 0, 1, torch.device("cpu"))) is ExitStatus.FINISHED
    assert min(metrics(alone, tags.TRAIN_GRAD_NORM)) > 0.25, "the gradient has to be clipped"

    assert run_distributed_test(_train_all, 4, micro_config, [[]], init=False) == [[0]] * 4
    assert split_batch(config.batch, 4).padding == 0
    shutil.copytree(cut, four)
    for tag in (cut / "checkpoints").glob("step-*"):
        if tag.name != "step-00000005":
            shutil.rmtree(tag)

    padded = {name: tmp_path / name for name in ENGINES}
    runs = [[*ENGINES[name], f"run.dir={run_dir}"] for name, run_dir in padded.items()]
    assert run_distributed_test(_train_all, 3, micro_config, [*runs, []], init=False) == [[0] * 6] * 3
    assert split_batch(config.batch, 3).padding == 8
    for name, run_dir in padded.items():
        assert_same_run(run_dir, alone, name)
    assert_same_run(cut, four, "four ranks, then three")
    assert_same_run(four, alone, "four ranks")
