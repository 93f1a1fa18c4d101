"""The preflight on a real cluster: two sound nodes between one with other code and one with a full disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster import started_cluster
from micro_run import micro_tree

import vitscale

pytestmark = pytest.mark.slurm

# As a batch script does it. The second node finds another vitscale first, as with a wrong module or image there.
SCRIPT = """#!/bin/bash
#SBATCH --nodes=4 --ntasks-per-node=1 --output=job.log
export OMP_NUM_THREADS=1
srun --kill-on-bad-exit=0 --wait=0 bash -c '
    [ $SLURMD_NODENAME = vsn2 ] && export PYTHONPATH=$PWD/other
    exec {python} -m vitscale preflight micro.yaml --report out'
{python} -m vitscale preflight micro.yaml --choose out --nodes 2 --tasks-per-node 1 || exit
SLURM_HOSTFILE=out/hosts srun --distribution=arbitrary --nodes=2 --ntasks=2 hostname >ran-on
"""


@pytest.fixture
def four_nodes():
    with started_cluster(nodes=4) as cluster:
        yield cluster


def test_broken_nodes_are_named_and_the_run_gets_the_others(four_nodes, digits_dataset, tmp_path):
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(micro_tree(digits_dataset, tmp_path / "run")))
    (tmp_path / "job.sh").write_text(SCRIPT.format(python=sys.executable))
    package = Path(vitscale.__file__).parent
    shutil.copytree(package, tmp_path / "other" / "vitscale", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other" / "vitscale" / "errors.py").open("a") as file:
        file.write("# an edit that only one node has\n")
    (tmp_path / "run").mkdir()
    full = ["mount", "-t", "tmpfs", "-o", "nr_inodes=1", "tmpfs", tmp_path / "run"]
    subprocess.run(four_nodes.on_node("vsn3", full), check=True)

    submitted = four_nodes.run(["sbatch", "--parsable", "job.sh"], cwd=tmp_path)
    job = four_nodes.wait_for_job(submitted.stdout.strip(), ["COMPLETED", "FAILED"], limit_s=240)

    log = (tmp_path / "job.log").read_text()
    assert job["JobState"] == "COMPLETED", log
    assert (tmp_path / "out" / "hosts").read_text().split() == ["vsn1", "vsn4"]
    assert sorted((tmp_path / "ran-on").read_text().split()) == ["vsn1", "vsn4"]
    lines = log.splitlines()
    assert any(line.startswith("vsn2: vitscale ") and "most nodes have" in line for line in lines), log
    assert any(line.startswith("vsn3: ") and "No space left on device" in line for line in lines), log
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    talked = {rank["node"]: [pair["peer"] for pair in rank["pairs"] if not pair["fault"]] for rank in report["ranks"]}
    assert talked == {"vsn1": ["vsn4"], "vsn2": [], "vsn3": [], "vsn4": ["vsn1"]}
    assert all(t["bus_bytes_per_s"] > 1e6 for rank in report["ranks"] for t in rank["transfers"])
