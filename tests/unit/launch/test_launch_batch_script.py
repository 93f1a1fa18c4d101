"""launch/batch_script.py: the text of the script, and what it does with every end of its ranks."""

import json
import subprocess
from pathlib import Path

import pytest
from batch_script import Job, end_lines, python_command, setup_lines, srun_arguments
from job_request import JobRequest

from vitscale.errors import EXIT_FILE_VARIABLE

GOLDEN = Path(__file__).parents[2] / "golden" / "batch_script.sh"


def job(folder: Path = Path("/runs/a/slurm"), **fields) -> Job:
    return Job(
        request=JobRequest.model_validate(fields),
        folder=folder,
        code=folder / "code-1",
        configs=folder / "config-1",
        run_dirs=(folder.parent, folder.parent / "second point"),
        workdir=Path("/home/me/my project"),
        python="/venv/bin/python",
    )


def text(job: Job) -> str:
    """The script as submitit puts it together, without the lines that Slurm reads."""
    srun = " ".join(["srun", *srun_arguments(job), python_command(job), "-u -m submitit.core._submit"])
    return "\n".join([*setup_lines(job), "", srun, *end_lines(), ""])


def test_the_script_is_the_one_on_record():
    asked = {"nodes": 8, "min_nodes": 4, "spare_nodes": 1, "gpus_per_node": 8, "cpus_per_task": 12, "max_timeouts": 7}
    assert text(job(env_setup=["module load cuda"], **asked)) == GOLDEN.read_text(encoding="utf-8")


def test_without_a_preflight_the_ranks_start_on_all_nodes():
    script = text(job(preflight=False))
    assert "preflight " not in script
    assert "SLURM_HOSTFILE" not in script


def test_pyxis_runs_every_step_in_the_image():
    container = {"container": "/images/a b.sqsh", "container_mounts": ["/data"]}
    lines = [line for line in text(job(**container)).splitlines() if " python3 " in line]
    assert len(lines) == 3
    for line in lines:
        assert "srun " in line
        assert "--container-image=/images/a b.sqsh" in line.replace("'", "")
        assert "--container-mounts=/home/me/my project:/home/me/my project,/runs/a:/runs/a,/data:/data" in line
        assert "--container-workdir=/home/me/my project" in line
    assert lines[1].startswith('srun --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" ')


def test_apptainer_runs_every_python_in_the_image():
    script = text(job(container="a.sif", container_runtime="apptainer", container_python="python3.12"))
    python = "apptainer exec --nv --bind '/home/me/my project,/runs/a' --pwd '/home/me/my project' a.sif python3.12 "
    assert script.count(python) == 3
    assert "/venv/bin/python" not in script


@pytest.fixture
def end(tmp_path):
    """Run the script to its end, with stand-ins for Slurm's commands; gives its status and what was asked of Slurm."""
    folder = tmp_path / "run" / "slurm"
    commands = tmp_path / "bin"
    for path in (folder, commands):
        path.mkdir(parents=True)

    def run(
        *,
        srun: str = "exit 75",
        choose: str = "",
        left: str = "10:00:00",
        scontrol: str = "",
        element: str | None = None,
        restarts: int = 0,
        **fields,
    ) -> tuple[int, list[str]]:
        (tmp_path / "asked").write_text("")
        scripts = {
            "srun": f"case $* in *preflight*) exit ;; esac\n{srun}",
            "squeue": f"echo '{left}'" if left else "exit 1",
            "scontrol": f'echo "$@" >> {tmp_path}/asked\n{scontrol}',
            "sleep": "",
            "python": choose or "printf 'a\\na\\nb\\nb\\n' >$6/hosts",
        }
        for name, body in scripts.items():
            (commands / name).write_text(f"#!/bin/sh\n{body}\n")
            (commands / name).chmod(0o755)
        environ = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": str(restarts)}
        environ |= {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": element} if element else {}
        script = text(job(folder, tasks_per_node=2, **fields)).replace("/venv/bin/python", "python")
        done = subprocess.run(["/bin/bash", "-c", script], env=environ, timeout=30, stdout=subprocess.DEVNULL)
        return done.returncode, (tmp_path / "asked").read_text().splitlines()

    return run


REQUEUED = ["requeue 12"] * 6  # Slurm would end the script at the first


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, []), (2, []), (3, []), (75, REQUEUED), (1, REQUEUED), (137, REQUEUED)]
)
def test_the_script_ends_with_the_status_of_srun(end, status, requeued):
    assert end(srun=f"exit {status}") == (status, requeued)


@pytest.mark.parametrize(
    ("told", "status", "requeued"), [(0, 1, []), (2, 137, []), (3, 143, []), (75, 137, REQUEUED), (1, 2, REQUEUED)]
)
def test_the_word_of_rank_0_counts_more(end, told, status, requeued):
    # As the trainer writes it, with a reason that could be mistaken.
    record = json.dumps({"status": told, "reason": '{"status": 9, told', "step": 4})
    assert end(srun=f"echo '{record}' >${EXIT_FILE_VARIABLE}\nexit {status}") == (told, requeued)


def test_the_ranks_start_on_the_chosen_nodes(end, tmp_path):
    hosts = tmp_path / "run" / "slurm" / "preflight" / "12.3" / "hosts"
    names = "$SLURM_HOSTFILE $SLURM_DISTRIBUTION $SLURM_NTASKS $SLURM_NNODES"
    assert end(srun=f'echo "{names}" >{tmp_path}/told', restarts=3) == (0, [])
    assert (tmp_path / "told").read_text() == f"{hosts} arbitrary 4 2\n"


@pytest.mark.parametrize(("status", "requeued"), [(2, []), (1, REQUEUED), (127, REQUEUED)])
def test_without_a_choice_of_nodes_nothing_starts(end, status, requeued):
    assert end(choose=f"exit {status}", srun="exit 0") == (status, requeued)


def test_an_element_is_requeued_alone(end):
    assert end(element="1") == (75, ["requeue 12_1"] * 6)


def test_a_controller_that_is_away_is_asked_again(end, tmp_path):
    assert end(scontrol=f"[ $(wc -l <{tmp_path}/asked) -gt 2 ] || exit 1") == (75, REQUEUED)


@pytest.mark.parametrize(
    ("left", "is_timeout"),
    [
        ("0:00", True),
        ("3:05", True),
        ("3:06", False),
        ("1:00:00", False),
        ("1-00:03:05", False),
        ("1-00:00:00", False),
        ("UNLIMITED", False),
        ("INVALID", False),
        ("", False),
    ],
)
def test_only_an_end_near_the_time_limit_is_a_timeout(end, left, is_timeout):
    ends = [end(left=left, signal_delay_s=120, max_timeouts=1, restarts=n)[1] for n in range(2)]
    assert ends == [REQUEUED, [] if is_timeout else REQUEUED]


def test_timeouts_are_counted_over_preemptions(end):
    lefts = ["1:00", "9:00:00", "1:00", "9:00:00", "1:00"]
    assert [end(left=left, max_timeouts=2, restarts=n)[1] for n, left in enumerate(lefts)] == [*[REQUEUED] * 4, []]


def test_starts_that_do_not_reach_the_training_come_to_an_end(end, tmp_path):
    counts = tmp_path / "run" / "slurm" / "restarts-12"
    counts.write_text("timeouts=0 unstarted=8\n")
    assert end(srun="exit 1") == (1, REQUEUED)
    assert end(srun="exit 1") == (1, [])
    # The trainer raises the number: its own count goes on from there.
    assert end(srun=f"echo 1 >{tmp_path}/run/generation; exit 1") == (1, REQUEUED)
    assert counts.read_text() == "timeouts=0 unstarted=0\n"
    assert end(srun="exit 1") == (1, REQUEUED)
    assert counts.read_text() == "timeouts=0 unstarted=1\n"


def test_nothing_can_be_written(end, tmp_path):
    # Root may write anywhere: the counts' place is taken by a folder instead.
    (tmp_path / "run" / "slurm" / "restarts-12").mkdir()
    assert end() == (75, REQUEUED)
    assert list((tmp_path / "run" / "slurm" / "restarts-12").iterdir()) == []
