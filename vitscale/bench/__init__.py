"""Benchmarks that docs/benchmarks records: things measured side by side in one run."""

from vitscale.bench.checkpoint import CHECKPOINT_ROWS, CheckpointBench, report_checkpoint
from vitscale.bench.data import ROWS, DataBench, report, work_folder
from vitscale.bench.decode import DecodeRate, compare_concurrency, compare_decoders, photographs
from vitscale.bench.engines import EngineTimes, compare_engines
from vitscale.bench.export import ExportCost, measure_export, write_checkpoint
from vitscale.bench.formats import OTHERS, FormatResult, compare_formats
from vitscale.bench.step import STEP_ROWS, StepBench, report_step

__all__ = [
    "CHECKPOINT_ROWS",
    "OTHERS",
    "ROWS",
    "STEP_ROWS",
    "CheckpointBench",
    "DataBench",
    "DecodeRate",
    "EngineTimes",
    "ExportCost",
    "FormatResult",
    "StepBench",
    "compare_concurrency",
    "compare_decoders",
    "compare_engines",
    "compare_formats",
    "measure_export",
    "photographs",
    "report",
    "report_checkpoint",
    "report_step",
    "work_folder",
    "write_checkpoint",
]
