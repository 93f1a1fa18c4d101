"""What a run will take, as closed formulas: no GPU, no data and no model is needed."""

from vitscale.planning.activations import ActivationBytes, ActivationRule, activation_bytes
from vitscale.planning.cluster import BEST, ORIGINS, WORST, ClusterCosts, checkpoint_bytes
from vitscale.planning.fit import largest_dividing, largest_micro_batch, step_bytes
from vitscale.planning.goodput import (
    FailureRate,
    Outcome,
    Prediction,
    RestartTimes,
    SaveTimes,
    Shares,
    SmallRun,
    best_interval_s,
    daly_interval_s,
    expected_shares,
    predict,
    simulate,
    under_failures,
    young_interval_s,
)
from vitscale.planning.parameters import parameter_parts
from vitscale.planning.reading import Reading
from vitscale.planning.states import StateBytes, state_bytes
from vitscale.planning.updates import UpdateBytes, update_bytes

__all__ = [
    "BEST",
    "ORIGINS",
    "WORST",
    "ActivationBytes",
    "ActivationRule",
    "ClusterCosts",
    "FailureRate",
    "Outcome",
    "Prediction",
    "Reading",
    "RestartTimes",
    "SaveTimes",
    "Shares",
    "SmallRun",
    "StateBytes",
    "UpdateBytes",
    "activation_bytes",
    "best_interval_s",
    "checkpoint_bytes",
    "daly_interval_s",
    "expected_shares",
    "largest_dividing",
    "largest_micro_batch",
    "parameter_parts",
    "predict",
    "simulate",
    "state_bytes",
    "step_bytes",
    "under_failures",
    "update_bytes",
    "young_interval_s",
]
