"""What a node finds out about itself, on a real dataset and real disks."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from free_port import free_port
from hypothesis import given
from hypothesis import strategies as st

from vitscale.config import CheckpointSection, load_config
from vitscale.errors import ExitStatus, LaunchError, ShardError
from vitscale.train.preflight import disks, node
from vitscale.train.preflight.reports import Finding, Standing

ALL_CHECKS = ["devices", "config", "run directory", "clock", "shards", "space", "shared memory"]


@pytest.fixture
def inspect(micro_config):
    """Inspect this machine as a node of the micro run with some overrides; findings by check."""

    def inspected(*overrides, ranks_here=2):
        report = node.inspect_node(load_config(micro_config, overrides), "n1", ranks_here, check_files=True)
        assert report.node == "n1"
        return {finding.check: finding for finding in report.findings}

    return inspected


@pytest.fixture
def own_dataset(tmp_path, digits_dataset) -> Path:
    return Path(shutil.copytree(digits_dataset, tmp_path / "dataset"))


def test_a_sound_node_passes_every_check_and_leaves_nothing_behind(inspect, tmp_path):
    found = inspect()
    assert list(found) == ALL_CHECKS
    assert {finding.standing for finding in found.values()} == {Standing.SOUND}
    assert found["config"].said == "12 steps of vit_tiny_patch16_224"
    assert found["shards"].said.endswith("shards answer")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_missing_dataset_is_a_fault_and_what_hangs_on_it_is_not_looked_at(inspect):
    found = inspect("data.train.path=nowhere")
    assert list(found) == ["devices", "data", "run directory", "clock"]
    assert found["data"].standing == Standing.MEND
    assert found["data"].said.startswith("nowhere/dataset.json: not found: give the folder")


def test_settings_that_cannot_run_are_told_as_training_tells_them(inspect):
    found = inspect("model.num_classes=5")["config"]
    assert found.standing == Standing.MEND
    assert "set model.num_classes=3" in found.said


def test_a_shard_that_is_not_what_the_dataset_says_is_a_fault_on_every_node(micro_config, own_dataset):
    shard = max(own_dataset.glob("train-*.tar"))
    os.truncate(shard, shard.stat().st_size - 512)
    config = load_config(micro_config, [f"data.train.path={own_dataset}"])
    # Only one node looks at every shard; the others see it by the first and the last.
    report = node.inspect_node(config, "n2", 2, check_files=False)
    said = {finding.check: finding for finding in report.faults}
    assert list(said) == ["data"]
    assert f"{shard}: has {shard.stat().st_size} bytes, dataset.json says" in said["data"].said


def test_a_server_of_shards_that_does_not_answer_may_do_so_later(inspect, own_dataset):
    file = own_dataset / "dataset.json"
    url = f"http://127.0.0.1:{free_port()}/shards"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shards_at": url}))
    found = inspect(f"data.train.path={own_dataset}", "data.remote.patience_s=0.1")["data"]
    assert found.standing == Standing.AGAIN
    assert found.said.startswith(f"{url}/train-")


def test_a_stream_is_asked_for_its_first_and_last_shard(inspect, own_dataset):
    stream = {"shards": f"{own_dataset}/train-{{000000..000009}}.tar", "num_classes": 3, "samples": 96}
    words = ["data.train=null", "data.val=null", f"data.stream={json.dumps(stream)}", "log.samples=false"]
    found = inspect(*words)["data"]
    assert found.standing == Standing.MEND
    assert "train-000009.tar: cannot be read" in found.said


def test_a_run_directory_that_cannot_be_written_is_a_fault(inspect, tmp_path):
    (tmp_path / "file").touch()
    found = inspect(f"run.dir={tmp_path / 'file' / 'run'}")
    for check in ("run directory", "clock", "space"):
        assert found[check].standing == Standing.MEND
        assert "Not a directory" in found[check].said


def test_full_disks_are_faults_that_say_what_is_missing(inspect, monkeypatch):
    monkeypatch.setattr(disks, "free_bytes", lambda folder: 1000)
    found = inspect("data.workers=2")
    assert "room for 0 checkpoints of" in found["space"].said
    assert "the run needs 3 at a time: free" in found["space"].said
    assert "2 ranks need" in found["shared memory"].said
    assert {found["space"].standing, found["shared memory"].standing} == {Standing.MEND}


TAG = 10_000_000


@given(
    free=st.integers(0, 50),
    tags=st.integers(0, 30),
    last=st.integers(1, 5),
    best=st.booleans(),
    every=st.none() | st.integers(1, 100),
)
def test_room_for_checkpoints_is_counted_in_checkpoints(free, tags, last, best, every):
    keep = CheckpointSection(keep_last=last, keep_best="val/top1" if best else None, keep_every_steps=every)
    found = disks.checkpoint_space(Path("/run"), free * TAG + TAG // 2, tags, TAG, keep, total_steps=100)
    at_a_time = last + 1 + best
    room = free + min(tags, last + best)
    for_ever = max((100 // every if every else 0) - max(tags - last - best, 0), 0)
    expected = (
        Standing.MEND if room < at_a_time else Standing.WARNING if room < at_a_time + for_ever else Standing.SOUND
    )
    assert found.standing == expected


def test_checkpoints_that_go_again_have_their_place_and_others_have_none(micro_config, tmp_path, monkeypatch):
    for step in (3, 6, 9, 10, 12):
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    drawn = []
    node.blueprint(load_config(micro_config, ["checkpoint.keep_last=2"]), 2, False, drawn)
    for free, standing in ((0, Standing.MEND), (1 << 30, Standing.SOUND)):
        monkeypatch.setattr(disks, "free_bytes", lambda folder, free=free: free)
        assert node.space(drawn[0], tmp_path / "run").standing == standing
    monkeypatch.setattr(disks, "free_bytes", lambda folder: 0)
    assert "room for 2 checkpoints of" in node.space(drawn[0], tmp_path / "run").said


def test_shared_memory_holds_the_largest_batches_that_wait(micro_config, tmp_path):
    def needed(*overrides, ranks_here=2):
        drawn = []
        node.blueprint(load_config(micro_config, overrides), ranks_here, False, drawn)
        return disks.shared_memory_bytes(drawn[0], ranks_here)

    collectives = 2 * disks.COLLECTIVE_SHM_BYTES
    assert needed() == collectives  # no workers, nothing to hand over
    assert needed(ranks_here=1) == 0
    largest = 7 * 3 * 16 * 16  # validation has 7 images, training 2
    assert needed("data.workers=1", "data.prefetch_batches=3") == collectives + 2 * 5 * largest
    phase = "schedule.phases=[{until: 4, img_size: 32, micro_batch: 4}]"
    assert needed("data.workers=1", "data.prefetch_batches=3", phase) == collectives + 2 * 5 * (4 * 3 * 32 * 32)


@pytest.mark.parametrize("seconds", [0.0, 29.0, -29.0])
def test_a_clock_that_goes_right_is_sound(seconds):
    assert disks.clock_finding("n1", seconds).standing == Standing.SOUND


@pytest.mark.parametrize(("seconds", "said"), [(31.0, "31 s ahead of"), (-3600.0, "3600 s behind")])
def test_a_clock_that_is_off_is_a_warning(seconds, said):
    found = disks.clock_finding("n1", seconds)
    assert (found.standing, f"n1: its clock is {said} the file system's: set it by NTP") == (
        Standing.WARNING,
        found.said,
    )


def test_a_clock_is_compared_at_the_middle_of_a_slow_write(tmp_path, monkeypatch):
    times_s = iter([1000.0, 1080.0])
    monkeypatch.setattr(disks.time, "time", lambda: next(times_s))
    monkeypatch.setattr(disks, "_touch", lambda run_dir, what_for: 1039.0)
    assert disks.clock(tmp_path) == Finding("clock", Standing.SOUND, "+1.0 s")


def raising(error):
    def look():
        raise error

    return look


def unreachable():
    error = ShardError("s3://b/x.tar: no answer: try again")
    error.status = ExitStatus.TRANSIENT
    return error


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (ShardError("a: b: c"), Finding("data", Standing.MEND, "a: b: c")),
        (unreachable(), Finding("data", Standing.AGAIN, "s3://b/x.tar: no answer: try again")),
        (LaunchError("no GPU"), Finding("devices", Standing.MEND, "no GPU")),
        (
            OSError(28, "No space left on device", "/run/x"),
            Finding("it", Standing.MEND, "/run/x: No space left on device"),
        ),
        (RuntimeError("driver\nbroken"), Finding("it", Standing.MEND, "it: RuntimeError: driver broken")),
    ],
)
def test_an_error_is_a_finding(error, found):
    came = node.outcome("it", raising(error))
    assert (came.check, came.standing) == (found.check, found.standing)
    assert came.said.startswith(found.said)


def test_checks_are_made_at_once_and_those_that_hang_are_findings():
    release, both, began_s = threading.Event(), threading.Barrier(2), time.monotonic()

    def hang():
        release.wait()
        return Finding("it", Standing.SOUND, "")

    def meet():
        both.wait(10)
        return Finding("met", Standing.SOUND, "")

    found = node.ask({"a": meet, "it": hang, "b": meet, "also": hang}, limit_s=0.5)
    assert time.monotonic() - began_s < 5
    release.set()
    met = Finding("met", Standing.SOUND, "")
    late = [
        Finding(check, Standing.AGAIN, f"{check}: no answer within 0.5 s: does a file system hang there?")
        for check in ("it", "also")
    ]
    assert found == [met, late[0], met, late[1]]


def test_what_hangs_takes_the_time_of_what_comes_after_it(inspect, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(node, "CHECKS_LIMIT_S", 1.0)
    monkeypatch.setattr(disks, "run_directory", lambda run_dir: release.wait())
    found = inspect()
    release.set()
    assert found["run directory"].said.startswith("run directory: no answer within 1 s")
    assert "shards" not in found


def test_ranks_without_a_gpu_are_a_fault(monkeypatch):
    monkeypatch.setattr(node.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(node.torch.cuda, "device_count", lambda: 4)
    assert node.devices(4).said == "4 GPUs"
    assert "start at most 4 ranks a node" in node.outcome("devices", lambda: node.devices(8)).said


def test_the_digest_tells_code_from_other_code(tmp_path):
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "module.py"
    file.write_text("a = 1\n")
    first = node.code_digest(tmp_path)
    assert node.code_digest(tmp_path) == first
    file.write_text("a = 2\n")
    changed = node.code_digest(tmp_path)
    file.rename(tmp_path / "sub" / "other.py")
    assert len({first, changed, node.code_digest(tmp_path)}) == 3


def test_facts_are_of_what_runs_here():
    found = node.facts()
    assert found["torch"] == node.torch.__version__
    assert found["vitscale"].endswith(f"+{node.code_digest()}")
    assert {"python", "deepspeed", "numpy"} <= found.keys()


def test_a_card_that_does_not_answer_is_no_fact_and_no_end(monkeypatch):
    def broken(index):
        raise RuntimeError("CUDA error: unknown error")

    monkeypatch.setattr(node.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(node.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(node.torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(node.torch.cuda, "get_device_properties", broken)
    found = node.facts()
    assert (found["nccl"], "gpus" in found, "python" in found) == ("2.28.3", False, True)


def test_the_driver_s_version_is_read_from_the_kernel_s_file(tmp_path, monkeypatch):
    monkeypatch.setattr(node, "_DRIVER", tmp_path / "version")
    assert "driver" not in node.facts()
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: 12.2.0\n"
    )
    assert node.facts()["driver"] == "570.86.15"
