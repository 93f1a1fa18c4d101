"""Faults that come one by one, with what a run must do about each."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from chaos_driver import CLOCK_SET_BACK, send_to, started_ranks
from micro_run import micro_tree

from vitscale.checkpoint import CheckpointStore, locate
from vitscale.train.starts import parse_starts

LONG = 200
"""Steps of a run that is always stopped before its end."""


def write_config(folder: Path, dataset: Path, run_dir: Path, **sections) -> Path:
    tree = micro_tree(dataset, run_dir)
    tree["schedule"]["length"] = LONG
    tree["checkpoint"]["every_steps"] = 1000
    for name, changes in sections.items():
        tree[name] = tree.get(name, {}) | changes
    path = folder / "fault.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_until(
    config: Path, log: Path, step: int | None, number: int = 0, fault=(0, "", 0), world_size: int = 2
) -> list:
    """Start ranks and, when a step is done, send the last of them a signal; gives their exit statuses."""
    log.unlink(missing_ok=True)
    with started_ranks(world_size, ["train", str(config)], log, fault) as processes:
        deadline_s = time.monotonic() + 120
        while step is not None and f"step {step}/" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline_s, log.read_text()
            assert all(process.is_alive() for process in processes), log.read_text()
            time.sleep(0.02)
        if number:
            send_to(processes[-1:], number)
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]


def found_step(run_dir: Path) -> int:
    path = run_dir / "starts.json"
    return parse_starts(path.read_text(), path)[-1].found_step


def saved(run_dir: Path) -> list[int]:
    store = CheckpointStore(run_dir)
    return [locate(store.path(tag))[1].step for tag in store.tags()]


@pytest.mark.fault(18)
def test_killed_in_the_save_that_a_signal_asked_for(tmp_path, digits_dataset):
    config, log, run_dir = write_config(tmp_path, digits_dataset, tmp_path / "run"), tmp_path / "log", tmp_path / "run"
    assert run_until(config, log, 3, signal.SIGTERM) == [75, 75]
    [first] = saved(run_dir)
    # The grace ends while rank 1 is half through its file.
    statuses = run_until(config, log, first + 3, signal.SIGTERM, fault=(1, "half a file", 1))
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] not in (0, 75, None)
    assert saved(run_dir) == [first]
    assert run_until(config, log, first + 1, signal.SIGTERM) == [75, 75]
    assert found_step(run_dir) == first
    assert saved(run_dir)[-1] > first
    assert not CheckpointStore(run_dir).unfinished(), "what the cut-off save left is gone after the next commit"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB that can be made full."""
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.fault(6)
def test_a_full_disk_ends_the_run_with_one_line_and_it_goes_on_when_there_is_room(tmp_path, digits_dataset, small_disk):
    run_dir, log = small_disk / "run", tmp_path / "log"
    config = write_config(tmp_path, digits_dataset, run_dir)
    assert run_until(config, log, 3, signal.SIGTERM) == [75, 75]
    [first] = saved(run_dir)
    size_bytes = sum(file.stat().st_size for file in CheckpointStore(run_dir).path(f"step-{first:08d}").iterdir())
    space = os.statvfs(small_disk)
    ballast = small_disk / "ballast"
    # Room for what the run writes beside its checkpoints, and for half of one.
    ballast.write_bytes(bytes(space.f_bavail * space.f_frsize - size_bytes // 2 - (64 << 10)))
    assert run_until(config, log, first + 3, signal.SIGTERM) == [2, 2]
    text = log.read_text()
    assert text.count("No space left on device") == 1, text
    assert "older checkpoints are intact" in text
    assert "Traceback" not in text
    assert saved(run_dir) == [first]
    ballast.unlink()
    assert run_until(config, log, first + 1, signal.SIGTERM) == [75, 75]
    assert found_step(run_dir) == first
    assert saved(run_dir)[-1] > first


@pytest.mark.fault(35)
def test_a_clock_that_is_set_back_changes_nothing(tmp_path, digits_dataset):
    losses = []
    for number, phase in enumerate(("", CLOCK_SET_BACK)):
        run_dir, log = tmp_path / f"run-{number}", tmp_path / "log"
        config = write_config(tmp_path, digits_dataset, run_dir, schedule={"length": 12}, checkpoint={"every_steps": 5})
        assert run_until(config, log, None, fault=(0, phase, 0), world_size=1) == [0], log.read_text()
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["train/loss"] for record in records if "train/loss" in record])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12
