"""What a run measures and where it writes that down."""

from vitscale.telemetry.memory import peak_rss_bytes, reset_peak_rss
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
    "peak_rss_bytes",
    "purge_after",
    "purge_jsonl",
    "reset_peak_rss",
]
