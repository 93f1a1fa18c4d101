"""launch/submit.py, as far as it needs no cluster: what is printed, what is left in the run directory, and refusals."""

import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import submission
import submit as submit_py
import yaml
from click.testing import CliRunner, Result

from vitscale.cli.plan import command as plan
from vitscale.config import load_config

LAUNCH = Path(__file__).parents[3] / "launch"

CONFIG = """
model: {name: vit_tiny_patch16_224, num_classes: 2}
data: {train: {path: shards, split: train}}
batch: {global_batch: 8, micro_batch: 2}
optim: {peak_lr: 1e-3}
schedule: {length: 10}
"""
SBATCH = 'cp "$1" script; echo Submitted batch job 12'


@pytest.fixture
def submit(tmp_path, monkeypatch):
    """Run submit.py in a folder with run.yaml, for two nodes with two ranks, where Slurm's commands are scripts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(CONFIG)
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))

    def run(*words: str, **scripts: str) -> Result:
        for name, body in ({"srun": "", "sinfo": "exit 1", "scontrol": "exit 1"} | scripts).items():
            (commands / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{body}\n")
            (commands / name).chmod(0o755)
        return CliRunner().invoke(submit_py.submit, ["run.yaml", "--nodes", "2", "--tasks-per-node", "2", *words])

    return run


def refusal(done: Result) -> str:
    """The one line that a mistake of the user's ends in."""
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_dry_run_prints_script_config_and_plan_and_leaves_nothing(submit, tmp_path):
    options = "--gpus-per-node 2 --cpus-per-task 6 --mem 64GB --partition long --account lab --qos high --time 1:30:00"
    options += " --name big --signal-delay 120 --constraint a100 --exclude n1,n2 --dependency afterok:7 --comment hello"
    done = submit(*options.split(), "--spare-nodes", "1", "--env-setup", "module load cuda", "--dry-run")
    assert done.exit_code == 0, done.output
    script, _, rest = done.stdout.partition("finish $?\n\n")
    asked = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")}
    folder = tmp_path / "runs" / "run" / "slurm"
    assert asked == {
        "account=lab",
        "comment=hello",
        "constraint=a100",
        "cpus-per-task=6",
        "dependency=afterok:7",
        "exclude=n1,n2",
        "gpus-per-node=2",
        "job-name=big",
        "mem=64GB",
        "nodes=3",
        "ntasks-per-node=2",
        "open-mode=append",
        f"output={folder}/%j_0_log.out",
        "partition=long",
        "qos=high",
        "requeue",
        "signal=USR2@120",
        "time=90",
    }
    srun = next(line for line in script.splitlines() if line.startswith("srun --unbuffered"))
    assert srun.endswith(f"{sys.executable} -u -m submitit.core._submit {folder}")
    assert f"--output {folder}/%j_%t_log.out" in srun
    assert "\nmodule load cuda\n# A shell that ends" in script
    planned = CliRunner().invoke(plan, ["run.yaml", "--gpus", "4", "--gpus-per-node", "2"])
    assert rest == planned.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "run.yaml"]


def test_what_was_not_asked_for_is_not_in_the_script(submit):
    script = submit("--dry-run", "--min-nodes", "1").stdout
    assert "#SBATCH --job-name=run\n" in script
    assert "#SBATCH --nodes=1-2\n" in script
    for option in ("gpus-per-node", "cpus-per-task", "mem", "partition", "account", "qos", "comment", "exclude"):
        assert f"#SBATCH --{option}=" not in script


def test_submission_tells_what_to_do_next_and_leaves_what_the_job_needs(submit, tmp_path):
    done = submit("schedule.length=20", "--allow-change", "run.seed", sbatch=SBATCH)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "job            12: 2 nodes x 2 ranks",
        "run directory  runs/run",
        "follow         tail -F runs/run/slurm/12_0_log.out",
        "cancel         scancel 12",
        "monitor        tensorboard --logdir runs/run",
    ]
    folder = tmp_path / "runs" / "run" / "slurm"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    script = (tmp_path / "script").read_text()
    (code,) = folder.glob("code-*")
    assert f"export PYTHONPATH={code}:{code}/launch$" in script
    assert (code / "vitscale" / "cli" / "train.py").exists()
    (config,) = folder.glob("config-*")
    assert f"config={config}/$" in script
    assert load_config(config / "0.yaml") == load_config(Path("run.yaml"), ["schedule.length=20"])
    task = pickle.loads((folder / "12_submitted.pkl").read_bytes())
    assert task.function.__module__ == "training_task"
    assert task.args == ([f"{config}/0.yaml", "--allow-change=run.seed"],)
    assert json.loads((folder / "job.json").read_text()).items() >= {"job_id": "12", "name": "run"}.items()
    assert "numpy" in json.loads((folder / "environment-12.json").read_text())["packages"]


def test_the_job_runs_the_copy_that_was_taken(submit, tmp_path, monkeypatch):
    # A file was saved after the copy's place had been worked out.
    monkeypatch.setattr(submission, "take_snapshot", lambda folder, sources: folder / "code-taken")
    assert submit(sbatch=SBATCH).exit_code == 0
    code = tmp_path / "runs" / "run" / "slurm" / "code-taken"
    assert f"export PYTHONPATH={code}:{code}/launch$" in (tmp_path / "script").read_text()


def test_a_job_knows_nothing_of_the_job_that_it_was_submitted_from(submit, tmp_path, monkeypatch):
    around = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3", "SRUN_DEBUG": "3", "SUBMITIT_EXECUTOR": "slurm"}
    stays = {"SLURM_CONF": "/etc/conf", "SLURM_CLUSTERS": "big", "SLURM_JWT": "token", "SBATCH_RESERVATION": "ours"}
    for name, value in {**around, **stays}.items():
        monkeypatch.setenv(name, value)
    assert submit(sbatch=f"env >seen\n{SBATCH}").exit_code == 0
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert not around.keys() & seen.keys()
    assert stays.items() <= seen.items()
    assert around.items() <= os.environ.items()


def test_sweep_is_an_array_with_a_run_directory_a_point(submit, tmp_path):
    done = submit("--sweep", "optim.peak_lr=1e-3,3e-3", "--sweep", "run.seed=0,1", "--name", "rates", sbatch=SBATCH)
    assert done.exit_code == 0, done.output
    names = [f"optim.peak_lr-{rate}_run.seed-{seed}" for rate in ("1e-3", "3e-3") for seed in (0, 1)]
    assert done.stdout.splitlines() == [
        "job            12: 4 runs of 2 nodes x 2 ranks",
        *(f"run directory  runs/run/{name}" for name in names),
        "table          vitscale runs runs/run",
        "follow         tail -F runs/run/slurm/12_0_0_log.out",
        "cancel         scancel 12",
        "monitor        tensorboard --logdir runs/run",
    ]
    assert "#SBATCH --array=0-3%4\n" in (tmp_path / "script").read_text()
    (config,) = (tmp_path / "runs" / "run" / "slurm").glob("config-*")
    for index, name in enumerate(names):
        assert yaml.safe_load((config / f"{index}.yaml").read_text())["run"]["dir"] == f"runs/run/{name}"
        record = json.loads((tmp_path / "runs" / "run" / name / "slurm" / "job.json").read_text())
        assert record["job_id"] == f"12_{index}"
        task = pickle.loads((tmp_path / "runs" / "run" / "slurm" / f"12_{index}_submitted.pkl").read_bytes())
        assert task.args == ([f"{config}/{index}.yaml"],)


def test_dry_run_of_a_sweep_shows_the_array(submit):
    done = submit("--sweep", "run.seed=0,1", "--dry-run")
    assert "#SBATCH --array=0-1%2\n" in done.stdout
    assert "\n0: runs/run/run.seed-0\n1: runs/run/run.seed-1\n" in done.stdout


def test_defaults_come_from_the_clusters_file_and_the_site_file(submit, tmp_path):
    (tmp_path / ".config" / "vitscale").mkdir(parents=True)
    (tmp_path / ".config" / "vitscale" / "site.yaml").write_text("account: site\ncomment: site\n")
    script = submit(
        "--cluster", "a100-4", "--tasks-per-node", "4", "--account", "flag", "--dry-run", "batch.global_batch=16"
    ).stdout
    for option in ("account=flag", "qos=regular", "nodes=3", "comment=site", "time=720"):
        assert f"#SBATCH --{option}\n" in script


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.peak_rl=1"], "error: run.yaml optim.peak_rl=1: unknown key optim.peak_rl: did you mean optim.peak_lr"),
        (["batch.global_batch=12"], "error: batch.global_batch 12 is not 4 ranks x batch.micro_batch 2"),
        (["--nodes", "4", "--min-nodes", "3", "batch.micro_batch=1"], "error: run.yaml batch.micro_batch=1: "),
        (["--nodes", "2", "--min-nodes", "1", "--tasks-per-node", "4", "batch.global_batch=24"], "error: batch.global"),
        (["--gpus-per-node", "8"], "error: --gpus-per-node 8 with --tasks-per-node 2: a rank uses one GPU"),
        (["--time", "1h"], "error: --time 1h is no time: write minutes (90), "),
        (["--sweep", "run.seed"], "error: --sweep run.seed: No such file or directory: write "),
        (["--sweep", "optim.peak_lr=1,x"], "error: run.yaml optim.peak_lr=x run.dir=runs/run/optim.peak_lr-x: "),
        (["--cluster", "nope"], "error: --cluster nope: no "),
        (["--local"], "error: --nodes 2 with --local or --debug: this is one machine"),
        (["--local", "--debug"], "error: --local with --debug: --debug is one rank in this process"),
        (["--debug", "--sweep", "run.seed=1,2"], "error: --sweep with --local or --debug: a sweep is a Slurm array"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(submit, tmp_path, words, message):
    assert refusal(submit(*words, sbatch="touch submitted")).startswith(message)
    assert not (tmp_path / "submitted").exists()


def test_missing_config(submit, tmp_path):
    (tmp_path / "run.yaml").unlink()
    done = CliRunner().invoke(submit_py.submit, ["none.yaml"])
    assert refusal(done) == "error: none.yaml: no such config file\n"


def test_no_slurm(submit, tmp_path):
    assert refusal(submit()).startswith("error: no sbatch on this machine: submit from a login node")
    (tmp_path / "bin" / "srun").unlink()
    done = CliRunner().invoke(submit_py.submit, ["run.yaml"])
    assert refusal(done).startswith("error: no sbatch and srun on this machine: submit from a login node")
    assert not (tmp_path / "runs").exists()


def test_slurms_own_refusal(submit):
    done = submit("--partition", "nope", sbatch="echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1")
    assert refusal(done).startswith("error: Slurm takes no job: sbatch: error: invalid partition specified: nope;")


def test_unknown_partition(submit):
    done = submit("--partition", "nope", sbatch=SBATCH, sinfo="echo 'gpu*|4|8|gpu:2|infinite'")
    assert refusal(done) == "error: --partition nope: this cluster has none: use gpu\n"


def test_run_directory_that_cannot_be_written(submit, tmp_path):
    (tmp_path / "runs").touch()
    assert "slurm: cannot be written: Not a directory: choose another run.dir" in refusal(submit(sbatch=SBATCH))


def test_copy_that_fails_without_a_reason_of_the_system_s(submit, monkeypatch):
    def take_snapshot(folder, sources):
        raise shutil.Error([("a.py", "b.py", "vanished")])

    monkeypatch.setattr(submission, "take_snapshot", take_snapshot)
    assert "slurm: cannot be written: [('a.py', 'b.py', 'vanished')]: choose" in refusal(submit(sbatch=SBATCH))


def test_run_directory_of_another_config(submit, tmp_path):
    config = load_config(tmp_path / "run.yaml", ["run.seed=1"])
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    message = "error: runs/run: its config differs in run.seed: choose another run.dir, or go on with --allow-change "
    assert refusal(submit(sbatch=SBATCH)).startswith(message)
    assert submit("--allow-change", "run.seed", sbatch=SBATCH).exit_code == 0


def test_second_job_of_a_run_directory(submit):
    assert submit(sbatch=SBATCH).exit_code == 0
    running = "echo 'JobId=12 JobState=RUNNING ExitCode=0:0'"
    assert refusal(submit(sbatch=SBATCH, scontrol=running)).startswith("error: runs/run: job 12 of it is RUNNING")


def test_what_needs_more_memory_than_there_is_is_submitted_only_by_force(submit, tmp_path):
    huge = ["model.name=vit_huge_patch14_224", "--gpus-per-node", "2", "--hbm", "6"]
    assert refusal(submit(*huge, sbatch=SBATCH)).startswith("error: a step needs ")
    shown = submit(*huge, "--dry-run")
    assert (shown.exit_code, shown.stderr.startswith("error: a step needs ")) == (2, True)
    assert shown.stdout.startswith("#!/bin/bash\n")
    assert not (tmp_path / "runs").exists()
    assert submit(*huge, "--force", "--dry-run").exit_code == 0
    assert submit(*huge, "--force", sbatch=SBATCH).exit_code == 0


@pytest.mark.parametrize("option", ["--wait", "--follow"])
def test_waiting_ends_with_the_status_of_the_job(submit, tmp_path, option):
    log = tmp_path / "runs" / "run" / "slurm" / "12_0_log.out"
    done = submit(
        option,
        sbatch=SBATCH,
        scontrol=f"printf 'first\\nsecond\\n' >{log}\necho 'JobId=12 JobState=FAILED ExitCode=3:0'",
    )
    assert done.exit_code == 3
    assert done.stdout.endswith("first\nsecond\n") == (option == "--follow")


def test_local_runs_the_ranks_of_one_node_by_torchrun(submit, monkeypatch):
    started = []

    def execv(_, words):
        started.append(words)
        raise SystemExit(75)

    monkeypatch.setattr(os, "execv", execv)
    words = ["run.yaml", "run.seed=1", "--tasks-per-node", "4", "--allow-change", "run.seed", "--local"]
    assert CliRunner().invoke(submit_py.submit, words).exit_code == 75
    assert started == [
        [
            *[sys.executable, str(LAUNCH / "forward_signals.py"), sys.executable, "-m", "torch.distributed.run"],
            *["--standalone", "--nproc-per-node", "4"],
            *["-m", "vitscale", "train", "run.yaml", "run.seed=1", "--allow-change=run.seed"],
        ]
    ]


def test_debug_is_one_rank_in_this_process(submit, monkeypatch):
    # What the trainer leaves in the environment would take later tests for its ranks.
    monkeypatch.setattr(submit_py, "vitscale", lambda words: sys.exit(75 if words == expected else 1))
    expected = ["train", "run.yaml", "run.seed=1", "--allow-change=run.seed"]
    words = ["run.yaml", "run.seed=1", "--allow-change", "run.seed", "--debug"]
    assert CliRunner().invoke(submit_py.submit, words).exit_code == 75


def test_a_submission_does_not_wait_for_torch(tmp_path):
    script = "import sys, submit; print([name for name in ('torch', 'deepspeed') if name in sys.modules])"
    environ = {**os.environ, "PYTHONPATH": str(LAUNCH)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_help_has_an_example():
    assert "python launch/submit.py configs/" in CliRunner().invoke(submit_py.submit, ["--help"]).output
