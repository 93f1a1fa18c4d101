"""Benchmarks that docs/benchmarks records: things measured side by side in one run."""

from vitscale.bench.data import ROWS, DataBench, report, work_folder
from vitscale.bench.decode import DecodeRate, compare_concurrency, compare_decoders, photographs
from vitscale.bench.engines import EngineTimes, compare_engines
from vitscale.bench.export import ExportCost, measure_export, write_checkpoint
from vitscale.bench.formats import OTHERS, FormatResult, compare_formats

__all__ = [
    "OTHERS",
    "ROWS",
    "DataBench",
    "DecodeRate",
    "EngineTimes",
    "ExportCost",
    "FormatResult",
    "compare_concurrency",
    "compare_decoders",
    "compare_engines",
    "compare_formats",
    "measure_export",
    "photographs",
    "report",
    "work_folder",
    "write_checkpoint",
]
