"""How fast a run is, and how near to what its devices can do."""

from collections.abc import Mapping
from types import MappingProxyType

from vitscale.telemetry import tags

# The first name that is part of the device's wins, so PCIe and NVL cards stand before the module they resemble.
# Data sheets that give only the rate with sparsity are halved.
PEAK_FLOPS_BF16: Mapping[str, float] = MappingProxyType(
    {
        "GB200": 2500e12,  # NVIDIA GB200 NVL72 data sheet: 360 PFLOPS with sparsity over 72 GPUs
        "B200": 2250e12,  # NVIDIA HGX B200 data sheet: 36 PFLOPS with sparsity over 8 GPUs
        "H200 NVL": 835.5e12,  # NVIDIA H200 data sheet: 1,671 TFLOPS with sparsity
        "H200": 989e12,  # NVIDIA H200 data sheet, SXM: 1,979 TFLOPS with sparsity; GH200 holds the same chip
        "H100 PCIe": 756e12,  # NVIDIA H100 data sheet, PCIe: 1,513 TFLOPS with sparsity
        "H100 NVL": 835.5e12,  # NVIDIA H100 NVL data sheet: 1,671 TFLOPS with sparsity
        "H100": 989e12,  # NVIDIA H100 data sheet, SXM: 1,979 TFLOPS with sparsity
        "A100": 312e12,  # NVIDIA A100 data sheet, SXM and PCIe alike
        "L40S": 362e12,  # NVIDIA L40S data sheet
        "MI300X": 1307e12,  # AMD Instinct MI300X data sheet
    }
)
"""Dense bf16 matrix rate of a device, in floating-point operations a second, by a part of its name."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, by the name torch gives it; None for a device not in the table."""
    return next((peak for part, peak in PEAK_FLOPS_BF16.items() if part in device_name), None)


class StepMeter:
    """Adds up steps until they are read.

    Args:
        flops_per_image: model FLOPs of training on one image, without recomputation.
        peak_flops: peak rate of all devices of the run together, in FLOP/s; None where it is not known.
    """

    def __init__(self, *, flops_per_image: float, peak_flops: float | None) -> None:
        """Start with no steps."""
        self._flops_per_image = flops_per_image
        self._peak_flops = peak_flops
        self._read_bytes = self._used_bytes = self._told_bytes = 0
        self._reset()

    def add_step(self, step_time_s: float, images: int) -> None:
        """Count a step over all its ranks' images; its time includes the wait for data."""
        self._steps += 1
        self._step_time_s += step_time_s
        self._images += images

    def add_batch(self, wait_s: float, ready: int, read_bytes: int, used_bytes: int) -> None:
        """Count a micro-batch of this rank.

        Args:
            wait_s: time the rank waited for it.
            ready: micro-batches that were ready beside it.
            read_bytes: bytes that the rank's loader has read from shards since it began.
            used_bytes: bytes of samples among them.
        """
        self._data_wait_s += wait_s
        self._batches += 1
        self._ready += ready
        self._read_bytes, self._used_bytes = read_bytes, used_bytes

    def read(self) -> dict[str, float]:
        """Metrics over the steps (at least one) since the last read, by tag, and start anew.

        The model FLOPs utilization follows Chowdhery et al. 2022 (PaLM, appendix B): the FLOPs of the model,
        not those executed, over the peak. It is left out where the peak is not known.
        """
        assert self._steps
        images_per_s = self._images / self._step_time_s
        scalars = {
            tags.PERF_IMAGES_PER_S: images_per_s,
            tags.PERF_STEP_TIME_S: self._step_time_s / self._steps,
            tags.PERF_DATA_WAIT_FRACTION: self._data_wait_s / self._step_time_s,
        }
        if self._batches:
            scalars[tags.DATA_READY_BATCHES] = self._ready / self._batches
            scalars[tags.DATA_READ_BYTES_PER_S] = (self._read_bytes - self._told_bytes) / self._step_time_s
            self._told_bytes = self._read_bytes
        if self._used_bytes:
            scalars[tags.DATA_READ_AMPLIFICATION] = self._read_bytes / self._used_bytes
        if self._peak_flops is not None:
            scalars[tags.PERF_MFU] = images_per_s * self._flops_per_image / self._peak_flops
        self._reset()
        return scalars

    def _reset(self) -> None:
        self._steps = 0
        self._images = 0
        self._batches = 0
        self._ready = 0
        self._step_time_s = 0.0
        self._data_wait_s = 0.0
