"""Training losses: softmax, sigmoid and semantic softmax on labels or mixed labels, and distillation."""

from vitscale.losses.build import SIGMOID_HEAD_BIAS, Loss, classification_loss
from vitscale.losses.targets import Targets

__all__ = ["SIGMOID_HEAD_BIAS", "Loss", "Targets", "classification_loss"]
