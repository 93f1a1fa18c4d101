"""What a run will take, as closed formulas: no GPU, no data and no model is needed."""

from vitscale.planning.states import StateBytes, state_bytes

__all__ = ["StateBytes", "state_bytes"]
