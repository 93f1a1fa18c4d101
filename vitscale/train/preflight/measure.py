"""How fast a device multiplies matrices, and how fast ranks talk."""

import time
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from vitscale.train.preflight.pairs import Collective, bus_bandwidth
from vitscale.train.preflight.reports import one_line

_SIDE = {"cuda": 8192, "cpu": 384}
"""Of the matrices: 1.1 TFLOP of work on a GPU, a few milliseconds of it; 0.1 GFLOP on a core."""
_WARM_UP, _TRIES = 3, 10
_LOAD_S = {"cuda": 5.0, "cpu": 0.0}
"""How long it multiplies at least: a GPU that is too hot, or gets too little power, is as fast as others at first."""
_SENDS = {"cuda": (1, 20), "cpu": (5, 1)}
"""How many times so many sends are begun together and waited for. While TORCH_NCCL_BLOCKING_WAIT is set, a wait looks
once a millisecond, which is longer than many a send takes: of twenty only the last one's look counts."""
BUSY_FRACTION = 0.1
"""Of a GPU's memory: what nobody else should hold when a run is about to start."""


def try_device(device: torch.device) -> tuple[float | None, str]:
    """FLOP/s of a device's matrix products, and what keeps it from being used; empty where nothing does."""
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        fault = device_fault(device)
        rate, same = matmul_rate(device)
    except RuntimeError as error:
        return None, one_line(error)
    return rate, fault if same else "two products of the same matrices differ: replace the device"


def matmul_rate(device: torch.device) -> tuple[float, bool]:
    """FLOP/s of matrix products in the best of the last tries, and whether a GPU gave the same product each time."""
    side = _SIDE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator, device=device, dtype=dtype) for _ in range(2))
    first, same, turns = left @ right, True, 0
    last_s: deque[float] = deque(maxlen=_TRIES)
    loaded_at_s = time.perf_counter() + _LOAD_S[device.type]
    while turns < _WARM_UP + _TRIES or time.perf_counter() < loaded_at_s:
        _wait(device)
        began_s = time.perf_counter()
        product = left @ right
        _wait(device)
        last_s.append(time.perf_counter() - began_s)
        turns += 1
        # cuBLAS gives the same bits on the same card; a CPU's library may share the work out anew.
        same &= device.type == "cpu" or torch.equal(first, product)
    return 2 * side**3 / min(last_s), same


def device_fault(device: torch.device) -> str:
    """What keeps a GPU from being used, though it is there; empty where nothing does. A CPU is shared by its nature."""
    if device.type == "cpu":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    if total - free < BUSY_FRACTION * total:
        return ""
    return f"{(total - free) / 1e9:.0f} of its {total / 1e9:.0f} GB are in use: end the process that was left there"


def transfer_rate(collective: Collective, size_bytes: int, device: torch.device) -> float:
    """Bus bandwidth in bytes a second of a collective among the ranks of the group that is up. Collective.

    Args:
        collective: which.
        size_bytes: of what each rank has in the end.
        device: of the tensors.
    """
    ranks = dist.get_world_size()
    send = _sender(collective, size_bytes // 4 // ranks * ranks, ranks, device)
    send().wait()  # opens the connections
    _wait(device)
    times, together = _SENDS[device.type]
    began_s = time.perf_counter()
    for _ in range(times):
        for work in [send() for _ in range(together)]:
            work.wait()
    _wait(device)
    return bus_bandwidth(collective, size_bytes, (time.perf_counter() - began_s) / (times * together), ranks)


def _sender(collective: Collective, elements: int, ranks: int, device: torch.device) -> Callable[[], dist.Work]:
    whole: Tensor = torch.zeros(elements, device=device)
    part = torch.zeros(elements // ranks, device=device)

    def send() -> dist.Work:
        work: dist.Work | None
        if collective == "all-reduce":
            work = dist.all_reduce(whole, async_op=True)
        else:
            work = dist.all_gather_into_tensor(whole, part, async_op=True)
        assert work is not None  # it is for ranks outside of the group
        return work

    return send


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
