"""The builder's benchmark measures what it says: the same samples from both sides."""

import json
import shutil

import pytest
import webdataset
from builder_command import refused, succeeded, vitscale_data

from data_tools import bench


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "DISTINCT", 1)
    monkeypatch.setattr(bench, "SHARD_IMAGES", 10)


def test_rates_of_all_contenders_are_told_and_the_folder_is_removed(small, tmp_path):
    tree = json.loads(succeeded(vitscale_data("bench", tmp_path / "b", "--images", 40, "--rounds", 1, "--json")).stdout)
    assert tree["image_bytes"] == pytest.approx(100_000, rel=0.05)
    assert list(tree["ratio"]) == [
        "webdataset.ShardWriter, 1 process",
        "builder, 1 process",
        "builder, 2 processes",
    ]
    assert tree["ratio"]["webdataset.ShardWriter, 1 process"] == 1
    assert all(rate > 0 for rate in tree["images_per_s"].values())
    assert not (tmp_path / "b").exists()


def test_both_sides_write_the_same_samples(small, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    report = bench.bench(tmp_path / "b", 40, 1)
    assert len(report.lines()) == 3
    ours, theirs = (
        {
            sample["__key__"]: (sample.get("jpg"), sample["cls"], sample["wnid"])
            for sample in webdataset.WebDataset(
                sorted(map(str, (tmp_path / "b" / folder).glob("*.tar"))), shardshuffle=False
            )
        }
        for folder in ("out", "webdataset")
    )
    assert ours == theirs
    assert len(ours) == 40


def test_a_folder_that_is_there_is_refused(tmp_path):
    assert "give a new folder" in refused(vitscale_data("bench", tmp_path))
