"""The config of what is saved: how often, what is kept, and where a copy goes."""

from typing import Literal

from pydantic import field_validator

from vitscale.config.section import Positive, Section

ValidationMetric = Literal[
    "val/loss", "val/top1", "val/top5", "val/average_loss", "val/average_top1", "val/average_top5"
]
MIRROR_SCHEMES = ("s3", "gs", "az", "file")


class CheckpointSection(Section):
    """When the run is saved and what is kept. Old checkpoints are removed only after a new one is committed."""

    every_steps: Positive = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: Positive = 2
    """Newest checkpoints that are kept; one that is seen to be damaged does not count."""
    keep_every_steps: Positive | None = None
    """Checkpoints at multiples of this many steps are kept for ever; null keeps none so."""
    keep_best: ValidationMetric | None = None
    """Validation metric whose best checkpoint is kept, such as val/top1: the lowest of a loss, the highest of an
    accuracy; null keeps none so. A checkpoint has the metrics of the newest validation before it."""
    mirror: str | None = None
    """URL of a folder in an object store (s3, gs, az or file) that gets a copy of every checkpoint after its commit,
    at URL/<name of the run directory>; a node whose disk has none goes on from there. Null for no copy."""

    @field_validator("mirror")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, _, rest = value.partition("://")
        if "@" in rest:
            raise ValueError("credentials belong into the environment (AWS_*, GOOGLE_*, AZURE_*), not into the URL")
        if scheme not in MIRROR_SCHEMES or not rest:
            known = ", ".join(f"{name}://" for name in MIRROR_SCHEMES)
            raise ValueError(f"{value!r} is no URL of an object store: begin it with one of {known}")
        return value
