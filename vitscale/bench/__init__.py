"""Benchmarks that docs/benchmarks records: things measured side by side in one run."""

from vitscale.bench.engines import EngineTimes, compare_engines
from vitscale.bench.export import ExportCost, measure_export, write_checkpoint
from vitscale.bench.formats import OTHERS, FormatResult, compare_formats

__all__ = [
    "OTHERS",
    "EngineTimes",
    "ExportCost",
    "FormatResult",
    "compare_engines",
    "compare_formats",
    "measure_export",
    "write_checkpoint",
]
