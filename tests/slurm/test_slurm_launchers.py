"""The launchers of docs/launching.md on two nodes: the losses of one process, and signals that end in a checkpoint.

The nodes are as Debian sets machines up: each one's own name is 127.0.1.1 on itself, where no other node finds it.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from cluster import Cluster
from forked_command import vitscale
from micro_run import REPOSITORY, losses, micro_tree
from ssh_nodes import missing, ssh_between

from vitscale.config.cache import CACHE_VARIABLE

pytestmark = pytest.mark.slurm

STEPS = 10
BIN = Path(sys.executable).parent
WRAPPER = [sys.executable, REPOSITORY / "launch" / "forward_signals.py"]
RENDEZVOUS = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "vsn1:29400", "--rdzv-id", "test"]
TORCHRUN = [*WRAPPER, BIN / "torchrun", "--nnodes=2", "--nproc-per-node=1", *RENDEZVOUS, "-m", "vitscale", "train"]
DEEPSPEED = [sys.executable, REPOSITORY / "launch" / "deepspeed_hosts.py", "hosts.txt"]
# Of the variables here none goes to the other node by itself.
GIVEN = ["PATH", "MASTER_ADDR=vsn1", "OMP_NUM_THREADS=1", "TORCH_EXTENSIONS_DIR", CACHE_VARIABLE]
MPIRUN = [
    *(*WRAPPER, "mpirun", "--allow-run-as-root", "--host", "vsn1:1,vsn2:1", "--map-by", "ppr:1:node"),
    *("--bind-to", "none", *(word for variable in GIVEN for word in ("-x", variable))),
    *(sys.executable, "-m", "vitscale", "train"),
]
ENDLESS = ["schedule.length=1000000", "checkpoint.every_steps=1000000"]


@pytest.fixture(scope="module")
def nodes(cluster: Cluster, tmp_path_factory) -> Iterator[Cluster]:
    """The session's cluster, its nodes with Debian's file of hosts."""
    folder = tmp_path_factory.mktemp("hosts")
    for node in cluster.nodes:
        others = {"localhost": "127.0.0.1", **cluster.nodes, node: "127.0.1.1"}
        (folder / node).write_text("".join(f"{address} {name}\n" for name, address in others.items()))
        subprocess.run(cluster.on_node(node, ["mount", "--bind", folder / node, "/etc/hosts"]), check=True)
    yield cluster
    for node in cluster.nodes:
        subprocess.run(cluster.on_node(node, ["umount", "/etc/hosts"]), check=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory, digits_dataset) -> Path:
    """A micro run under ZeRO-3 whose first steps do not depend on its length."""
    folder = tmp_path_factory.mktemp("launchers")
    tree = micro_tree(digits_dataset, folder / "alone")
    del tree["data"]["val"], tree["eval"]
    tree["model"] |= {"drop_rate": 0.0, "drop_path_rate": 0.0}
    tree["schedule"] = {"length": STEPS, "warmup": 2, "kind": "constant"}
    tree["engine"]["zero_stage"] = 3
    (folder / "micro.yaml").write_text(yaml.safe_dump(tree))
    return folder / "micro.yaml"


@pytest.fixture(scope="module")
def oracle(config: Path) -> dict[int, float]:
    """The losses of one process."""
    done = vitscale("train", config)
    assert done.returncode == 0, done.stderr
    return losses(config.parent / "alone")


def first_losses(run_dir: Path) -> dict[int, float]:
    """Those of the steps that the oracle has too."""
    return {step: loss for step, loss in losses(run_dir).items() if step <= STEPS}


@contextlib.contextmanager
def on_nodes(commands: list[list[str | Path]], cwd: Path, path: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes on the nodes, which are gone at the end of the block."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    with contextlib.ExitStack() as stack:
        processes = []
        for number, command in enumerate(commands):
            log = stack.enter_context((cwd / f"launcher{number}.log").open("w"))
            processes.append(subprocess.Popen(command, cwd=cwd, env=environ, stdout=log, stderr=log, text=True))
        try:
            yield processes
        finally:
            for process in processes:
                if process.poll() is None:
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                process.wait(timeout=20)


def stopped(processes: list[subprocess.Popen[str]], run_dir: Path) -> list[int]:
    """Exit statuses of launchers of which the last is told to stop once the run has gone so far."""
    deadline = time.monotonic() + 120
    while len(losses(run_dir)) < STEPS:
        logs = [log.read_text()[-3000:] for log in run_dir.parent.glob("launcher*.log")]
        assert time.monotonic() < deadline, "\n".join(logs)
        assert all(process.poll() is None for process in processes), "\n".join(logs)
        time.sleep(0.1)
    # nsenter hands no signal on.
    psutil.Process(processes[-1].pid).children()[0].terminate()
    return [process.wait(timeout=60) for process in processes]


def check_checkpointed_end(run_dir: Path) -> None:
    end = json.loads((run_dir / "exit.json").read_text())
    assert end["status"] == 75
    assert list(losses(run_dir)) == list(range(1, end["step"] + 1))
    assert (run_dir / "checkpoints" / f"step-{end['step']:08d}" / "manifest.json").exists()


def test_a_plain_job_ends_with_the_losses_of_one_process(nodes, config, oracle, tmp_path):
    sbatch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--chdir", tmp_path]
    command = [*sbatch, REPOSITORY / "launch" / "train.sbatch", config, "run.dir=run"]
    job_id = nodes.run(command, PYTHON=sys.executable, OMP_NUM_THREADS="1").stdout.strip()
    job = nodes.wait_for_job(job_id, ["COMPLETED", "FAILED", "CANCELLED"], limit_s=120)
    log = (tmp_path / f"vitscale-{job_id}.log").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), log
    assert losses(tmp_path / "run") == pytest.approx(oracle, rel=1e-5)
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())["variables"]
    assert (recorded["WORLD_SIZE"], recorded["GLOO_SOCKET_IFNAME"]) == ("4", "eth0")


@pytest.mark.fault(16, 17)
def test_torchrun_on_two_nodes_stops_on_both_when_one_is_signalled(nodes, config, oracle, tmp_path):
    commands = [nodes.on_node(node, [*TORCHRUN, config, "run.dir=run", *ENDLESS], tmp_path) for node in nodes.nodes]
    with on_nodes(commands, tmp_path, os.environ["PATH"]) as processes:
        statuses = stopped(processes, tmp_path / "run")
    assert max(statuses) == 75
    assert first_losses(tmp_path / "run") == pytest.approx(oracle, rel=1e-5)
    check_checkpointed_end(tmp_path / "run")


@pytest.mark.fault(16, 17)
@pytest.mark.parametrize(("program", "command"), [("pdsh", DEEPSPEED), ("mpirun", MPIRUN)], ids=["deepspeed", "mpirun"])
def test_launchers_that_reach_the_other_node_by_ssh(nodes, config, oracle, tmp_path, program, command):
    if lack := missing(program):
        pytest.skip(f"not by ssh here: {lack}")
    (tmp_path / "hosts.txt").write_text("".join(f"{node} slots=1\n" for node in nodes.nodes))
    (tmp_path / "ssh").mkdir()
    with ssh_between(nodes, tmp_path / "ssh") as programs:
        path = f"{programs}:{BIN}:{os.environ['PATH']}"
        launcher = nodes.on_node("vsn1", [*command, config, "run.dir=run", *ENDLESS], tmp_path)
        with on_nodes([launcher], tmp_path, path) as processes:
            assert stopped(processes, tmp_path / "run") == [75]
    assert first_losses(tmp_path / "run") == pytest.approx(oracle, rel=1e-5)
    check_checkpointed_end(tmp_path / "run")


# What `sbatch` and `srun` do with the statuses of train.sbatch is told by stand-ins: the training costs nothing here.
STAND_IN = """#!/bin/bash
echo "$SLURM_PROCID ${SLURM_RESTART_COUNT:-0} $*" >>"$PWD/calls"
[ "${SLURM_RESTART_COUNT:-0}" -lt 1 ] && exit $FIRST
exit $SECOND
"""


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [(75, 0, ("COMPLETED", "0:0", "1")), (3, 0, ("FAILED", "3:0", "0")), (1, 2, ("FAILED", "2:0", "1"))],
)
def test_a_plain_job_is_requeued_when_another_try_may_help(cluster, tmp_path, first, second, outcome):
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    sbatch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--chdir", tmp_path]
    variables = {"PYTHON": str(tmp_path / "python"), "FIRST": str(first), "SECOND": str(second)}
    job_id = cluster.run([*sbatch, REPOSITORY / "launch" / "train.sbatch", "run.yaml", "a=b c"], **variables).stdout
    job = cluster.wait_for_job(job_id.strip(), ["COMPLETED", "FAILED", "CANCELLED"], limit_s=60)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == outcome
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sorted(calls)[-1] == f"1 {outcome[2]} -m vitscale train run.yaml a=b c"
