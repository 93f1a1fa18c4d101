"""What a job asks of the cluster: the options of submit.py, over the defaults of a cluster and of a site."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, StringConstraints, ValidationError

from vitscale.config.load import PlainLoader, read_yaml, validate
from vitscale.config.section import AboveZero, Count, Positive, Section
from vitscale.errors import LaunchError

CLUSTERS = Path(__file__).parents[1] / "configs" / "cluster"
SITE_FILE = Path("~/.config/vitscale/site.yaml")
LAST_CALL_S = 60
"""Before its time limit, at which a job whose ranks still run is requeued: enough for a slow controller."""

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def time_limit_min(text: str) -> int:
    """Minutes, rounded up, of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ValueError: it is none, or no time at all.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError("is no time: write minutes (90), H:MM:SS (1:30:00) or D-HH:MM (2-12:00)")
    days, *fields = found.groups()
    numbers = [int(field) for field in fields if field is not None]
    # With days, or with three numbers, the first is hours; otherwise minutes.
    units_s = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    if any(number >= 60 for number in numbers[1:]):
        raise ValueError("is no time: minutes and seconds after a colon end at 59")
    total_s = int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units_s, strict=False))
    if total_s == 0:
        raise ValueError("is no time to train in: write minutes (90), H:MM:SS (1:30:00) or D-HH:MM (2-12:00)")
    return -(-total_s // 60)


def _time_limit(text: str) -> str:
    time_limit_min(text)
    return text


def _memory(text: str) -> str:
    if re.fullmatch(r"[1-9]\d*[KMGT]B?", text) is None:
        raise ValueError("is no amount of memory: write a whole number and its unit, such as 200GB")
    return text


Line = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\n]*$")]


class JobRequest(Section):
    """A job as Slurm is asked for it. Every field is an option of submit.py and a key of a cluster or site file."""

    nodes: Positive = 1
    """Machines to train on."""
    min_nodes: Positive | None = None
    """Start on as few where no more are free; as many as --nodes when left out."""
    spare_nodes: Count = 0
    """Machines asked for beyond --nodes, to take the place of broken and slow ones."""
    tasks_per_node: Positive | None = None
    """Ranks on each machine; one for each GPU when left out."""
    gpus_per_node: Positive | None = None
    """GPUs of each machine; none on CPUs."""
    cpus_per_task: Positive | None = None
    """Cores of each rank: loader workers + 1."""
    mem: Annotated[str, AfterValidator(_memory)] | None = None
    """Memory of each machine, such as 200GB."""
    partition: Line | None = None
    """Slurm partition."""
    account: Line | None = None
    """Slurm account."""
    qos: Line | None = None
    """Slurm quality of service."""
    constraint: Line | None = None
    """Features that the machines must have."""
    exclude: Line | None = None
    """Machines to stay away from, such as node[07,12]."""
    dependency: Line | None = None
    """Jobs to wait for, such as afterok:123."""
    time: Annotated[str, AfterValidator(_time_limit)] = "1-00:00:00"
    """Time limit: minutes, H:MM:SS or D-HH:MM."""
    signal_delay_s: Positive = 300
    """Seconds before the time limit at which the ranks are told to checkpoint."""
    max_timeouts: Count = 100
    """Restarts at the time limit, after which the job ends; preemptions and lost nodes do not count."""
    name: Line | None = None
    """Name of the job; that of the run directory when left out."""
    comment: Line | None = None
    """Words for the record of the job."""
    env_setup: tuple[Line, ...] = ()
    """A line of shell before everything else, such as 'module load cuda'; may be given again."""
    container: Line | None = None
    """Image to run in; vitscale's dependencies are in it."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What runs the image: Slurm's plugin pyxis, or apptainer."""
    container_mounts: tuple[Line, ...] = ()
    """A folder that the container sees beside the working and the run directory; may be given again."""
    container_python: Line = "python3"
    """Python in the image."""
    hbm_gb: AboveZero | None = None
    """Memory of a GPU in GB: a run whose plan needs more is refused."""
    preflight: bool = True
    """Whether nodes, shards, disk and network are checked before the training starts."""

    @property
    def ranks_per_node(self) -> int:
        """Tasks on each machine."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def fewest_nodes(self) -> int:
        """Machines that the job may start on."""
        return self.min_nodes or self.nodes

    @property
    def most_nodes(self) -> int:
        """Machines that are asked for."""
        return self.nodes + self.spare_nodes


def draw_request(
    flags: Mapping[str, Any], cluster: str | None = None, clusters: Path = CLUSTERS, site_file: Path = SITE_FILE
) -> JobRequest:
    """A request by its flags, over the file of `cluster`, over the site's, over what is built in.

    Args:
        flags: fields of JobRequest that the command line gives.
        cluster: name of a file in `clusters`, without .yaml.
        clusters: the folder of the clusters' files.
        site_file: the user's own, which need not be there.

    Raises:
        LaunchError: a flag is wrong, no such cluster is known, or what is asked for contradicts itself.
        ConfigError: a file cannot be used.
    """
    tree: dict[str, Any] = {}
    if (site := site_file.expanduser()).exists():
        tree |= read_defaults(site)
    if cluster is not None:
        file = clusters / f"{cluster}.yaml"
        if not file.exists():
            known = ", ".join(sorted(path.stem for path in clusters.glob("*.yaml"))) or "none"
            raise LaunchError(f"--cluster {cluster}: no {file}; there are: {known}")
        tree |= read_defaults(file)
    try:
        JobRequest.model_validate(flags)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        told = problem["msg"].removeprefix("Value error, ")
        joint = " " if told.startswith("is ") else ": "
        raise LaunchError(f"{flag(name)} {problem['input']}{joint}{told}") from None
    request = JobRequest.model_validate(tree | dict(flags))
    _check(request)
    return request


def read_defaults(file: Path) -> dict[str, Any]:
    """What a cluster's or site's file gives.

    Raises:
        ConfigError: it is no YAML, or holds a key or a value that no request has.
    """
    tree = read_yaml(file, PlainLoader)  # 1:30:00 is a time here; YAML itself would make 5400 of it
    given = validate(JobRequest, tree, source=str(file))
    return given.model_dump(include=set(tree))


def flag(field: str) -> str:
    """The option that gives a field of JobRequest; units stand in the help."""
    return "--" + re.sub("_(s|gb)$", "", field).replace("_", "-")


def _check(request: JobRequest) -> None:
    """What one value alone does not show.

    Raises:
        LaunchError: two of them contradict each other.
    """
    gpus, tasks = request.gpus_per_node, request.ranks_per_node
    if gpus is not None and gpus != tasks:
        raise LaunchError(
            f"--gpus-per-node {gpus} with --tasks-per-node {tasks}: a rank uses one GPU, give both the same number"
        )
    if request.fewest_nodes > request.nodes:
        raise LaunchError(f"--min-nodes {request.min_nodes} is more than --nodes {request.nodes}: swap the two")
    if not request.preflight and (request.min_nodes is not None or request.spare_nodes):
        raise LaunchError(
            "--no-preflight with --min-nodes or --spare-nodes: the preflight chooses the nodes, leave one of them out"
        )
    if request.signal_delay_s <= LAST_CALL_S:
        raise LaunchError(
            f"--signal-delay {request.signal_delay_s}: {LAST_CALL_S} s before its limit the job is requeued as it is, "
            "give the ranks more to checkpoint in"
        )
    if request.signal_delay_s >= 60 * time_limit_min(request.time):
        raise LaunchError(
            f"--signal-delay {request.signal_delay_s} is no less than --time {request.time}: the job would be told to "
            "stop as it starts, give it more time"
        )
