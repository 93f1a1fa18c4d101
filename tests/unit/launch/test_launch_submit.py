"""launch/submit.py, as far as it needs no cluster: the batch script, and every refusal."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SUBMIT = Path(__file__).parents[3] / "launch" / "submit.py"

CONFIG = """
model: {name: vit_tiny_patch16_224, num_classes: 2}
data: {train: {path: shards, split: train}}
batch: {global_batch: 8, micro_batch: 2}
optim: {peak_lr: 1e-3}
schedule: {length: 10}
"""


@pytest.fixture
def submit(tmp_path: Path):
    """Run submit.py in a folder with run.yaml, on a PATH that `sbatch`, a shell script, is all of."""

    def run(*words: str, sbatch: str | None = None) -> subprocess.CompletedProcess[str]:
        (tmp_path / "run.yaml").write_text(CONFIG)
        commands = tmp_path / "bin"
        commands.mkdir()
        if sbatch is not None:
            (commands / "sbatch").write_text(f"#!/bin/sh\n{sbatch}\n")
            (commands / "sbatch").chmod(0o755)
        environ = {**os.environ, "PATH": str(commands)}
        command = [sys.executable, str(SUBMIT), "run.yaml", "--nodes", "2", "--tasks-per-node", "2", *words]
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)

    return run


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a mistake of the user's ends in."""
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_dry_run_prints_the_script_and_leaves_nothing(submit, tmp_path):
    options = "--gpus-per-node 2 --cpus-per-task 6 --mem-gb 64 --partition long --account lab --qos high --time 90"
    options += " --name big --signal-delay 120 --max-requeues 7 --dry-run"
    done = submit(*options.split())
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")}
    folder = tmp_path / "runs" / "run" / "slurm"
    assert asked - {"wckey=submitit"} == {
        "account=lab",
        "cpus-per-task=6",
        "gpus-per-node=2",
        "job-name=big",
        "mem=64GB",
        "nodes=2",
        "ntasks-per-node=2",
        "open-mode=append",
        f"output={folder}/%j_0_log.out",
        "partition=long",
        "qos=high",
        "requeue",
        "signal=USR2@120",
        "time=90",
    }
    (srun,) = [line for line in lines if line.startswith("srun")]
    assert srun.endswith(f"{sys.executable} -u -m submitit.core._submit {folder}")
    assert "--kill-on-bad-exit=0" in srun.split()
    assert lines[-1] == "exit $status"
    assert not (tmp_path / "runs").exists()


def test_what_was_not_asked_for_is_not_in_the_script(submit):
    script = submit("--dry-run").stdout
    assert "--job-name=run\n" in script
    for option in ("gpus-per-node", "cpus-per-task", "mem", "partition", "account", "qos"):
        assert f"#SBATCH --{option}=" not in script


@pytest.mark.parametrize(
    ("srun_status", "restarts", "requeued", "status"),
    [
        (0, None, False, 0),
        (2, None, False, 2),
        (3, None, False, 3),
        (75, None, True, 75),
        (1, "4", True, 1),
        (137, "4", True, 137),
        (75, "5", False, 75),
        (1, "6", False, 1),
    ],
)
def test_end_of_the_script(submit, tmp_path, srun_status, restarts, requeued, status):
    script = submit("--max-requeues", "5", "--dry-run").stdout
    commands = {"srun": f"exit {srun_status}", "scontrol": f'echo "$@" > {tmp_path}/asked', "sleep": "exit 0"}
    for name, body in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environ = {"PATH": str(tmp_path / "bin"), "SLURM_JOB_ID": "12"}
    environ |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    done = subprocess.run(["/bin/bash", "-c", script], env=environ, timeout=20)
    assert done.returncode == status
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 12\n" if requeued else "")


def test_submission_tells_what_to_do_next(submit, tmp_path):
    done = submit("schedule.length=20", sbatch="echo Submitted batch job 12")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "job            12: 2 nodes x 2 ranks",
        "run directory  runs/run",
        "follow         tail -F runs/run/slurm/12_0_log.out",
        "cancel         scancel 12",
        "monitor        tensorboard --logdir runs/run",
    ]
    folder = tmp_path / "runs" / "run" / "slurm"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "12_submitted.pkl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["optim.peak_rl=1"],
            "error: run.yaml optim.peak_rl=1: unknown key optim.peak_rl: did you mean optim.peak_lr?",
        ),
        (["batch.global_batch=12"], "error: batch.global_batch 12 is not 4 ranks x batch.micro_batch 2"),
        (["--gpus-per-node", "8"], "error: --gpus-per-node 8 with --tasks-per-node 2: a rank uses one GPU"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(submit, tmp_path, words, message):
    done = submit(*words, sbatch=f"touch {tmp_path}/submitted")
    assert refusal(done).startswith(message)
    assert not (tmp_path / "submitted").exists()


def test_no_slurm(submit):
    assert refusal(submit()).startswith("error: no sbatch on this machine: submit from a login node")


def test_slurms_own_refusal(submit):
    done = submit("--partition", "nope", sbatch="echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1")
    assert refusal(done).startswith("error: Slurm takes no job: sbatch: error: invalid partition specified: nope;")
