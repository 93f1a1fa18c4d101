"""ranks: placement from recorded environments, and the group of one that a process makes alone."""

import itertools
import json
import os
import socket
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from vitscale import ranks
from vitscale.errors import LaunchError
from vitscale.ranks import ALONE, Placement, choose_device, first_host, read_placement

# What `torchrun --nproc-per-node 2` gave to rank 1, less what has nothing to do with placement.
TORCHRUN = {
    "LOCAL_RANK": "1",
    "RANK": "1",
    "GROUP_RANK": "0",
    "ROLE_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "41465",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
# What `deepspeed --num_gpus 2` gave to rank 1.
DEEPSPEED = {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "LOCAL_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
}
# What a batch script of Slurm 22.05 saw, for 2 nodes with 2 tasks each.
SLURM_BATCH = {
    "SLURM_JOB_ID": "2",
    "SLURM_JOB_NODELIST": "vsn[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
# What `srun --ntasks=3` in that script gave to its last task: the step is smaller than the job.
SLURM_TASK = {
    **SLURM_BATCH,
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "vsn[1-2]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_TASKS_PER_NODE": "2,1",
}


def test_torchrun_rank():
    assert read_placement(TORCHRUN) == Placement(1, 2, 1, 2, "127.0.0.1", 41465)


def test_deepspeed_rank():
    assert read_placement(DEEPSPEED) == Placement(1, 2, 1, 2, "127.0.0.1", 29500)


def test_slurm_task():
    placement = read_placement(SLURM_TASK)
    assert (placement.rank, placement.world_size) == (2, 3)
    assert (placement.local_rank, placement.local_world_size) == (0, 1)
    assert placement.master_addr == "vsn1"


def test_all_slurm_tasks_of_a_step_meet_at_one_address():
    other = {**SLURM_TASK, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    first, last = read_placement(other), read_placement(SLURM_TASK)
    assert (first.local_rank, first.local_world_size) == (1, 2)
    assert (first.master_addr, first.master_port) == (last.master_addr, last.master_port)


def test_slurm_port_moves_with_job_step_and_restart():
    changes = itertools.product(("2", "3"), ("0", "1"), ("0", "1", "2"))
    ports = {
        read_placement(
            {**SLURM_TASK, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": restarts}
        ).master_port
        for job, step, restarts in changes
    }
    assert len(ports) == 12
    assert all(20000 <= port < 30000 for port in ports)
    assert read_placement({**SLURM_TASK, "SLURM_RESTART_COUNT": "0"}) == read_placement(SLURM_TASK)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MASTER_ADDR": "somewhere", "MASTER_PORT": "1234"},
        SLURM_BATCH,
        {**SLURM_BATCH, "SLURM_STEP_ID": str(0xFFFFFFFA)},  # the interactive shell that salloc opens
    ],
    ids=["empty", "address only", "batch script", "interactive step"],
)
def test_alone(environ):
    assert read_placement(environ) == ALONE


def test_launcher_wins_over_slurm():
    assert read_placement({**SLURM_TASK, **TORCHRUN}) == read_placement(TORCHRUN)


@pytest.mark.parametrize("key", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"])
def test_half_set_launcher_environment(key):
    environ = {k: v for k, v in TORCHRUN.items() if k != key}
    with pytest.raises(LaunchError, match=rf"not {key}: start with torchrun or deepspeed"):
        read_placement(environ)


@pytest.mark.parametrize("key", ranks.SLURM_KEYS)
def test_half_set_slurm_environment(key):
    with pytest.raises(LaunchError, match=rf"SLURM_STEP_ID is set but not {key}: start the ranks with srun"):
        read_placement({k: v for k, v in SLURM_TASK.items() if k != key})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({**TORCHRUN, "RANK": "one"}, r"RANK='one' is not a whole number"),
        ({**TORCHRUN, "RANK": "2"}, r"rank 2 of 2 .* cannot be: unset the variables RANK"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, r"on the node 2 of 2\) cannot be"),
        ({**SLURM_TASK, "SLURM_STEP_TASKS_PER_NODE": "two"}, r"SLURM_STEP_TASKS_PER_NODE='two' is no task count"),
        ({**SLURM_TASK, "SLURM_NODEID": "2"}, r"SLURM_NODEID=2, but .* counts 2 nodes"),
    ],
)
def test_impossible_values(environ, message):
    with pytest.raises(LaunchError, match=message) as caught:
        read_placement(environ)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("vsn1", "vsn1"),
        ("vsn[1-2]", "vsn1"),
        ("node[01-03,7],gpu4", "node01"),
        ("gpu4,node[01-03]", "gpu4"),
        ("rack[2-3]node[008,11]", "rack2node008"),
        ("a-b[7]-ib,c", "a-b7-ib"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_tasks_per_node_in_slurms_short_form(counts):
    groups = [(count, len(list(group))) for count, group in itertools.groupby(counts)]
    short = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in groups)
    for node, count in enumerate(counts):
        environ = {**SLURM_TASK, "SLURM_STEP_TASKS_PER_NODE": short, "SLURM_NODEID": str(node)}
        assert read_placement(environ).local_world_size == count


def test_device():
    assert choose_device(3, gpus=0) == torch.device("cpu")
    assert choose_device(3, gpus=4) == torch.device("cuda", 3)
    with pytest.raises(LaunchError, match=r"LOCAL_RANK 4 has no GPU, the node shows 4: start at most 4 ranks"):
        choose_device(4, gpus=4)


@pytest.fixture
def alone():
    """A group of one, in an environment that is put back afterwards."""
    with mock.patch.dict(os.environ):
        joined = ranks.start()
        yield joined
        ranks.stop()


def test_group_of_one(alone):
    assert (alone.rank, alone.world_size, alone.is_main) == (0, 1, True)
    assert dist.is_initialized()
    assert [alone.any(True), alone.any(False)] == [True, False]
    given_tensor = torch.tensor([1.0, 2.0])
    total = alone.sum(given_tensor)
    total += 1  # the caller's tensor is another one
    assert given_tensor.tolist() == [1.0, 2.0]
    assert alone.broadcast_object({"a": 1}) == {"a": 1}
    alone.barrier()
    assert {key: os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }


TWO_RANKS = """
import json, torch
from vitscale import ranks

me = ranks.start(timeout_s=60)
me.barrier()
votes = [me.any(False), me.any(me.rank == 1), me.any(True)]
total = me.sum(torch.tensor([1.0 + me.rank, 10.0]))
print(json.dumps([me.rank, me.is_main, votes, total.tolist(), me.broadcast_object(f"from {me.rank}")]))
ranks.stop()
"""


def test_two_ranks_agree():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS],
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    seen = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert seen == [
        [0, True, [False, True, True], [3.0, 20.0], "from 0"],
        [1, False, [False, True, True], [3.0, 20.0], "from 0"],
    ]
