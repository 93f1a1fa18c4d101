"""The config of what a run measures and tells while it goes on."""

from vitscale.config.section import Positive, Section


class EvalSection(Section):
    """Validation during the run."""

    every_steps: Positive | None = None
    """Steps between two validations; only after the last step when left out."""
    micro_batch: Positive = 64
    """Images a rank and forward in validation."""


class LogSection(Section):
    """How often metrics are written."""

    every_steps: Positive = 10
    """Steps between two records of the training metrics."""
    samples: bool = False
    """Whether every rank writes the keys of the samples of each step to RUN/samples, for an audit."""
