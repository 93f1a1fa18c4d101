"""What a model is worth: accuracy on a validation split."""

from vitscale.evaluation.accuracy import Accuracy, measure_accuracy

__all__ = ["Accuracy", "measure_accuracy"]
