"""launch/training_task.py: signals that come before the trainer is ready for them."""

import os
import signal
import time

import pytest
import training_task


@pytest.fixture
def handlers():
    """The signals' handlers are put back afterwards."""
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_that_comes_too_early_is_kept_for_the_trainer(handlers, monkeypatch, number):
    came = []

    def train(words):
        os.kill(os.getpid(), number)
        time.sleep(0.05)  # as it goes on importing
        os.kill(os.getpid(), signal.SIGCONT)  # Slurm sends it before SIGTERM
        signal.signal(number, lambda signum, frame: came.append((signum, words)))
        deadline = time.monotonic() + 20
        while not came and time.monotonic() < deadline:
            time.sleep(0.01)

    monkeypatch.setattr(training_task, "AGAIN_S", 0.1)
    monkeypatch.setattr(training_task, "vitscale", train)
    training_task.train_in_task(["run.yaml"])
    time.sleep(0.3)
    assert came == [(number, ["train", "run.yaml"])]
