"""The trainer: from a config to a finished, resumable run."""

from vitscale.train.adoption import adopt_deepspeed
from vitscale.train.build import Blueprint, build_model, draw_blueprint
from vitscale.train.loop import Trainer
from vitscale.train.run import run_training

__all__ = ["Blueprint", "Trainer", "adopt_deepspeed", "build_model", "draw_blueprint", "run_training"]
