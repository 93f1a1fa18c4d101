"""Benchmarks that docs/benchmarks records: ratios of two things measured in one run."""

from vitscale.bench.engines import EngineTimes, compare_engines

__all__ = ["EngineTimes", "compare_engines"]
