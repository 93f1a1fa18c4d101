"""What a run measures and where it writes that down."""

from vitscale.telemetry.background import BackgroundSink
from vitscale.telemetry.board import TensorBoardSink
from vitscale.telemetry.drawing import Prediction, draw_attention, draw_predictions, draw_similarity
from vitscale.telemetry.layout import STORY
from vitscale.telemetry.memory import peak_rss_bytes, reset_peak_rss
from vitscale.telemetry.meters import PARTS, Interval, PartTimes, RunningMean, StepMeter, peak_flops, slowest_rank
from vitscale.telemetry.purge import purge_after, purge_jsonl
from vitscale.telemetry.second import SecondSink, check_second_sink, open_second_sink
from vitscale.telemetry.sinks import ConsoleSink, JsonlSink, MetricWriter, Sink
from vitscale.telemetry.tail import newest_record

__all__ = [
    "PARTS",
    "STORY",
    "BackgroundSink",
    "ConsoleSink",
    "Interval",
    "JsonlSink",
    "MetricWriter",
    "PartTimes",
    "Prediction",
    "RunningMean",
    "SecondSink",
    "Sink",
    "StepMeter",
    "TensorBoardSink",
    "check_second_sink",
    "draw_attention",
    "draw_predictions",
    "draw_similarity",
    "newest_record",
    "open_second_sink",
    "peak_flops",
    "peak_rss_bytes",
    "purge_after",
    "purge_jsonl",
    "reset_peak_rss",
    "slowest_rank",
]
