"""Optimizers that are true under ZeRO, parameter groups and learning-rate schedules."""

from vitscale.optim.build import build_optimizer, check_fused
from vitscale.optim.groups import DecayRule, parameter_groups
from vitscale.optim.schedules import learning_rate
from vitscale.optim.segmented import SegmentedOptimizer
from vitscale.optim.segments import Flat, Segment, whole_parameters

__all__ = [
    "DecayRule",
    "Flat",
    "Segment",
    "SegmentedOptimizer",
    "build_optimizer",
    "check_fused",
    "learning_rate",
    "parameter_groups",
    "whole_parameters",
]
