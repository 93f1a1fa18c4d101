"""Configs: frozen models, YAML composition, overrides, and the numbers that follow from them."""

from vitscale.config.augment import (
    AugmentSection,
    BlurSection,
    ErasingSection,
    JitterSection,
    MixSection,
    RandAugmentSection,
)
from vitscale.config.data import DataSection, SourceSection, SplitSection, StreamSection
from vitscale.config.derive import BatchSplit, split_batch, total_steps
from vitscale.config.engine import EngineSection
from vitscale.config.load import differing_keys, load_config, merge_trees, parse_config
from vitscale.config.loss import LossSection
from vitscale.config.model import InitSection, ModelSection
from vitscale.config.optim import OptimSection
from vitscale.config.remote import RemoteSection
from vitscale.config.reporting import EvalSection, LogSection
from vitscale.config.schedule import BatchSection, ScheduleSection
from vitscale.config.schema import CheckpointSection, Config, RunSection

__all__ = [
    "AugmentSection",
    "BatchSection",
    "BatchSplit",
    "BlurSection",
    "CheckpointSection",
    "Config",
    "DataSection",
    "EngineSection",
    "ErasingSection",
    "EvalSection",
    "InitSection",
    "JitterSection",
    "LogSection",
    "LossSection",
    "MixSection",
    "ModelSection",
    "OptimSection",
    "RandAugmentSection",
    "RemoteSection",
    "RunSection",
    "ScheduleSection",
    "SourceSection",
    "SplitSection",
    "StreamSection",
    "differing_keys",
    "load_config",
    "merge_trees",
    "parse_config",
    "split_batch",
    "total_steps",
]
