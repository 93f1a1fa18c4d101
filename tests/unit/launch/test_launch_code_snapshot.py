"""launch/code_snapshot.py: what is copied, when a copy serves again, and what is on record of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import code_snapshot
import numpy as np
import pytest
from code_snapshot import code_sources, environment, record_environment, snapshot_path, take_snapshot

import data_tools
import vitscale


@pytest.fixture
def sources(tmp_path) -> dict[str, Path]:
    (tmp_path / "source" / "inner").mkdir(parents=True)
    (tmp_path / "source" / "a.py").write_text("a")
    (tmp_path / "source" / "inner" / "b.txt").write_text("b")
    return {"package": tmp_path / "source"}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "slurm").mkdir()
    return tmp_path / "slurm"


def test_the_sources_are_those_that_python_runs():
    sources = code_sources()
    assert sources["vitscale"] == Path(vitscale.__file__).parent
    assert sources["data_tools"] == Path(data_tools.__file__).parent
    assert (sources["launch"] / "submit.py").exists()
    assert (sources["configs"] / "cluster").is_dir()


def test_equal_files_are_copied_once_and_changed_ones_again(sources, folder):
    first = take_snapshot(folder, sources)
    assert (first / "package" / "inner" / "b.txt").read_text() == "b"
    (sources["package"] / "__pycache__").mkdir()
    (sources["package"] / "__pycache__" / "a.pyc").touch()
    assert take_snapshot(folder, sources) == snapshot_path(folder, sources) == first
    (sources["package"] / "a.py").write_text("c")
    second = take_snapshot(folder, sources)
    assert (first / "package" / "a.py").read_text() == "a"
    assert (second / "package" / "a.py").read_text() == "c"
    assert sorted(folder.iterdir()) == sorted([first, second])


@pytest.mark.parametrize("change", ["rename", "move a byte", "add"])
def test_no_two_states_share_a_copy(sources, folder, change):
    before, source = snapshot_path(folder, sources), sources["package"]
    if change == "rename":
        (source / "a.py").rename(source / "c.py")
    elif change == "move a byte":
        (source / "a.py").write_text("")
        (source / "inner" / "b.txt").write_text("ab")
    else:
        (source / "c.py").touch()
    assert snapshot_path(folder, sources) != before


def test_a_file_that_is_saved_meanwhile_gives_the_copy_its_name(sources, folder, monkeypatch):
    def save_and_copy(source, destination):
        monkeypatch.undo()
        (source / "a.py").write_text("saved meanwhile")
        shutil.copytree(source, destination)

    monkeypatch.setattr(shutil, "copytree", save_and_copy)
    taken = take_snapshot(folder, sources)
    assert (taken / "package" / "a.py").read_text() == "saved meanwhile"
    assert taken == snapshot_path(folder, sources)


def test_a_submission_that_was_faster_is_no_hindrance(sources, folder, monkeypatch):
    def copy_twice(source, destination):
        monkeypatch.undo()
        shutil.copytree(source, snapshot_path(folder, sources) / "package")
        shutil.copytree(source, destination)

    monkeypatch.setattr(shutil, "copytree", copy_twice)
    assert list(folder.iterdir()) == []
    assert take_snapshot(folder, sources) == snapshot_path(folder, sources)
    assert list(folder.iterdir()) == [snapshot_path(folder, sources)]


def test_a_folder_that_cannot_be_written(sources, folder, monkeypatch):
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError):
        take_snapshot(folder, sources)


def test_the_record_tells_where_a_job_came_from(tmp_path, monkeypatch):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(code_snapshot, "LAUNCH", tmp_path)
    record_environment(tmp_path / "environment.json", environment())
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["git"] == {"commit": commit, "dirty": False}
    assert record["command"] == sys.argv
    assert record["packages"]["numpy"] == np.__version__
    (tmp_path / "file").write_text("2")
    assert environment()["git"] == {"commit": commit, "dirty": True}


def test_without_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(code_snapshot, "LAUNCH", tmp_path)
    assert environment()["git"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["git"] is None
