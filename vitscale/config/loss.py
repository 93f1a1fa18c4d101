"""The config of the training loss."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vitscale.config.section import AboveZero, Rate, Section

LossKind = Literal["softmax", "sigmoid", "semantic"]


class DistillSection(Section):
    """A teacher whose logits are learned from beside the labels (DeiT: Touvron et al. 2021)."""

    teacher: Path
    """The teacher: a folder of `vitscale export` or `import`, of timm or of Hugging Face, or Google's npz."""
    kind: Literal["hard", "soft"] = "hard"
    """What is learned: the teacher's likeliest class as a label (hard), or its probabilities (soft)."""
    tau: AboveZero = 1.0
    """Temperature of the teacher's and the student's probabilities, soft only; the paper has 3."""
    alpha: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the teacher in the loss, the labels have the rest; the paper has 0.5 for hard and 0.1 for soft."""

    @model_validator(mode="after")
    def _tau_is_used(self) -> Self:
        if self.kind == "hard" and self.tau != 1.0:
            raise ValueError(f"tau {self.tau} has no effect with kind=hard: remove it, or set kind=soft")
        return self


class LossSection(Section):
    """The training loss."""

    kind: LossKind = "softmax"
    """Softmax cross-entropy; sigmoid cross-entropy summed over classes (head bias starts at -10); or the semantic
    softmax, one over each level of the classes' WordNet hierarchy (Ridnik et al. 2021)."""
    label_smoothing: Rate = 0.0
    """Mass that the targets spread evenly over all classes, with semantic over those of each level."""
    distill: DistillSection | None = None
    """A teacher to learn from; null for none."""

    @model_validator(mode="after")
    def _teacher_speaks_the_same_language(self) -> Self:
        if self.distill is not None and self.distill.kind == "soft" and self.kind != "softmax":
            raise ValueError(
                f"distill.kind soft compares softmax probabilities, kind={self.kind} trains other ones: "
                "set distill.kind=hard or kind=softmax"
            )
        return self
