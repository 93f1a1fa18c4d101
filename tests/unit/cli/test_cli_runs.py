"""`vitscale runs` over real run directories."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import yaml
from click.testing import CliRunner
from micro_run import micro_tree

from vitscale.cli.runs import command
from vitscale.config import load_config
from vitscale.errors import ExitStatus, RunDirectoryError
from vitscale.train.reporting import Reporter
from vitscale.train.run import run_training


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_dataset) -> Path:
    """Two runs of three steps: one finished, one stopped after its second step."""
    folder = tmp_path_factory.mktemp("runs")
    report = Reporter.train

    def stop_at_2(reporter, step, *words, **more):
        if step == 2:
            signal.raise_signal(signal.SIGUSR2)
        return report(reporter, step, *words, **more)

    for name, train, status in (
        ("finished", report, ExitStatus.FINISHED),
        ("stopped", stop_at_2, ExitStatus.RUN_AGAIN),
    ):
        tree = micro_tree(digits_dataset, folder / "runs" / name)
        tree["engine"] = {"kind": "torch", "precision": "fp32"}
        tree["schedule"] = {"length": "24 images"}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        with mock.patch.dict(os.environ), mock.patch.object(Reporter, "train", train):
            assert run_training(load_config(path)) == status
    return folder / "runs"


@pytest.fixture
def runs(trained, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def table(*words):
    """The rows by the name of the run, as cells by column, and the lines below."""
    result = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    header, *lines = result.stdout.splitlines()
    columns = re.split(r"\s{2,}", header.strip())
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    cells = [dict(zip(columns, row, strict=True)) for row in rows if len(row) == len(columns)]
    told = [line for line in lines if ": " in line]
    return {Path(row["run"]).name: row for row in cells}, [*result.stderr.splitlines(), *told]


def test_runs_are_rows_of_one_table(runs):
    rows, told = table(runs)
    assert list(rows) == ["finished", "stopped"]
    finished, stopped = rows.values()
    last = json.loads((runs / "finished" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (finished["state"], finished["step"]) == ("finished", "3/3")
    assert (finished["restarts"], finished["left"]) == ("0", "-")
    assert finished["val top1"] == f"{last['val/top1']:.1%}"
    assert finished["MFU"] == "-"  # no peak of a CPU is known
    assert (stopped["state"], stopped["step"], stopped["val top1"]) == ("stopped", "2/3", "-")
    assert stopped["left"].endswith("s")
    assert told == [f"{runs / 'stopped'}: stopped: received SIGUSR2"]


def test_json_has_all_of_it(runs):
    result = CliRunner().invoke(command, [str(runs / "stopped"), str(runs), "--json"])
    stopped, finished = json.loads(result.output)
    records = [json.loads(line) for line in (runs / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert stopped == {
        "run": str(runs / "stopped"), "state": "stopped", "reason": "received SIGUSR2", "step": 2, "total_steps": 3,
        "loss_ema": records[-1]["train/loss_ema"], "val_top1": None, "mfu": None, "restarts": 0,
        "images_per_s": records[-1]["perf/images_per_s"], "left_s": records[-1]["perf/step_time_s"],
    }  # fmt: skip
    assert finished["state"] == "finished"


def test_a_killed_run_and_one_that_stands_still_are_told_from_one_that_runs(runs):
    run = runs / "stopped"
    (run / "exit.json").unlink()
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 3, "train/images_seen": 2')  # torn
    mark = {"kernel": "of another machine", "pid": 7, "started": 1}
    owner = {"mark": mark, "host": "n1", "since": "2026-01-01 00:00:00", "job": "12", "restart": None}
    (run / "lock").write_text(json.dumps(owner))
    rows, told = table(runs)
    assert (rows["stopped"]["state"], rows["stopped"]["step"], told) == ("running", "2/3", [])
    for path in (run / "lock", run / "metrics.jsonl", run / "watchdog" / "rank-00000.json"):
        os.utime(path, (1.0, 1.0))
    rows, told = table(runs)
    assert rows["stopped"]["state"] == "hung"
    assert "no sign of life for" in told[0]
    assert "pid 7 on n1 (since 2026-01-01 00:00:00, Slurm job 12)" in told[0]
    (run / "lock").write_text("")
    assert table(runs)[1] == [f"{run}: failed: ended without a word"]


def test_what_slurm_says_of_a_job_counts_until_the_run_is_there(runs, tmp_path, monkeypatch):
    for name, job in (("stopped", "12_3"), ("new", "13"), ("lost", "14"), ("held", "15")):
        (runs / name / "slurm").mkdir(parents=True)
        (runs / name / "slurm" / "job.json").write_text(json.dumps({"job_id": job}))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    as_files_say = {"finished": "finished", "held": "new", "lost": "new", "new": "new", "stopped": "stopped"}
    assert {name: row["state"] for name, row in table(runs)[0].items()} == as_files_say
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    answer = ["12_3|RUNNING|None", "13|PENDING|Priority", "15|PENDING|launch failed requeued held", "a banner"]
    squeue.write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(f"'{line}'" for line in answer) + "\n")
    squeue.chmod(0o755)
    rows, told = table(runs)
    assert {name: row["state"] for name, row in rows.items()} == {
        "finished": "finished", "held": "queued", "lost": "new", "new": "queued", "stopped": "starting",
    }  # fmt: skip
    assert (rows["new"]["step"], rows["stopped"]["step"]) == ("-", "2/3")
    assert told == [f"{runs / 'held'}: queued: launch failed requeued held"]
    squeue.write_text("#!/bin/sh\nexit 1\n")
    rows, told = table(runs)
    assert {name: row["state"] for name, row in rows.items()} == as_files_say
    no_answer = "squeue gives no answer: runs that are queued or starting cannot be told from others"
    assert told == [no_answer, f"{runs / 'stopped'}: stopped: received SIGUSR2"]


def test_length_in_epochs_is_known_once_there_is_a_record(runs):
    for name in ("stopped", "finished"):
        config = runs / name / "config.yaml"
        tree = yaml.safe_load(config.read_text())
        tree["schedule"]["length"] = "2 epochs"  # of 96 images in steps of 8
        config.write_text(yaml.safe_dump(tree))
    (runs / "finished" / "metrics.jsonl").unlink()
    rows, _ = table(runs)
    assert (rows["stopped"]["step"], rows["finished"]["step"]) == ("2/24", "-")


def test_a_folder_without_runs_is_one_line_with_the_mend(tmp_path):
    result = CliRunner().invoke(command, [str(tmp_path)])
    assert isinstance(result.exception, RunDirectoryError)
    assert str(result.exception) == (f"{tmp_path}: no run directory here: give one, or a folder that holds some")
