"""What a run will take, as closed formulas: no GPU, no data and no model is needed."""

from vitscale.planning.activations import activation_bytes, checkpointed_bytes
from vitscale.planning.parameters import parameter_parts
from vitscale.planning.reading import Reading
from vitscale.planning.states import StateBytes, state_bytes

__all__ = ["Reading", "StateBytes", "activation_bytes", "checkpointed_bytes", "parameter_parts", "state_bytes"]
