"""The trainer: from a config to a finished, resumable run."""

from vitscale.train.build import Blueprint, build_model, draw_blueprint
from vitscale.train.loop import Trainer, run_training

__all__ = ["Blueprint", "Trainer", "build_model", "draw_blueprint", "run_training"]
