"""Stopping and going on: bitwise the same losses, the same samples, one value a step."""

import errno
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import yaml
from distributed_runner import run_distributed_test
from micro_run import losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitscale.checkpoint import CheckpointStore, Snapshot
from vitscale.config import load_config
from vitscale.errors import CheckpointError, DivergenceError, ExitStatus, RunDirectoryError
from vitscale.train.ledger import read_ledger
from vitscale.train.run import run_training

STOPPED_RANK = 1


def _train(rank, world_size, path, overrides, stop_at=None, number=signal.SIGTERM, allow_change=()):
    config = load_config(path, overrides)
    if stop_at is not None and rank == STOPPED_RANK % world_size:
        ledger = config.run.dir / "samples" / f"rank-{rank:05d}.jsonl"
        threading.Thread(target=_signal_self_at, args=(ledger, stop_at, number), daemon=True).start()
    return int(run_training(config, allow_change))


def _signal_self_at(ledger: Path, step: int, number: int) -> None:
    while not ledger.exists() or len(ledger.read_text().splitlines()) < step:
        time.sleep(0.001)
    os.kill(os.getpid(), number)


def run(world_size, path, *overrides, **options):
    return run_distributed_test(_run_with, world_size, path, list(overrides), options, init=False)


def _run_with(rank, world_size, path, overrides, options):
    return _train(rank, world_size, path, overrides, **options)


@pytest.mark.parametrize(
    ("world_size", "stage", "number"),
    [
        (2, 2, signal.SIGTERM),
        pytest.param(2, 3, signal.SIGINT, marks=pytest.mark.slow),  # the phases of test_train_recovery are at stage 3
        (1, 1, signal.SIGUSR2),
    ],
)
@pytest.mark.fault(16)
def test_a_stopped_run_goes_on_bitwise(micro_config, digits_dataset, tmp_path, world_size, stage, number):
    fixed = [f"engine.zero_stage={stage}", "schedule.length=40", "checkpoint.every_steps=100"]
    if stage == 1:  # all that data can be made of, beside the plain stream of the others
        sources = (
            f"{{path: {digits_dataset}, split: {split}, weight: {w}}}" for split, w in (("train", 3), ("val", 1))
        )
        fixed += [
            f"data.mix=[{', '.join(sources)}]",
            "data.train=null",
            "data.workers=2",
            "data.augment={rand_augment: {}, three_augment: true, jitter: {hue: 0.1}, erasing: {}, repeats: 2}",
            "data.augment.mix={mixup_alpha: 0.8, cutmix_alpha: 1.0}",
        ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(world_size, micro_config, *fixed, f"run.dir={whole}") == [ExitStatus.FINISHED] * world_size

    stopped = run(world_size, micro_config, *fixed, f"run.dir={cut}", stop_at=7, number=number)
    assert stopped == [ExitStatus.RUN_AGAIN] * world_size
    end = json.loads((cut / "exit.json").read_text())
    assert end["status"] == 75
    assert end["reason"] == f"received {signal.Signals(number).name}"
    assert 7 <= end["step"] < 40
    assert max(losses(cut)) == end["step"]

    assert run(world_size, micro_config, *fixed, f"run.dir={cut}") == [ExitStatus.FINISHED] * world_size
    assert losses(cut) == losses(whole)
    assert read_ledger(cut) == read_ledger(whole)
    assert len(losses(cut)) == 40
    assert json.loads((cut / "exit.json").read_text())["generation"] == 2
    if world_size == 1:
        assert run(1, micro_config, *fixed, f"run.dir={cut}") == [ExitStatus.FINISHED]
        assert losses(cut) == losses(whole), "a finished run does nothing when it is started again"


def test_what_lies_beyond_the_restored_step_is_purged(micro_config, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "run"
    run(1, micro_config, f"run.dir={whole}")
    run(1, micro_config, stop_at=8)
    # A power cut after step 8 instead: its save is gone, the newest is that of step 5.
    for tag in (cut / "checkpoints").glob("step-*"):
        if tag.name != "step-00000005":
            (tag / "manifest.json").unlink()
    run(1, micro_config)
    assert losses(cut) == losses(whole)
    assert read_ledger(cut) == read_ledger(whole)
    board = EventAccumulator(str(cut / "tensorboard")).Reload()
    steps = [event.step for event in board.Scalars("train/loss")]
    assert steps == list(range(1, 13))
    assert {"train/lr", "train/grad_norm", "perf/images_per_s", "perf/step_time_s", "val/top1"} <= set(
        board.Tags()["scalars"]
    )


def test_every_sample_is_seen_once_an_epoch_at_any_world_size(micro_config, tmp_path):
    by_world = {}
    for world_size in (1, 2):
        run_dir = tmp_path / f"world{world_size}"
        run(world_size, micro_config, f"run.dir={run_dir}", "schedule.length=24")
        by_world[world_size] = {step: sorted(keys) for step, keys in read_ledger(run_dir).items()}
    assert by_world[1] == by_world[2]
    seen = [key for step in sorted(by_world[1]) for key in by_world[1][step]]
    assert len(seen) == 192  # two epochs of 96
    assert len(set(seen[:96])) == 96
    assert sorted(seen[:96]) == sorted(seen[96:])


def test_a_run_whose_disk_is_lost_goes_on_from_its_mirror_at_another_world_size_and_stage(micro_config, tmp_path):
    quiet = ["model.drop_rate=0", "model.drop_path_rate=0"]  # their masks depend on the rank
    quiet.append(f"checkpoint.mirror=file://{tmp_path}/far")
    whole, cut = tmp_path / "whole", tmp_path / "run"
    run(2, micro_config, *quiet, f"run.dir={whole}")
    run(2, micro_config, *quiet, stop_at=6)
    lost = cut.rename(tmp_path / "lost")
    changed = "engine.zero_stage"
    run(1, micro_config, *quiet, f"{changed}=3", allow_change=[changed])
    assert losses(lost) | losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    assert min(losses(cut)) > 6
    merged = {step: sorted(keys) for step, keys in (read_ledger(lost) | read_ledger(cut)).items()}
    assert merged == {step: sorted(keys) for step, keys in read_ledger(whole).items()}
    ids = [(run_dir / "run_id").read_text().strip() for run_dir in (whole, cut)]
    assert ids[0] != ids[1]
    saved = [CheckpointStore(run_dir).manifests()[0].values() for run_dir in (whole, cut)]
    assert [{manifest.run_id for manifest in manifests} for manifests in saved] == [{run_id} for run_id in ids]


def _expect(rank, world_size, path, overrides, error):
    with pytest.raises(error) as caught:
        _train(rank, world_size, path, overrides)
    return str(caught.value), caught.value.told


def refused(world_size, path, error, *overrides):
    """The message of the error that every rank must raise, told by rank 0 alone."""
    outcomes = run_distributed_test(_expect, world_size, path, list(overrides), error, init=False)
    assert [told for _, told in outcomes] == [False] + [True] * (world_size - 1)
    assert len({text for text, _ in outcomes}) == 1
    assert "\n" not in outcomes[0][0]
    return outcomes[0][0]


@pytest.mark.fault(36)
def test_a_changed_config_is_refused_with_the_keys(micro_config):
    run(1, micro_config, "schedule.length=3")
    text = refused(2, micro_config, RunDirectoryError, "schedule.length=3", "optim.peak_lr=1e-4")
    assert "optim.peak_lr" in text
    assert "--allow-change optim.peak_lr" in text


def test_a_key_that_is_newer_than_the_run_has_its_default(micro_config, tmp_path):
    run(1, micro_config, "schedule.length=3")
    recorded = tmp_path / "run" / "config.yaml"
    tree = yaml.safe_load(recorded.read_text())
    del tree["init"]["pos_embed"], tree["model"]["weight_init"]
    recorded.write_text(yaml.safe_dump(tree))
    assert run(1, micro_config, "schedule.length=3") == [ExitStatus.FINISHED]


@pytest.mark.fault(10)
def test_no_valid_checkpoint_is_no_reason_to_start_over(micro_config, tmp_path):
    run(1, micro_config, "schedule.length=3")
    for tag in (tmp_path / "run" / "checkpoints").glob("step-*"):
        os.truncate(tag / "rank-00000.safetensors", 100)
    text = refused(2, micro_config, CheckpointError, "schedule.length=3")
    assert "none of 1 checkpoints is valid" in text
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["status"] == 2


@pytest.mark.fault(31)
def test_a_diverged_run_stops_before_it_saves(micro_config, tmp_path):
    text = refused(2, micro_config, DivergenceError, "optim.peak_lr=1e30", "optim.clip_norm=null")
    report = tmp_path / "run" / "divergence-00000006.json"
    assert text == (
        "step 6: 5 updates in a row were skipped, the last one's gradient is not finite: the newest checkpoint is step "
        f"0, what came before stands in {report}; lower optim.peak_lr or optim.clip_norm before going on, or allow "
        "guard.roll_backs"
    )
    assert [step["skipped"] for step in json.loads(report.read_text())["last_steps"]] == [False] + [True] * 5
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    end = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert end["status"] == 3
    assert end["step"] > 0


@pytest.mark.fault(6)
def test_a_disk_that_fails_ends_the_run_with_the_old_tags_intact(micro_config, tmp_path):
    run(1, micro_config, "schedule.length=5")
    # A full disk is for the user to mend; a server that has thrown this client out is worth another try.
    for number, status in ((errno.ENOSPC, ExitStatus.USER_ERROR), (errno.ESTALE, ExitStatus.TRANSIENT)):
        outcomes = run_distributed_test(_fail_to_write, 2, micro_config, number, init=False)
        where = f"rank-00001.safetensors of step 10 cannot be written on {socket.gethostname()}"
        mend = "mend that and run the same command again, older checkpoints are intact"
        assert all(text.endswith(f"{where}: {os.strerror(number)}: {mend}") for text in outcomes)
        assert json.loads((tmp_path / "run" / "exit.json").read_text())["status"] == status
        assert [tag.name for tag in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000005"]


def _fail_to_write(rank, world_size, path, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    if rank == 1:
        Snapshot.write = fail  # a disk that really fails needs a mount of its own; the error is the same
    with pytest.raises(CheckpointError) as caught:
        _train(rank, world_size, path, [], allow_change=["schedule.length"])
    return str(caught.value)
