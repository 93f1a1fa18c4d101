"""Joining and leaving a group, the device of a rank, and the small collectives."""

import os
import socket
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_runner import run_distributed_test
from free_port import free_port

from vitscale.errors import ExitStatus, LaunchError
from vitscale.ranks import groups
from vitscale.ranks.groups import choose_device, promised_gpus


def test_device():
    assert choose_device(3, gpus=0) == torch.device("cpu")
    assert choose_device(3, gpus=4) == torch.device("cuda", 3)
    assert choose_device(3, gpus=4, promised="0,1,2,3") == torch.device("cuda", 3)
    with pytest.raises(
        LaunchError, match=r"LOCAL_RANK 4 has no GPU, the node shows 4: start at most 4 ranks"
    ) as caught:
        choose_device(4, gpus=4)
    assert caught.value.status == ExitStatus.TRANSIENT


def test_a_gpu_that_was_promised_is_not_done_without():
    with pytest.raises(
        LaunchError, match=r"^CUDA_VISIBLE_DEVICES=0,1, but torch sees no GPU: see the driver, and that"
    ):
        choose_device(1, gpus=0, promised="0,1")


@pytest.mark.parametrize(
    ("environ", "promised"),
    [
        ({}, ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "0,1"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1f"}, "MIG-1f"),
        ({"CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ""),  # Slurm's, for a job that asked for no GPU
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_RANK": "0"}, ""),  # deepspeed's, on any machine
    ],
)
def test_who_promises_gpus(environ, promised):
    assert promised_gpus(environ) == promised


@pytest.fixture
def alone():
    """A group of one, in an environment that is put back afterwards."""
    with mock.patch.dict(os.environ):
        joined = groups.start()
        yield joined
        groups.stop()


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


def join_by_mpi(rank, world_size, master, port):
    """A rank that mpirun started, alone on its node."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        del os.environ[key]
    places = {"RANK": rank, "SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
    os.environ.update({f"OMPI_COMM_WORLD_{key}": str(value) for key, value in places.items()})
    os.environ.update(MASTER_ADDR=master, MASTER_PORT=str(port))
    me = groups.start(timeout_s=60)
    me.barrier()
    votes = [me.any(False), me.any(me.rank == 1), me.any(True)]
    total = me.sum(torch.tensor([1.0 + me.rank, 10.0]))
    seen = [me.rank, me.is_main, votes, total.tolist(), me.broadcast_object(f"from {me.rank}")]
    groups.stop()
    return [*seen, os.environ["RANK"], bool(os.environ["GLOO_SOCKET_IFNAME"])]


def test_two_ranks_meet_at_an_ipv6_address_and_agree():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            master, port = "[::1]", probe.getsockname()[1]
    except OSError:  # a container without IPv6
        master, port = "127.0.0.1", free_port()
    assert run_distributed_test(join_by_mpi, 2, master, port, init=False) == [
        [0, True, [False, True, True], [3.0, 20.0], "from 0", "0", True],
        [1, False, [False, True, True], [3.0, 20.0], "from 0", "1", True],
    ]


def talk(rank, world_size):
    me = groups.Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    votes = [me.any_of(rank == other, False, rank != other) for other in range(world_size)]
    sums = [me.sum(torch.tensor([[rank, 2.0**rank]])).tolist(), me.sum(torch.tensor(10**rank)).item()]
    return votes, me.any_of(False, False), me.any(True), sums, me.gather_objects("abc" * rank)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_every_rank_hears_every_other(world_size):
    votes = [[True, False, world_size > 1]] * world_size
    sums = [[[sum(range(world_size)), 2.0**world_size - 1]], int("1" * world_size)]
    words = ["abc" * rank for rank in range(world_size)]
    assert run_distributed_test(talk, world_size) == [(votes, [False, False], True, sums, words)] * world_size
