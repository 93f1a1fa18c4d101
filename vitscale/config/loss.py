"""The config of the training loss."""

from typing import Literal

from vitscale.config.section import Rate, Section


class LossSection(Section):
    """The training loss."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    """Softmax cross-entropy, or sigmoid cross-entropy summed over classes (head bias starts at -10)."""
    label_smoothing: Rate = 0.0
    """Mass that softmax targets spread evenly over all classes."""
