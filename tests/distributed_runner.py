"""The one way to test distributed code: a function run by several ranks that talk over gloo."""

import contextlib
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from multiprocessing import connection, forkserver
from unittest import mock

import pytest
import torch
import torch.distributed as dist

# A fork server imports these once a session; a rank forked from it starts in milliseconds. All that a rank would import
# itself counts: DeepSpeed's Muon brings in torch's compiler, which takes longer than to train some steps.
PRELOAD = [
    "pytest",
    "hypothesis",
    "torch",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "sklearn.datasets",
    "tensorboard.backend.event_processing.event_accumulator",
    "torch.utils.cpp_extension",
    "vitscale.train.run",
]
# Once a rank has failed, the others get this long to end by themselves and tell their errors.
GRACE_S = 10.0


def run_distributed_test(fn, world_size, *args, timeout_s=120, init=True):
    """Run `fn(rank, world_size, *args)` on every rank and return what the ranks returned, by rank.

    Args:
        fn: a function of a test module, so that the ranks can import it.
        world_size: number of ranks; each is a process of its own with one thread.
        args: anything that can be pickled, as must be what `fn` returns.
        timeout_s: the ranks still running after this time are killed, and the test fails naming them.
        init: whether the process group is up when `fn` is called; if not, `fn` may start it itself, from the
            environment that torchrun would have set.
    """
    context = forkserver_context()
    call = pickle.dumps((fn, args))
    # As under torchrun, the store is not rank 0's: it has its port before any rank looks for it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, readers = [], []
    try:
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            environment = rank_environment(rank, world_size, store.port)
            process = context.Process(target=_run_rank, args=(rank, world_size, call, init, environment, writer))
            process.start()
            writer.close()  # the rank holds the only other end: its death ends the pipe
            processes.append(process)
            readers.append(reader)
        outcomes = _collect(processes, readers, timeout_s)
    finally:
        for process in processes:
            _end(process)
        for reader in readers:
            reader.close()
    errors = {rank: outcome[1] for rank, outcome in outcomes.items() if outcome[0] == "error"}
    running = sorted(set(range(world_size)) - set(outcomes))
    if errors or running:
        pytest.fail(_report(fn, world_size, errors, running, timeout_s), pytrace=False)
    return [outcomes[rank][1] for rank in range(world_size)]


def rank_environment(rank, world_size, store_port):
    """What torchrun sets for a rank of one node, where somebody else holds the store."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store_port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def forkserver_context():
    """Processes forked from a server that has imported all that takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # What the server imports must see these; the test process itself is left as it is.
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


def _run_rank(rank, world_size, call, init, environment, writer):
    os.setsid()  # the rank and its loader workers can be killed as one group
    gc.freeze()  # DeepSpeed collects garbage at stage 3, and what the server imported is none
    os.environ.update(environment)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    try:
        fn, args = pickle.loads(call)
        if init:
            dist.init_process_group("gloo")
        value = fn(rank, world_size, *args)
        if dist.is_initialized():
            dist.destroy_process_group()
        # Pickled here: torch would share a tensor's memory, which goes with the rank.
        outcome = pickle.dumps(("value", value))
    except BaseException:
        outcome = pickle.dumps(("error", traceback.format_exc()))
    writer.send_bytes(outcome)


def _collect(processes, readers, timeout_s):
    """Outcome by rank, ("value", what it returned) or ("error", text), of the ranks that ended in time."""
    outcomes = {}
    deadline_s = time.monotonic() + timeout_s
    while pending := {reader: rank for rank, reader in enumerate(readers) if rank not in outcomes}:
        ready = connection.wait(list(pending), timeout=max(0.0, deadline_s - time.monotonic()))
        if not ready:
            break
        for reader in ready:
            rank = pending[reader]
            try:
                outcomes[rank] = pickle.loads(reader.recv_bytes())
            except EOFError:
                processes[rank].join()
                outcomes[rank] = ("error", f"ended without a result, exit code {processes[rank].exitcode}\n")
            if outcomes[rank][0] == "error":
                deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
    for rank in outcomes:
        processes[rank].join(timeout=GRACE_S)
    return outcomes


def _end(process):
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()
    process.close()


def _report(fn, world_size, errors, running, timeout_s):
    parts = [f"{fn.__name__} failed with {world_size} ranks"]
    parts += [f"---- rank {rank} ----\n{errors[rank]}" for rank in sorted(errors)]
    if running:
        after = f"{GRACE_S:g} s after the first error" if errors else f"after {timeout_s:g} s"
        parts.append(f"still running {after}, killed: rank {', '.join(map(str, running))}")
    return "\n".join(parts)
