"""Which rank this process is, and where rank 0 is met: one pure function of the environment.

Ranks are started by torchrun, by the deepspeed launcher, by the mpirun of Open MPI, MPICH or Intel MPI, as the tasks
of a Slurm step, or as one process alone. `read_placement` tells these apart; no other code of vitscale reads their
environment variables.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vitscale.errors import LaunchError
from vitscale.ranks.hosts import expand_counts, expand_hosts

LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPI_KEYS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # Hydra: MPICH and Intel MPI
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # PALS: Cray's
)
"""By MPI the names of rank, world size, local rank and local world size. Slurm's PMI sets the first two alone."""
SLURM_KEYS = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_JOB_ID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
)
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # Slurm numbers the batch script, an interactive shell and the like from here
FIRST_PORT, PORTS = 20000, 10000  # below the ports that Linux gives to outgoing connections
MPI_PORT = 29500  # torch's and DeepSpeed's own choice


@dataclass(frozen=True)
class Placement:
    """Where one rank stands in its run, and where rank 0 is met. Port 0 stands for any free one."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    second_host: str | None = None
    """A host of the run beside rank 0's, where the launcher tells one."""

    @property
    def spans_nodes(self) -> bool:
        """Whether some rank of the run is on another node than this one."""
        return self.local_world_size < self.world_size


ALONE = Placement(rank=0, world_size=1, local_rank=0, local_world_size=1, master_addr="127.0.0.1", master_port=0)


def read_placement(environ: Mapping[str, str]) -> Placement:
    """Tell the rank's place from environment variables: a launcher's, else MPI's, else a Slurm step's, else alone.

    A launcher's come first, because torchrun may itself run in a Slurm task; then those of MPI, whose mpirun starts
    its daemons as Slurm tasks.

    Raises:
        LaunchError: some of the variables are missing, no numbers, or contradict each other.
    """
    mpi_keys = next((keys for keys in MPI_KEYS if keys[0] in environ and keys[2] in environ), None)
    if any(key in environ for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        placement = _read_launcher(environ)
    elif mpi_keys is not None:
        placement = _read_mpi(environ, mpi_keys)
    elif _in_slurm_task(environ):
        placement = _read_slurm(environ)
    else:
        return ALONE
    if not 0 <= placement.rank < placement.world_size or not (
        0 <= placement.local_rank < placement.local_world_size <= placement.world_size
    ):
        raise LaunchError(
            f"rank {placement.rank} of {placement.world_size} (on the node {placement.local_rank} of "
            f"{placement.local_world_size}) cannot be: unset the variables {', '.join(LAUNCHER_KEYS)} "
            "that an earlier launch left in the environment"
        )
    return placement


def _read_launcher(environ: Mapping[str, str]) -> Placement:
    missing = [key for key in LAUNCHER_KEYS if key not in environ]
    # torchrun's name for it, then the deepspeed launcher's
    local_world_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environ else "LOCAL_SIZE"
    if local_world_size not in environ:
        missing.append("LOCAL_WORLD_SIZE")
    if missing:
        present = [key for key in LAUNCHER_KEYS if key in environ]
        raise LaunchError(
            f"{' and '.join(present)} set in the environment but not {' and '.join(missing)}: "
            "start with torchrun or deepspeed, which set them all, or unset them to run alone"
        )
    return Placement(
        rank=_number(environ, "RANK"),
        world_size=_number(environ, "WORLD_SIZE"),
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=_number(environ, local_world_size),
        master_addr=_bare(environ["MASTER_ADDR"]),
        master_port=_number(environ, "MASTER_PORT"),
    )


def _read_mpi(environ: Mapping[str, str], keys: tuple[str, str, str, str]) -> Placement:
    missing = [key for key in keys if key not in environ]
    if missing:
        raise LaunchError(f"{keys[0]} is set but not {' and '.join(missing)}: start the ranks with mpirun, or unset it")
    rank, world_size, local_rank, local_world_size = (_number(environ, key) for key in keys)
    if "MASTER_ADDR" not in environ and local_world_size < world_size:
        raise LaunchError(
            "mpirun does not tell the ranks of several nodes where rank 0 is: give them MASTER_ADDR, the first node "
            "(Open MPI: -x MASTER_ADDR=node1; MPICH and Intel MPI: -genv MASTER_ADDR node1)"
        )
    return Placement(
        rank,
        world_size,
        local_rank,
        local_world_size,
        master_addr=_bare(environ.get("MASTER_ADDR", "127.0.0.1")),
        master_port=_number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else MPI_PORT,
    )


def _in_slurm_task(environ: Mapping[str, str]) -> bool:
    # SLURM_PROCID is set in the batch script too, where nothing has been started by srun yet.
    return "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_ID") < FIRST_SPECIAL_STEP


def _read_slurm(environ: Mapping[str, str]) -> Placement:
    missing = [key for key in SLURM_KEYS if key not in environ]
    if missing:
        raise LaunchError(
            f"SLURM_STEP_ID is set but not {' and '.join(missing)}: start the ranks with srun, "
            "and pass its environment on to them, or unset SLURM_STEP_ID to run alone"
        )
    nodelist, tasks_per_node = environ["SLURM_STEP_NODELIST"], environ["SLURM_STEP_TASKS_PER_NODE"]
    hosts, counts = expand_hosts(nodelist), expand_counts(tasks_per_node)
    rank, node = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NODEID")
    if not 0 <= node < len(hosts) == len(counts):
        raise LaunchError(
            f"SLURM_NODEID={node} does not go with SLURM_STEP_NODELIST={nodelist!r} and "
            f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r}: start the ranks with srun"
        )
    # Every distribution begins on the first host, but for an arbitrary one whose SLURM_HOSTFILE has another order.
    if rank == 0 and node != 0:
        raise LaunchError(
            f"rank 0 is on {hosts[node]}, where the others look for it on {hosts[0]}: "
            f"name the hosts in SLURM_HOSTFILE in the order of {nodelist}"
        )
    # A requeued job keeps its id; the old run's socket may still be there.
    attempt = _number(environ, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environ else 0
    port_seed = 101 * _number(environ, "SLURM_JOB_ID") + 11 * _number(environ, "SLURM_STEP_ID") + attempt
    return Placement(
        rank=rank,
        world_size=_number(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=counts[node],
        master_addr=hosts[0],
        master_port=FIRST_PORT + port_seed % PORTS,
        second_host=hosts[1] if len(hosts) > 1 else None,
    )


def _bare(address: str) -> str:
    """An IPv6 address without the brackets that it has in front of a port."""
    return address.removeprefix("[").removesuffix("]")


def _number(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except ValueError:
        raise LaunchError(f"{key}={environ[key]!r} is not a whole number: unset it, or start with a launcher") from None
