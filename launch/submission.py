"""A job's way to Slurm: what lies in RUN/slurm, and submitit's executor."""

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from batch_script import Job, end_lines, python_command, setup_lines, srun_arguments
from cluster_state import note_job
from code_snapshot import code_sources, environment, record_environment, snapshot_path, take_snapshot
from job_request import JobRequest, time_limit_min
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor
from sweep import Point
from training_task import train_in_task

from vitscale.errors import LaunchError

OF_THE_JOB_AROUND = ("SLURM_", "SRUN_", "SUBMITIT_")
OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


class Executor(SlurmExecutor):
    """submitit's Slurm executor, which can show its batch script on a machine without Slurm as well."""

    @classmethod
    def affinity(cls) -> int:
        """Whether Slurm is here is not asked: the command has looked for it, and a dry run needs none."""
        return 1

    def script(self, points: int) -> str:
        """The batch script that sbatch gets for so many points."""
        # submitit has no public way to it.
        if points > 1:
            self.parameters["map_count"] = points
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def draw_job(request: JobRequest, points: Sequence[Point], run_dir: Path) -> Job:
    """Where everything of a job lies; touches nothing.

    Args:
        request: what it asks for.
        points: its runs.
        run_dir: that of the one run, or the folder of the sweep's.
    """
    folder = (run_dir / "slurm").absolute()
    return Job(
        request=request,
        folder=folder,
        code=snapshot_path(folder, code_sources()),
        configs=folder / f"config-{hashlib.sha256(''.join(map(_config_text, points)).encode()).hexdigest()[:16]}",
        run_dirs=tuple(point.run_dir.absolute() for point in points),
        workdir=Path.cwd(),
        python=sys.executable,
    )


def draw_executor(job: Job, name: str) -> Executor:
    """submitit's executor for a job; touches nothing."""
    request = job.request
    executor = Executor(job.folder, python=python_command(job))
    nodes = {"nodes": f"{request.fewest_nodes}-{request.most_nodes}"} if request.fewest_nodes < request.nodes else {}
    executor.update_parameters(
        job_name=request.name or name,
        nodes=request.most_nodes,
        ntasks_per_node=request.ranks_per_node,
        gpus_per_node=request.gpus_per_node,
        cpus_per_task=request.cpus_per_task,
        mem=request.mem,
        partition=request.partition,
        account=request.account,
        qos=request.qos,
        constraint=request.constraint,
        exclude=request.exclude,
        dependency=request.dependency,
        comment=request.comment,
        wckey=None,  # submitit's own may be none of the account's
        time=time_limit_min(request.time),
        signal_delay_s=request.signal_delay_s,
        stderr_to_stdout=True,
        setup=setup_lines(job),
        srun_args=srun_arguments(job),
        teardown=end_lines(),
        additional_parameters={"requeue": True, **nodes},
    )
    return executor


def hand_in(job: Job, points: Sequence[Point], name: str, options: Sequence[str]) -> list[str]:
    """Submit a job with all that it needs; its id, or those of the elements of its array.

    Args:
        job: as `draw_job` gives it.
        points: its runs.
        name: the job's, unless it is asked to have another.
        options: of `vitscale train`.

    Raises:
        LaunchError: the folder cannot be written, or Slurm refuses the job.
    """
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        job.folder.chmod(0o700)  # submitit's pickles: who can write them can run code as this user
        job = replace(job, code=take_snapshot(job.folder, code_sources()))  # of what a file was saved as meanwhile
        job.configs.mkdir(exist_ok=True)
        for index, point in enumerate(points):
            (job.configs / f"{index}.yaml").write_text(_config_text(point), encoding="utf-8")
    except OSError as error:
        raise LaunchError(
            f"{job.folder}: cannot be written: {error.strerror or error}: choose another run.dir"
        ) from None
    record = environment()
    ids = _submit(draw_executor(job, name), [[str(job.configs / f"{i}.yaml"), *options] for i in range(len(points))])
    record_environment(job.folder / f"environment-{ids[0].partition('_')[0]}.json", record)
    for point, job_id in zip(points, ids, strict=True):
        note_job(point.run_dir, job_id, job.request.name or name)
    return ids


def _submit(executor: Executor, arguments: Sequence[list[str]]) -> list[str]:
    try:
        # submitit prints to stderr what it raises as well.
        with _outside_any_job(), contextlib.redirect_stderr(io.StringIO()):
            if len(arguments) == 1:
                return [str(executor.submit(train_in_task, arguments[0]).job_id)]
            return [str(job.job_id) for job in executor.map_array(train_in_task, arguments)]
    except FailedJobError as error:
        refusal = [line for line in str(error).splitlines() if line.strip()][-1]
        raise LaunchError(f"Slurm takes no job: {refusal}; look at the script with --dry-run") from None


@contextlib.contextmanager
def _outside_any_job() -> Iterator[None]:
    """Without the variables of a job around this process, which sbatch and the new job would take for their own."""
    inside = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith(OF_THE_JOB_AROUND) and not name.startswith(OF_THE_CLUSTER)
    }
    try:
        yield
    finally:
        os.environ.update(inside)


def _config_text(point: Point) -> str:
    return yaml.safe_dump(point.config.model_dump(mode="json"), sort_keys=False)
