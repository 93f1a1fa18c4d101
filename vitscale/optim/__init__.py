"""Optimizers: parameter groups, learning-rate schedules and AdamW."""

from vitscale.optim.build import build_optimizer
from vitscale.optim.groups import DecayRule, parameter_groups
from vitscale.optim.schedules import learning_rate

__all__ = ["DecayRule", "build_optimizer", "learning_rate", "parameter_groups"]
