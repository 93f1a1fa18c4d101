import math
from dataclasses import dataclass
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.telemetry import RunningMean, StepMeter, peak_flops, slowest_rank, tags


@dataclass
class Times:
    forward_s: float = 0.0
    backward_s: float = 0.0
    optimizer_s: float = 0.0
    communication_s: float = 0.0


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def metrics(meter, peak=None):
    interval = meter.take()
    return interval.metrics(interval.parts_s, peak)


def test_metrics_are_taken_over_the_wall_time_between_two_reads(clock):
    meter = StepMeter(flops_per_image=1e12, clock=clock)
    meter.set_flops(model=1e12, executed=0.75e12)
    clock.now_s += 7  # before the first step
    meter.begin()
    for read_bytes in (1000, 3000):
        meter.add_batch(0.25, ready=4, read_bytes=read_bytes, used_bytes=read_bytes // 2)
        meter.add_batch(0.25, ready=1, read_bytes=2 * read_bytes, used_bytes=1600 * read_bytes // 1000)
        meter.add_step(1024, Times(forward_s=0.25, backward_s=0.5, optimizer_s=0.125, communication_s=0.0625))
    meter.add_stall(0.5)
    meter.add_pause(3.0)
    clock.now_s += 7
    assert metrics(meter, peak=2e15) == {
        tags.PERF_IMAGES_PER_S: 512.0,
        tags.PERF_STEP_TIME_S: 2.0,
        tags.PERF_DATA_WAIT_FRACTION: 0.25,
        tags.PERF_FORWARD_FRACTION: 0.125,
        tags.PERF_BACKWARD_FRACTION: 0.25,
        tags.PERF_OPTIMIZER_FRACTION: 0.0625,
        tags.PERF_COMMUNICATION_FRACTION: 0.03125,
        tags.PERF_CHECKPOINT_FRACTION: 0.125,
        tags.PERF_OTHER_FRACTION: 0.15625,
        tags.PERF_PAUSE_S: 3.0,
        tags.DATA_READY_BATCHES: 2.5,
        tags.DATA_READ_BYTES_PER_S: 1500.0,
        tags.DATA_READ_AMPLIFICATION: 1.25,
        tags.PERF_MFU: 512 * 1e12 / 2e15,
        tags.PERF_EXECUTED_MFU: 512 * 0.75e12 / 2e15,
    }
    # What telling it took is part of the next interval.
    clock.now_s += 0.25
    meter.add_batch(0.0, ready=0, read_bytes=7000, used_bytes=7000)
    meter.add_step(64, Times())
    clock.now_s += 0.25
    found = metrics(meter)
    assert (found[tags.PERF_IMAGES_PER_S], found[tags.PERF_STEP_TIME_S]) == (128.0, 0.5)
    assert (found[tags.DATA_READ_BYTES_PER_S], found[tags.DATA_READ_AMPLIFICATION]) == (2000.0, 1.0)
    assert found[tags.PERF_OTHER_FRACTION] == 1.0
    assert tags.PERF_PAUSE_S not in found


def test_utilization_follows_what_an_image_costs_at_each_step(clock):
    meter = StepMeter(flops_per_image=5.0, clock=clock)
    meter.add_step(10)
    meter.set_flops(model=7.0, executed=9.0)
    meter.add_step(10)
    clock.now_s += 1
    found = metrics(meter, peak=1200.0)
    assert found[tags.PERF_MFU] == 120 / 1200
    # Of the first step's images it was not known.
    assert tags.PERF_EXECUTED_MFU not in found
    meter.add_step(10)
    clock.now_s += 1
    assert metrics(meter, peak=900.0)[tags.PERF_EXECUTED_MFU] == 0.1


def test_utilization_is_left_out_where_the_peak_is_not_known(clock):
    meter = StepMeter(flops_per_image=1e12, clock=clock)
    meter.set_flops(model=1e12, executed=1e12)
    meter.add_step(2)
    clock.now_s += 1
    assert not {tags.PERF_MFU, tags.PERF_EXECUTED_MFU} & metrics(meter).keys()


def test_the_times_of_steps_are_read_only_when_they_are_taken(clock):
    read = []

    class Lazy(Times):
        def __getattribute__(self, name):
            if name.endswith("_s"):
                read.append(name)
            return super().__getattribute__(name)

    meter = StepMeter(flops_per_image=1.0, clock=clock)
    times = Lazy()
    read.clear()
    meter.add_step(1, times)
    assert not read
    clock.now_s += 1
    meter.take()
    assert len(read) == 4


def test_parts_that_overlap_leave_nothing_over_rather_than_less(clock):
    meter = StepMeter(flops_per_image=1.0, clock=clock)
    meter.add_batch(0.75, ready=0, read_bytes=0, used_bytes=0)
    meter.add_step(1, Times(forward_s=0.75))
    clock.now_s += 1
    found = metrics(meter)
    assert found[tags.PERF_OTHER_FRACTION] == 0.0
    assert tags.DATA_READ_AMPLIFICATION not in found


def test_a_rank_s_own_time_is_without_the_wait_for_others(clock):
    meter = StepMeter(flops_per_image=1.0, clock=clock)
    for _ in range(2):
        meter.add_step(1, Times(communication_s=0.75))
    meter.add_wait(0.5)
    meter.add_stall(2.0)
    meter.add_pause(4.0)
    clock.now_s += 16
    interval = meter.take()
    assert interval.own_step_s == (16 - 4 - 2 - 2) / 2
    assert interval.parts_s[tags.PERF_COMMUNICATION_FRACTION] == 2.0


def test_the_slowest_rank_is_named_with_its_lag_over_the_median():
    found = slowest_rank([1.0, 1.25, 3.0, 2.0])
    assert found == {
        tags.MACHINE_SLOWEST_RANK: 2,
        tags.MACHINE_SLOWEST_RANK_STEP_S: 3.0,
        tags.MACHINE_SLOWEST_RANK_LAG: 3.0 / 1.625 - 1,
    }
    assert slowest_rank([0.5])[tags.MACHINE_SLOWEST_RANK_LAG] == 0.0
    assert slowest_rank([0.0, 0.0])[tags.MACHINE_SLOWEST_RANK_LAG] == 0.0


def mean_of(values, start=None):
    return reduce(RunningMean.with_value, values, start or RunningMean(4))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=60), st.integers(1, 20))
def test_a_running_mean_is_the_weighted_one(values, window):
    mean = mean_of(values, RunningMean(window))
    weights = [(1 - 1 / window) ** age for age in reversed(range(len(values)))]
    expected = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
    assert mean.value == pytest.approx(expected, rel=1e-9)
    assert mean.warm == (len(values) >= window)


def test_a_mean_goes_on_from_where_it_was():
    values = [3.0, 2.0, 2.5, 1.0]
    resumed = RunningMean.resumed(4, 2, mean_of(values[:2]).value)
    assert mean_of(values[2:], resumed).value == pytest.approx(mean_of(values).value, rel=1e-12)


def test_there_is_no_mean_before_the_first_value():
    assert math.isnan(RunningMean(4).value)


@pytest.mark.parametrize(
    ("device_name", "tera_flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_peaks_by_the_names_that_torch_gives(device_name, tera_flops):
    assert peak_flops(device_name) == tera_flops * 1e12


@pytest.mark.parametrize("device_name", ["cpu", "NVIDIA A10", "Tesla V100-SXM2-16GB"])
def test_no_peak_for_devices_not_in_the_table(device_name):
    assert peak_flops(device_name) is None
