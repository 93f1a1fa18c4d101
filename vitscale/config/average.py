"""The config of the weights' moving average."""

from typing import Annotated

from pydantic import Field

from vitscale.config.section import Positive, Section


class AverageSection(Section):
    """An exponential moving average of the weights, in fp32 beside the master weights (Polyak and Juditsky 1992)."""

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9999
    """Share of the average that an averaging keeps; the rest comes from the weights."""
    every_steps: Positive = 1
    """Optimizer steps between two averagings."""
    warmup: bool = True
    """Let the t-th averaging keep no more than (1 + t) / (10 + t), so that the first weights are soon forgotten
    (the rule of TensorFlow's ExponentialMovingAverage)."""
