"""The times of a step's parts, without collectives; tests/distributed/test_distributed_step.py has those with."""

import time

import torch

from vitscale.engine.timing import StepClock


def test_phases_add_up_over_micro_batches_and_what_lies_between_is_not_counted():
    clock = StepClock(torch.device("cpu"))
    slept_s = {"forward": 0.0, "backward": 0.0, "between": 0.0}

    def sleep(what):
        started_s = time.perf_counter()
        time.sleep(0.01)
        slept_s[what] += time.perf_counter() - started_s

    started_s = time.perf_counter()
    for _ in range(2):
        with clock.phase("forward"):
            sleep("forward")
        sleep("between")
        with clock.phase("backward"):
            sleep("backward")
    whole_s = time.perf_counter() - started_s
    times = clock.times()
    assert times.forward_s >= slept_s["forward"]
    assert times.backward_s >= slept_s["backward"]
    assert times.forward_s + times.backward_s <= whole_s - slept_s["between"]
    assert times.optimizer_s == 0.0
    assert times.communication_s == 0.0
