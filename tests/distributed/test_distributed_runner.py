"""The runner that all distributed tests rest on."""

import os
import signal
import sys
import time
from multiprocessing import Process

import deepspeed
import psutil
import pytest
import torch
import torch.distributed as dist
from distributed_runner import PRELOAD, run_distributed_test


def gather(rank, world_size, scale):
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return {
        "scaled": torch.tensor([rank * scale]),
        "total": total,
        "environment": [int(os.environ[name]) for name in names],
        "backend": dist.get_backend(),
        "world_size": world_size,
        "threads": torch.get_num_threads(),
    }


def test_values_come_back_by_rank():
    results = run_distributed_test(gather, 3, 10.0)
    for rank, result in enumerate(results):
        assert result == {
            "scaled": torch.tensor([rank * 10.0]),
            "total": torch.tensor([3.0]),
            "environment": [rank, rank, 3, 3],
            "backend": "gloo",
            "world_size": 3,
            "threads": 1,
        }


def fail_each_in_its_own_way(rank, world_size):
    dist.barrier()  # a rank that leaves while others still connect gives them another fault
    if rank == 1:
        raise ValueError("the first of two faults")
    if rank == 2:
        raise KeyError("the second of two faults")
    return rank


def test_the_errors_of_all_ranks_are_shown():
    with pytest.raises(pytest.fail.Exception) as failure:
        run_distributed_test(fail_each_in_its_own_way, 3)
    text = str(failure.value)
    assert "---- rank 1 ----\nTraceback" in text
    assert "ValueError: the first of two faults" in text
    assert "---- rank 2 ----\nTraceback" in text
    assert "KeyError: 'the second of two faults'" in text
    assert "rank 0" not in text


def hang_but_for_rank_1(rank, world_size, folder):
    child = Process(target=time.sleep, args=(600,), daemon=True)
    child.start()
    (folder / f"{rank}").write_text(f"{os.getpid()} {child.pid}")
    if rank != 1:
        time.sleep(600)
    child.kill()


def test_a_hang_ends_in_a_failure_that_names_the_ranks_and_leaves_no_process(tmp_path):
    started_s = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"still running after 4 s, killed: rank 0, 2$"):
        run_distributed_test(hang_but_for_rank_1, 3, tmp_path, timeout_s=4)
    assert time.monotonic() - started_s < 15
    pids = [int(pid) for rank in range(3) for pid in (tmp_path / f"{rank}").read_text().split()]
    assert len(pids) == 6
    gone_by_s = time.monotonic() + 5
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < gone_by_s, alive
        time.sleep(0.05)


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def die_at_once(rank, world_size):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_killed_rank_is_told_with_its_exit_code():
    with pytest.raises(pytest.fail.Exception) as failure:
        run_distributed_test(die_at_once, 2)
    assert "---- rank 1 ----\nended without a result, exit code" in str(failure.value)
    assert "---- rank 0 ----\nTraceback" in str(failure.value)


def start_by_itself(rank, world_size):
    before = dist.is_initialized()
    dist.init_process_group("gloo")
    ranks = [None] * world_size
    dist.all_gather_object(ranks, rank)
    return before, ranks


def test_a_function_may_start_the_process_group_itself():
    assert run_distributed_test(start_by_itself, 2, init=False) == [(False, [0, 1])] * 2


def imported_beforehand(rank, world_size):
    return set(PRELOAD) - set(sys.modules), os.environ["DS_ACCELERATOR"], os.getppid()


def test_ranks_of_one_session_are_forked_from_one_server_that_has_imported_what_takes_long():
    first = run_distributed_test(imported_beforehand, 2)
    second = run_distributed_test(imported_beforehand, 1)
    assert all(result[:2] == (set(), "cpu") for result in first + second)
    assert len({server for _, _, server in first + second}) == 1


def zero_step(rank, world_size):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_batch_size": 2 * world_size,
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        },
    )
    loss = engine(torch.full((2, 4), float(rank))).pow(2).mean()
    engine.backward(loss)
    engine.step()
    return model.weight.detach().clone()


def test_deepspeed_works_in_a_forked_rank():
    weights = run_distributed_test(zero_step, 2)
    torch.manual_seed(0)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], torch.nn.Linear(4, 1).weight)
