"""What a run will take, as closed formulas: no GPU, no data and no model is needed."""

from vitscale.planning.activations import ActivationBytes, ActivationRule, activation_bytes
from vitscale.planning.fit import largest_dividing, largest_micro_batch, step_bytes
from vitscale.planning.parameters import parameter_parts
from vitscale.planning.reading import Reading
from vitscale.planning.states import StateBytes, state_bytes
from vitscale.planning.updates import UpdateBytes, update_bytes

__all__ = [
    "ActivationBytes",
    "ActivationRule",
    "Reading",
    "StateBytes",
    "UpdateBytes",
    "activation_bytes",
    "largest_dividing",
    "largest_micro_batch",
    "parameter_parts",
    "state_bytes",
    "step_bytes",
    "update_bytes",
]
