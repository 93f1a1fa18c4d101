"""The lines of a job's batch script around submitit's srun, as text.

The decision about another try stands in the script, and not in a rank, because the script outlives all ranks: a killed
rank 0 is requeued like any other. Its words are bash, which is there when a broken file system has taken Python away.
"""

import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

from job_request import LAST_CALL_S, JobRequest

from vitscale.errors import EXIT_FILE_VARIABLE, ExitStatus

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NO_OTHER_TRY = (ExitStatus.FINISHED, ExitStatus.USER_ERROR, ExitStatus.DIVERGED)
UNSTARTED_LIMIT = 10
"""Starts in a row that never reach the training. From there on the trainer itself counts, and ends fruitless ones."""
PREFLIGHT_LIMIT_S = 600
"""What its parts take together at most, the start of Python on all nodes among them."""
TOLD_TO_STOP = " | ".join(str(128 + signum) for signum in (signal.SIGUSR2, signal.SIGTERM))
"""Statuses of a step whose ranks had no handler yet when the signal came."""
REQUEUE_TRIES = 60
"""At 10 s, and some more in which Slurm's commands wait for an answer."""
# Slurm sends the signal up to this much earlier than asked, and whole seconds go into rounding.
SIGNAL_SLACK_S = 65


@dataclass(frozen=True)
class Job:
    """A request, and where what it needs lies. All paths are absolute."""

    request: JobRequest
    folder: Path
    """RUN/slurm."""
    code: Path
    """The copy of the code."""
    configs: Path
    """A folder with the resolved configs of all points: 0.yaml, 1.yaml, ..."""
    run_dirs: tuple[Path, ...]
    """Run directories of all points."""
    workdir: Path
    """Where relative paths of the config begin."""
    python: str
    """The interpreter outside a container."""

    @property
    def mounts(self) -> list[str]:
        """What a container sees of the file system: also where links lead, which it cannot follow by itself."""
        named = [self.workdir, self.folder, *self.run_dirs]
        folders = [*named, *(path.resolve() for path in named)]
        outermost = [path for path in folders if not any(other in path.parents for other in folders)]
        return list(dict.fromkeys([*map(str, outermost), *self.request.container_mounts]))


def python_command(job: Job) -> str:
    """How Python is started in a task, as shell words."""
    request = job.request
    if request.container is None:
        return shlex.quote(job.python)
    if request.container_runtime == "apptainer":
        binds = ",".join(job.mounts)
        words = ["apptainer", "exec", "--nv", "--bind", binds, "--pwd", str(job.workdir), request.container]
        return shlex.join([*words, request.container_python])
    return shlex.quote(request.container_python)


def srun_arguments(job: Job) -> list[str]:
    """Options of the srun that starts the ranks."""
    return [
        "--open-mode=append",  # a requeued job goes on with the log it has
        "--kill-on-bad-exit=0",  # the first rank that ends with 75 must not cost the others their last writes
        "--wait=1800",  # but ranks that hang after another's end are killed; rank 0's last upload may take 1500 s
        *_step_arguments(job),
    ]


def setup_lines(job: Job) -> list[str]:
    """Lines before srun: environment, preflight, choice of nodes."""
    request = job.request
    element = "${SLURM_ARRAY_TASK_ID:-0}"
    return [
        "# Left over from another launch, these would count more than what Slurm says of a rank.",
        f"unset {' '.join(LAUNCHER_VARIABLES)}",
        *request.env_setup,
        "# A shell that ends at the first fault would end before the job is requeued.",
        "set +eu +o pipefail",
        "trap - ERR EXIT",
        "",
        "# A job may wait for long. It runs the code and the config as they were when it was submitted.",
        f"export PYTHONPATH={_quote(job.code)}:{_quote(job.code / 'launch')}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1  # or the code of the working directory would come first",
        f"config={_quote(job.configs)}/{element}.yaml",
        f"run_dirs=({' '.join(map(_quote, job.run_dirs))})",
        f"run_dir=${{run_dirs[{element}]}}",
        "# The id of an array's last element is that of the array: requeue would take it for all of them.",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        f"attempt={_quote(job.folder)}/preflight/$job.${{SLURM_RESTART_COUNT:-0}}",
        'mkdir -p "$attempt"',
        f"export {EXIT_FILE_VARIABLE}=$attempt/exit.json",
        'generation=$(cat "$run_dir/generation" 2>/dev/null)',
        "# Of this job's earlier starts. Read once: the ranks' end and the timer below may both come to `finish`.",
        f"timeouts=0 unstarted=0 counts={_quote(job.folder)}/restarts-$job",
        '[ ! -e "$counts" ] || . "$counts"',
        "",
        *_questions(),
        "",
        *_finish(job),
        "",
        *_timer(),
        *(_preflight(job) if request.preflight else ()),
    ]


def end_lines() -> list[str]:
    """Lines after srun."""
    return ["finish $?"]


def _quote(path: Path) -> str:
    return shlex.quote(str(path))


def _step_arguments(job: Job) -> list[str]:
    """Options of every srun."""
    request = job.request
    # From 22.05 on srun does not take it from the job.
    arguments = [f"--cpus-per-task={request.cpus_per_task}"] if request.cpus_per_task is not None else []
    if request.container is not None and request.container_runtime == "pyxis":
        mounts = ",".join(f"{folder}:{folder}" for folder in job.mounts)
        arguments += [f"--container-image={request.container}", f"--container-mounts={mounts}"]
        arguments += [f"--container-workdir={job.workdir}"]
    return arguments


def _preflight(job: Job) -> list[str]:
    request, tasks = job.request, job.request.ranks_per_node
    step = _step_arguments(job)
    check = f'{python_command(job)} -m vitscale preflight "$config"'
    # Ranks that are done must not cost the others their talk: --wait=0 is without end, whatever the site's WaitTime is.
    everywhere = ["srun", "--kill-on-bad-exit=0", "--wait=0", f"--ntasks-per-node={tasks}", *step]
    choose = f'{check} --choose "$attempt" --nodes {request.nodes} --min-nodes {request.fewest_nodes} '
    choose += f"--tasks-per-node {tasks}"
    if any(argument.startswith("--container") for argument in step):  # it is no Python of this machine
        choose = f'srun --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" {shlex.join(step)} {choose}'
    return [
        "",
        f'timeout --kill-after=10 {PREFLIGHT_LIMIT_S} {shlex.join(everywhere)} {check} --report "$attempt"',
        "# What a node does not report counts as broken, so of its statuses only a signal's count: the job is to stop.",
        f"case $? in {TOLD_TO_STOP}) finish {ExitStatus.RUN_AGAIN:d} ;; esac",
        choose,
        "status=$?",
        "# Without a verdict something is wrong with this very node.",
        f'[ $status = 0 ] || [ -s "$attempt/report.json" ] || status={ExitStatus.TRANSIENT:d}',
        "[ $status = 0 ] || finish $status",
        "# srun takes these in place of options: the ranks run on the nodes that were chosen, and on no other.",
        'export SLURM_HOSTFILE="$attempt/hosts" SLURM_DISTRIBUTION=arbitrary',
        'export SLURM_NTASKS=$(wc -l <"$SLURM_HOSTFILE")',
    ]


def _questions() -> list[str]:
    """Functions that ask Slurm."""
    count = "for (i = 0; i < NF; i++) s += $(NF - i) * (i < 3 ? 60 ^ i : 86400)"
    return [
        "left() {  # seconds to the time limit; nothing where there is none, or no answer",
        '  squeue --noheader --jobs="$job" --format=%L |',
        f"    awk -F '[-:]' '/^[0-9]/ {{ {count}; print s }}'",
        "}",
        "",
        "overtaken() {  # a node that was cut off may run this script while the job has started anew on another",
        "  known=$(scontrol --oneliner show job \"$job\" 2>/dev/null | sed -n 's/.* Restarts=\\([0-9]*\\).*/\\1/p')",
        '  [ "${known:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]',
        "}",
    ]


def _finish(job: Job) -> list[str]:
    """The function that ends the script with the run's status, requeued where another try may help."""
    request = job.request
    limit_s = request.signal_delay_s + SIGNAL_SLACK_S
    no_other_try = " | ".join(str(int(status)) for status in NO_OTHER_TRY)
    return [
        "finish() {",
        '  kill "$timer" 2>/dev/null  # in the timer itself it is empty',
        "  # Rank 0's word, else the step's status: 128 + the signal where a rank was killed, or the ranks' highest.",
        f'  status=$(sed -n \'s/^{{"status": \\([0-9]*\\),.*/\\1/p\' "${EXIT_FILE_VARIABLE}" 2>/dev/null)',
        "  status=${status:-$1}",
        f"  case $status in {no_other_try}) exit $status ;; esac",
        "  ! overtaken || exit $status",
        "  # By the limit: the end that Slurm gives a preempted job is another.",
        "  left_s=$(left)",
        f'  [ "${{left_s:-{limit_s + 1}}}" -gt {limit_s} ] || timeouts=$((timeouts + 1))',
        f"  case $status in {ExitStatus.RUN_AGAIN:d} | {TOLD_TO_STOP}) ;; *) unstarted=$((unstarted + 1)) ;; esac",
        '  [ "$(cat "$run_dir/generation" 2>/dev/null)" = "$generation" ] || unstarted=0',
        '  echo "timeouts=$timeouts unstarted=$unstarted" >"$counts"',
        f"  if [ $timeouts -gt {request.max_timeouts} ]; then",
        f'    echo "job $job reached its time limit $timeouts times, --max-timeouts is {request.max_timeouts}"',
        "    exit $status",
        "  fi",
        f"  if [ $unstarted -ge {UNSTARTED_LIMIT} ]; then",
        '    echo "job $job did not reach the training in $unstarted starts: see above why"',
        "    exit $status",
        "  fi",
        f"  for try in {{1..{REQUEUE_TRIES}}}; do  # a new controller may take 20 minutes",
        "    ! overtaken || exit $status",
        '    scontrol requeue "$job" && sleep 600  # Slurm ends the script meanwhile',
        '    [ $try -lt 6 ] || [ -z "$known" ] || break  # it answers, and does not want to',
        "    sleep 10",
        "  done",
        "  exit $status",
        "}",
    ]


def _timer() -> list[str]:
    """The same in time, where ranks hang, or save for too long, after the limit's signal."""
    return [
        "# Where ranks hang, or save for too long, the limit would end this script too, and the job as TIMEOUT.",
        "timer=",
        "(",
        f'  while left_s=$(left); [ "${{left_s:-600}}" -gt {LAST_CALL_S} ]; do',
        f"    sleep $((${{left_s:-600}} - {LAST_CALL_S - 5}))",
        "  done",
        f"  finish {ExitStatus.RUN_AGAIN:d}",
        ") &",
        "timer=$!",
    ]
