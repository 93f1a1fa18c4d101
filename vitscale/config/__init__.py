"""Configs: frozen models, YAML composition, overrides, and the numbers that follow from them."""

from vitscale.config.derive import BatchSplit, split_batch, total_steps
from vitscale.config.load import differing_keys, load_config, merge_trees, parse_config
from vitscale.config.schema import (
    BatchSection,
    CheckpointSection,
    Config,
    DataSection,
    EngineSection,
    EvalSection,
    InitSection,
    LogSection,
    LossSection,
    ModelSection,
    OptimSection,
    RunSection,
    ScheduleSection,
    SplitSection,
)

__all__ = [
    "BatchSection",
    "BatchSplit",
    "CheckpointSection",
    "Config",
    "DataSection",
    "EngineSection",
    "EvalSection",
    "InitSection",
    "LogSection",
    "LossSection",
    "ModelSection",
    "OptimSection",
    "RunSection",
    "ScheduleSection",
    "SplitSection",
    "differing_keys",
    "load_config",
    "merge_trees",
    "parse_config",
    "split_batch",
    "total_steps",
]
