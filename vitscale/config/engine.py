"""The config of what executes a step."""

from typing import Any, Literal

from pydantic import Field

from vitscale.config.section import Positive, Section


class EngineSection(Section):
    """What executes a step."""

    kind: Literal["deepspeed", "torch"] = "deepspeed"
    """DeepSpeed, or the plain torch loop that serves as its oracle."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: what is partitioned over ranks (1 optimizer state, 2 + gradients, 3 + parameters)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of forward and backward; auto is bf16 where the hardware multiplies it natively."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """Whether blocks recompute their activations in backward instead of keeping them."""
    bucket_elements: Positive = 100_000_000
    """Elements of one gradient reduction or parameter gather."""
    deepspeed_overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys merged over the rendered DeepSpeed config, for what has no key here."""
