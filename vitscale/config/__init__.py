"""Configs: frozen models, YAML composition, overrides, and the numbers that follow from them."""

from vitscale.config.augment import (
    AugmentSection,
    BlurSection,
    ErasingSection,
    JitterSection,
    MixSection,
    RandAugmentSection,
)
from vitscale.config.average import AverageSection
from vitscale.config.checkpoint import CheckpointSection
from vitscale.config.data import DataSection, SourceSection, SplitSection, StreamSection
from vitscale.config.derive import BatchSplit, Phase, Timeline, lay_out, phase_batches, split_batch, usable_ranks
from vitscale.config.engine import EngineSection
from vitscale.config.guard import GuardSection
from vitscale.config.length import Length
from vitscale.config.load import differing_keys, load_config, merge_trees, parse_config
from vitscale.config.loss import DistillSection, LossSection
from vitscale.config.model import InitSection, ModelSection
from vitscale.config.optim import OptimSection
from vitscale.config.record import check_recorded
from vitscale.config.remote import RemoteSection
from vitscale.config.reporting import EvalSection, LogSection, ProfileSection
from vitscale.config.schedule import BatchSection, PhaseSection, ScheduleSection
from vitscale.config.schema import Config, RunSection
from vitscale.config.watchdog import WatchdogSection

__all__ = [
    "AugmentSection",
    "AverageSection",
    "BatchSection",
    "BatchSplit",
    "BlurSection",
    "CheckpointSection",
    "Config",
    "DataSection",
    "DistillSection",
    "EngineSection",
    "ErasingSection",
    "EvalSection",
    "GuardSection",
    "InitSection",
    "JitterSection",
    "Length",
    "LogSection",
    "LossSection",
    "MixSection",
    "ModelSection",
    "OptimSection",
    "Phase",
    "PhaseSection",
    "ProfileSection",
    "RandAugmentSection",
    "RemoteSection",
    "RunSection",
    "ScheduleSection",
    "SourceSection",
    "SplitSection",
    "StreamSection",
    "Timeline",
    "WatchdogSection",
    "check_recorded",
    "differing_keys",
    "lay_out",
    "load_config",
    "merge_trees",
    "parse_config",
    "phase_batches",
    "split_batch",
    "usable_ranks",
]
