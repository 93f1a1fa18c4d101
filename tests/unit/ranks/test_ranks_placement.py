"""Placement from recorded environments: environments.json says what started each rank, and what there is to tell."""

import itertools
import json
from pathlib import Path

import pytest

from vitscale.errors import LaunchError
from vitscale.ranks.placement import LAUNCHER_KEYS, MPI_KEYS, SLURM_KEYS, Placement, read_placement

RECORDED = json.loads(Path(__file__).with_name("environments.json").read_text())
TORCHRUN = RECORDED["torchrun, two nodes"]["environ"]
DEEPSPEED = RECORDED["deepspeed by hostfile"]["environ"]
OPEN_MPI = RECORDED["Open MPI, two nodes"]["environ"]
SLURM = RECORDED["Slurm"]["environ"]


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_environment(name):
    assert read_placement(RECORDED[name]["environ"]) == Placement(**RECORDED[name]["placement"])


def test_all_slurm_tasks_of_a_step_meet_at_one_address():
    other = {**SLURM, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    first, last = read_placement(other), read_placement(SLURM)
    assert first.local_rank == 1
    assert (first.master_addr, first.master_port) == (last.master_addr, last.master_port)


def test_slurm_port_moves_with_job_step_and_restart():
    changes = itertools.product(("2", "3"), ("0", "1"), ("0", "1", "2"))
    ports = {
        read_placement(
            {**SLURM, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": restarts}
        ).master_port
        for job, step, restarts in changes
    }
    assert len(ports) == 12
    assert all(20000 <= port < 30000 for port in ports)
    assert read_placement({**SLURM, "SLURM_RESTART_COUNT": "0"}) == read_placement(SLURM)


def test_odd_host_lists():
    odd = {
        "SLURM_STEP_NODELIST": "rack2n[08-09],node[01-03,7]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x5),1",
        "SLURM_NODEID": "5",
    }
    placement = read_placement({**SLURM, **odd})
    assert (placement.master_addr, placement.second_host, placement.local_world_size) == ("rack2n08", "rack2n09", 1)
    alone = read_placement(
        {**SLURM, "SLURM_STEP_NODELIST": "n7", "SLURM_STEP_TASKS_PER_NODE": "6", "SLURM_NODEID": "0"}
    )
    assert (alone.master_addr, alone.second_host, alone.spans_nodes) == ("n7", None, False)
    assert placement.spans_nodes


@pytest.mark.parametrize("environ", [TORCHRUN, OPEN_MPI])
@pytest.mark.parametrize(("given", "address"), [("fd00::1", "fd00::1"), ("[fd00::1]", "fd00::1"), ("n1.x", "n1.x")])
def test_addresses_of_ipv6_have_no_brackets(environ, given, address):
    assert read_placement({**environ, "MASTER_ADDR": given}).master_addr == address


@pytest.mark.parametrize("key", [*LAUNCHER_KEYS, "LOCAL_WORLD_SIZE"])
def test_half_set_launcher_environment(key):
    environ = {k: v for k, v in TORCHRUN.items() if k != key}
    with pytest.raises(LaunchError, match=rf"not {key}: start with torchrun or deepspeed"):
        read_placement(environ)


@pytest.mark.parametrize("key", [MPI_KEYS[0][1], MPI_KEYS[0][3]])
def test_half_set_mpi_environment(key):
    environ = {k: v for k, v in OPEN_MPI.items() if k != key}
    with pytest.raises(
        LaunchError, match=rf"^OMPI_COMM_WORLD_RANK is set but not {key}: start .* with mpirun, or unset it"
    ):
        read_placement(environ)


def test_mpirun_on_several_nodes_must_tell_where_rank_0_is():
    environ = {k: v for k, v in OPEN_MPI.items() if k != "MASTER_ADDR"}
    with pytest.raises(
        LaunchError, match=r"give them MASTER_ADDR, the first node \(Open MPI: -x MASTER_ADDR=node1; MPICH"
    ):
        read_placement(environ)


@pytest.mark.parametrize("key", SLURM_KEYS)
def test_half_set_slurm_environment(key):
    with pytest.raises(LaunchError, match=rf"SLURM_STEP_ID is set but not {key}: start the ranks with srun"):
        read_placement({k: v for k, v in SLURM.items() if k != key})


# What rank 0 of `printf 'vsn3\nvsn2\n' >SLURM_HOSTFILE; srun -n2 --distribution=arbitrary` saw.
MISORDERED = {"SLURM_NODEID": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "vsn[2-3]"}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({**TORCHRUN, "RANK": "one"}, r"RANK='one' is not a whole number"),
        ({**TORCHRUN, "RANK": "4"}, r"rank 4 of 4 .* cannot be: unset the variables RANK"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, r"on the node 2 of 2\) cannot be"),
        ({**DEEPSPEED, "LOCAL_SIZE": "9"}, r"on the node 0 of 9\) cannot be"),
        ({**SLURM, "SLURM_NODEID": "3"}, r"^SLURM_NODEID=3 does not go with SLURM_STEP_NODELIST='vsn\[1-3\]' and "),
        (
            {**SLURM, "SLURM_STEP_NODELIST": "vsn1"},
            r"does not go with SLURM_STEP_NODELIST='vsn1' and SLURM_STEP_T.*2\(x3\)",
        ),
        (
            {**SLURM, **MISORDERED, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            r"^rank 0 is on vsn3, where the others look for it on vsn2: name the hosts in SLURM_HOSTFILE in",
        ),
    ],
)
def test_impossible_values(environ, message):
    with pytest.raises(LaunchError, match=message) as caught:
        read_placement(environ)
    assert "\n" not in str(caught.value)
