"""Reports in a folder: what is written is read, and what is damaged is not there."""

import pytest

from vitscale.train.preflight.reports import (
    Finding,
    NodeReport,
    Pair,
    RankReport,
    Stage,
    Standing,
    Transfer,
    one_line,
    read_reports,
    write_report,
)

NODE = NodeReport("n1", {"torch": "2.15.0"}, (Finding("clock", Standing.WARNING, "late"),))
RANK = RankReport(
    "n1",
    rank=3,
    local_rank=1,
    device="cuda:1",
    stage=Stage.PAIRS,
    fault="timed out",
    flops_per_s=7e14,
    pairs=(Pair("n2", None, "gone"),),
    transfers=(Transfer("all-gather", 8, 1.0),),
)


def test_reports_come_back_as_they_were_written(tmp_path):
    folder = tmp_path / "made" / "here"
    write_report(folder, NODE)
    write_report(folder, RankReport("n1", 3, 1, "cuda:1"))
    write_report(folder, RANK)
    write_report(folder, RankReport("elsewhere", 4, 0, "cpu"))
    assert read_reports(folder, ["n1", "n2"]) == ({"n1": NODE}, [RANK])
    assert sorted(path.name for path in folder.iterdir()) == ["n1.json", "rank-00003.json", "rank-00004.json"]


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"node": "n1", "facts": 3, "findings": []}', "\udcff"])
def test_a_damaged_report_is_none(tmp_path, damage):
    for name in ("n1.json", "rank-00000.json"):
        (tmp_path / name).write_bytes(damage.encode(errors="surrogateescape"))
    assert read_reports(tmp_path, ["n1"]) == ({}, [])


def test_no_folder_has_no_reports(tmp_path):
    assert read_reports(tmp_path / "none", ["n1"]) == ({}, [])


def test_an_error_is_told_in_one_line():
    assert one_line(RuntimeError("timed out. \nException raised from here:\nframe 0")) == "timed out"
    assert one_line(RuntimeError()) == "RuntimeError"
