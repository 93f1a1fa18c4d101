"""launch/batch_script.py and train.sbatch: the text, and what the scripts do with every end of their ranks."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from batch_script import Job, end_lines, python_command, setup_lines, srun_arguments
from job_request import JobRequest

from vitscale.errors import EXIT_FILE_VARIABLE

PLAIN = Path(__file__).parents[3] / "launch" / "train.sbatch"
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


def test_a_container_sees_what_links_lead_to(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to("scratch")
    mounts = job(tmp_path / "runs" / "a" / "slurm").mounts
    assert mounts == ["/home/me/my project", f"{tmp_path}/runs/a", f"{tmp_path}/scratch/a"]


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
        preflight: str = "",
        choose: str = "",
        left: str = "10:00:00",
        scontrol: str = "",
        known: str | None = None,
        away: bool = False,
        element: str | None = None,
        restarts: int = 0,
        plain: bool = False,
        **fields,
    ) -> tuple[int, list[str]]:
        (tmp_path / "asked").write_text("")
        show = "exit 1" if away else f'echo "JobId=12 Requeue=1 Restarts={known or restarts} BatchFlag=1"; exit'
        scripts = {
            "srun": f"for last; do :; done\ncase $* in *preflight*) {preflight}\nexit ;; esac\n{srun}",
            "squeue": f"echo {left}" if left else "exit 1",
            "scontrol": f'case $* in *show*) {show} ;; esac\necho "$@" >>{tmp_path}/asked\n{scontrol}',
            "sleep": "case $1 in 10 | 600) ;; *) exec /bin/sleep 60 ;; esac",  # those before another try cost nothing
            "python": choose or "printf 'a\\na\\nb\\nb\\n' >$6/hosts",
        }
        for name, body in scripts.items():
            (commands / name).write_text(f"#!/bin/sh\n{body}\n")
            (commands / name).chmod(0o755)
        environ = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": str(restarts)}
        environ |= {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": element} if element else {}
        environ |= {"RANK": "3", "PYTHON": "python"}
        script = text(job(folder, tasks_per_node=2, **fields)).replace("/venv/bin/python", "python")
        command = [PLAIN, "run.yaml"] if plain else ["-c", script]
        process = subprocess.Popen(
            ["/bin/bash", *command], env=environ, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            status = process.wait(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # as Slurm does: a timer's sleep is left
        return status, (tmp_path / "asked").read_text().splitlines()

    return run


REQUEUED = ["requeue 12"] * 6  # Slurm would end the script at the first
BOTH = pytest.mark.parametrize("plain", [False, True], ids=["submit.py", "train.sbatch"])


@BOTH
@pytest.mark.parametrize(
    ("status", "requeued"), [(0, []), (2, []), (3, []), (75, REQUEUED), (1, REQUEUED), (137, REQUEUED)]
)
def test_the_script_ends_with_the_status_of_srun(end, plain, status, requeued):
    assert end(srun=f"exit {status}", plain=plain) == (status, requeued)


@BOTH
@pytest.mark.parametrize(
    ("told", "status", "requeued"), [(0, 1, []), (2, 137, []), (3, 143, []), (75, 137, REQUEUED), (1, 2, REQUEUED)]
)
def test_the_word_of_rank_0_counts_more(end, tmp_path, plain, told, status, requeued):
    # As the trainer writes it, with a reason that could be mistaken.
    record = json.dumps({"status": told, "reason": '{"status": 9, told', "step": 4})
    assert end(srun=f"echo '{record}' >${EXIT_FILE_VARIABLE}\nexit {status}", plain=plain) == (told, requeued)
    assert not list(tmp_path.glob(".vitscale-exit-*"))


@BOTH
def test_ranks_see_nothing_of_another_launch(end, tmp_path, plain):
    assert end(srun=f"echo ${{RANK-none}} >{tmp_path}/told", plain=plain) == (0, [])
    assert (tmp_path / "told").read_text() == "none\n"


def test_a_plain_job_is_not_requeued_for_ever(end):
    assert end(plain=True, restarts=29) == (75, REQUEUED)
    assert end(plain=True, restarts=30) == (75, [])


def test_the_ranks_start_on_the_chosen_nodes(end, tmp_path):
    attempt = tmp_path / "run" / "slurm" / "preflight" / "12.3"
    names = "$SLURM_HOSTFILE $SLURM_DISTRIBUTION $SLURM_NTASKS"
    assert end(srun=f'echo "{names}" >{tmp_path}/told', restarts=3) == (0, [])
    assert (tmp_path / "told").read_text() == f"{attempt}/hosts arbitrary 4\n"


@pytest.mark.parametrize(("status", "requeued"), [(2, []), (1, REQUEUED), (127, REQUEUED)])
def test_without_a_choice_of_nodes_nothing_starts(end, status, requeued):
    choose = f"echo told >$6/report.json; exit {status}"
    assert end(choose=choose, srun="exit 0") == (status, requeued)


def test_a_node_that_cannot_even_choose_is_no_verdict(end):
    assert end(choose="exit 2", srun="exit 0") == (1, REQUEUED)


@pytest.mark.parametrize("status", [140, 143])
def test_a_job_that_is_told_to_stop_in_its_preflight_has_done_nothing_wrong(end, tmp_path, status):
    counts = tmp_path / "run" / "slurm" / "restarts-12"
    counts.write_text("timeouts=0 unstarted=9\n")
    assert end(preflight=f"exit {status}", srun="exit 0") == (75, REQUEUED)
    assert counts.read_text() == "timeouts=0 unstarted=9\n"


def test_lines_of_the_user_s_do_not_take_the_requeue_away(end):
    assert end(env_setup=["set -eu -o pipefail", "trap 'exit 9' ERR EXIT"]) == (75, REQUEUED)


def test_an_element_is_requeued_alone(end):
    assert end(element="1") == (75, ["requeue 12_1"] * 6)


@BOTH
def test_a_controller_that_is_away_is_asked_for_longer_than_one_that_does_not_want_to(end, plain):
    assert end(away=True, scontrol="exit 1", plain=plain) == (75, ["requeue 12"] * 60)
    assert end(scontrol="exit 1", plain=plain) == (75, REQUEUED)


@BOTH
def test_the_script_of_a_node_that_was_cut_off_leaves_the_new_start_alone(end, tmp_path, plain):
    assert end(restarts=1, known="2", plain=plain) == (75, [])
    assert not (tmp_path / "run" / "slurm" / "restarts-12").exists()
    assert end(known=f"$(wc -l <{tmp_path}/asked)", plain=plain) == (75, ["requeue 12"])


@BOTH
def test_ranks_that_would_outlast_the_limit_are_requeued_before_it(end, tmp_path, plain):
    squeue = f"$([ ! -e {tmp_path}/looked ] && echo 1:05 || echo 0:58; touch {tmp_path}/looked)"
    waiting = f"until [ -s {tmp_path}/asked ]; do /bin/sleep 0.01; done; exit 1"
    status, asked = end(srun=waiting, left=squeue, plain=plain)
    assert status == 1
    assert set(asked) == {"requeue 12"}
    if not plain:  # both ways to the end count it once
        assert (tmp_path / "run" / "slurm" / "restarts-12").read_text() == "timeouts=1 unstarted=1\n"


@BOTH
def test_a_run_that_is_finished_is_not_requeued_at_the_limit(end, tmp_path, plain):
    squeue = f"$([ -e {tmp_path}/over ] && echo 0:58 || echo 1:05)"
    told = f"""echo '{{"status": 0, "reason": "finished"}}' >${EXIT_FILE_VARIABLE}; touch {tmp_path}/over"""
    assert end(srun=f"{told}; /bin/sleep 0.5; exit 1", left=squeue, plain=plain) == (0, [])


@pytest.mark.parametrize(
    ("left", "is_timeout"),
    [
        ("1:01", True),
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
    lefts = ["2:00", "9:00:00", "2:00", "9:00:00", "2:00"]
    assert [end(left=left, max_timeouts=2, restarts=n)[1] for n, left in enumerate(lefts)] == [*[REQUEUED] * 4, []]


@pytest.mark.fault(20)
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
