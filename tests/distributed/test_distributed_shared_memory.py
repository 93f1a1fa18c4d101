"""DeepSpeed's collective for ranks of one machine leaves no file behind when a rank is killed."""

import os
from pathlib import Path

import deepspeed
import torch
from distributed_runner import run_distributed_test
from engine_cases import build, train


def _train_and_look(rank, world_size):
    os.environ["LOCAL_SIZE"] = str(world_size)  # as the deepspeed launcher does; without it DeepSpeed goes over gloo
    engine = build("deepspeed", 2, rank, world_size)
    mapped = "deepspeed_allreduce_buffer" in Path("/proc/self/maps").read_text()
    named = [path.name for path in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_{rank}")]
    ones = torch.ones(8)
    deepspeed.comm.all_reduce(ones)
    return mapped, named, ones.tolist(), len(train(engine, range(2), rank, world_size))


def test_deepspeeds_buffers_work_without_a_name():
    assert run_distributed_test(_train_and_look, 2) == [(True, [], [2.0] * 8, 2)] * 2
