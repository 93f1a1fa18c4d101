"""What a run measures and where it writes that down."""

from vitscale.telemetry.meters import StepMeter, peak_flops
from vitscale.telemetry.purge import purge_after, purge_jsonl
from vitscale.telemetry.sinks import ConsoleSink, JsonlSink, MetricWriter, Sink, TensorBoardSink

__all__ = [
    "ConsoleSink",
    "JsonlSink",
    "MetricWriter",
    "Sink",
    "StepMeter",
    "TensorBoardSink",
    "peak_flops",
    "purge_after",
    "purge_jsonl",
]
