import pytest

from vitscale.telemetry import StepMeter, peak_flops, tags


def test_metrics_are_taken_over_the_steps_since_the_last_read():
    meter = StepMeter(flops_per_image=1e12, peak_flops=2e15)
    for step_time_s in (1.0, 3.0):
        meter.add_batch(0.25, ready=4, read_bytes=int(1000 * step_time_s), used_bytes=int(500 * step_time_s))
        meter.add_batch(0.25, ready=1, read_bytes=int(2000 * step_time_s), used_bytes=int(1600 * step_time_s))
        meter.add_step(step_time_s, images=1024)
    assert meter.read() == {
        tags.PERF_IMAGES_PER_S: 512.0,
        tags.PERF_STEP_TIME_S: 2.0,
        tags.PERF_DATA_WAIT_FRACTION: 0.25,
        tags.DATA_READY_BATCHES: 2.5,
        tags.DATA_READ_BYTES_PER_S: 1500.0,
        tags.DATA_READ_AMPLIFICATION: 1.25,
        tags.PERF_MFU: 512 * 1e12 / 2e15,
    }
    meter.add_batch(0.0, ready=0, read_bytes=7000, used_bytes=7000)
    meter.add_step(0.5, images=64)
    assert meter.read() == {
        tags.PERF_IMAGES_PER_S: 128.0,
        tags.PERF_STEP_TIME_S: 0.5,
        tags.PERF_DATA_WAIT_FRACTION: 0.0,
        tags.DATA_READY_BATCHES: 0.0,
        tags.DATA_READ_BYTES_PER_S: 2000.0,
        tags.DATA_READ_AMPLIFICATION: 1.0,
        tags.PERF_MFU: 128 * 1e12 / 2e15,
    }


def test_mfu_is_left_out_where_the_peak_is_not_known():
    meter = StepMeter(flops_per_image=1e12, peak_flops=None)
    meter.add_step(1.0, images=2)
    assert tags.PERF_MFU not in meter.read()


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
