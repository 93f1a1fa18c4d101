"""Builds that are killed, or run out of disk, and are run again."""

import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import builder_crashes
import psutil
import pytest
from builder_command import content, pictures, refused, succeeded, vitscale_data, write_class_tars

from data_tools.workers import ordered_map
from vitscale.errors import ShardError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A source's options, and what an undisturbed build of it leaves."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_class_tars(folder / "source", pictures())
    options = ("--source", "class-tars", source, "--val-fraction", 0.2, "--shard-images", 30)
    succeeded(vitscale_data("build", "--out", folder / "out", *options))
    return options, folder / "out"


def test_killed_before_any_effect_on_the_disk_and_run_again_it_leaves_the_same_bytes(tmp_path):
    few = {wnid: dict(list(images.items())[:4]) for wnid, images in pictures().items()}
    source, expected = write_class_tars(tmp_path / "source", few), tmp_path / "expected"
    options = ("--source", "class-tars", source, "--val-fraction", 0.25)
    succeeded(vitscale_data("build", "--out", expected, *options))
    script = Path(builder_crashes.__file__)
    environment = {**os.environ, "PYTHONPATH": f"{script.parents[1]}:{script.parent}"}
    words = [sys.executable, script, tmp_path, expected]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 14


@pytest.mark.slow  # three processes that load torch
def test_killed_at_random_with_its_workers_at_work_it_leaves_the_same_bytes_and_no_process(whole, tmp_path):
    options, expected = whole
    out = tmp_path / "out"
    words = ["build", "--out", out, *options, "--workers", 2]
    succeeded(vitscale_data("plan", "--out", out, *options))
    process = subprocess.Popen([sys.executable, "-m", "data_tools", *map(str, words)], stderr=subprocess.DEVNULL)
    while not list(out.glob("*.tar*")):
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(random.Random().uniform(0, 0.02))
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
    succeeded(vitscale_data(*words[:-2]))
    assert content(out) == content(expected)


def test_a_shard_of_other_bytes_is_written_again(whole, tmp_path):
    options, expected = whole
    out = tmp_path / "out"
    words = ("build", "--out", out, *options)
    succeeded(vitscale_data(*words))
    shard = out / "train-000001.tar"

    def again(*more):
        (out / "dataset.json").unlink()
        return succeeded(vitscale_data(*words, *more)).stdout

    shard.write_bytes(shard.read_bytes()[:-512])
    assert "(1 written now)" in again()
    assert content(out) == content(expected)
    damaged = bytearray(shard.read_bytes())
    damaged[600] ^= 1
    shard.write_bytes(damaged)
    assert "(0 written now)" in again()
    assert "(1 written now)" in again("--recheck")
    assert content(out) == content(expected)
    (out / "val-000000.parquet").write_bytes(b"PAR1")
    assert "(1 written now)" in again()
    assert content(out) == content(expected)


def test_a_folder_whose_plan_was_removed_is_built_anew(whole, tmp_path):
    options, expected = whole
    out = tmp_path / "out"
    succeeded(vitscale_data("build", "--out", out, *options[:-1], 7))
    assert len(list(out.iterdir())) > len(list(expected.iterdir()))
    (out / "dataset.json").unlink()
    (out / "plan.json").unlink()
    succeeded(vitscale_data("build", "--out", out, *options))
    assert content(out) == content(expected)


def test_shards_of_another_plan_are_written_again(whole, tmp_path):
    options, expected = whole
    out = tmp_path / "out"
    succeeded(vitscale_data("build", "--out", out, *options, "--seed", 7))
    (out / "dataset.json").unlink()
    for name in ("plan.json", "plan.parquet"):
        (out / name).write_bytes((expected / name).read_bytes())
    assert "3 of 3 shards are not finished" in refused(vitscale_data("merge", out))
    succeeded(vitscale_data("build", "--out", out))
    assert content(out) == content(expected)


def test_a_fragment_damaged_inside_is_one_line(whole, tmp_path):
    options, _ = whole
    out = tmp_path / "out"
    succeeded(vitscale_data("build", "--out", out, *options))
    (out / "dataset.json").unlink()
    fragment = out / "val-000000.parquet"
    whole_bytes = bytearray(fragment.read_bytes())
    whole_bytes[4:400] = bytes(396)
    fragment.write_bytes(whole_bytes)
    assert "val-000000.parquet: damaged" in refused(vitscale_data("merge", out))


def test_a_file_that_may_not_grow_is_one_line_and_the_build_goes_on(whole, tmp_path):
    options, expected = whole
    out = tmp_path / "out"
    succeeded(vitscale_data("plan", "--out", out, *options))
    largest = max(path.stat().st_size for path in out.iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 10_000, before[1]))
    try:
        text = refused(vitscale_data("build", "--out", out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{out}: no room left" in text
    assert not list(out.glob("*.tmp"))
    succeeded(vitscale_data("build", "--out", out))
    assert content(out) == content(expected)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_is_full_is_one_line_and_the_build_goes_on(whole, tmp_path):
    options, expected = whole
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("may not mount")
    out = small / "out"
    try:
        assert "no room left (No space left on device)" in refused(vitscale_data("build", "--out", out, *options))
        subprocess.run(["mount", "-o", "remount,size=10m", str(small)], check=True)
        succeeded(vitscale_data("build", "--out", out, *options))
        assert content(out) == content(expected)
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(ShardError, match="a worker process was killed"):
        list(ordered_map(os._exit, [1], 2))
