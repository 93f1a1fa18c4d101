"""The config of the optimizer."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vitscale.config.section import AboveZero, NotNegative, Rate, Section

_ONLY_FOR = {
    "betas": ("adamw", "lamb"),
    "eps": ("adamw", "lamb"),
    "momentum": ("sgd", "adafactor"),
    "momentum_dtype": ("adafactor",),
    "fused": ("adamw", "sgd"),
}


class OptimSection(Section):
    """The optimizer, its parameter groups, and what is done to the gradients before it."""

    kind: Literal["adamw", "sgd", "lamb", "adafactor"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019), SGD with momentum, LAMB as DeiT III, or Adafactor as Scaling ViT uses it."""
    peak_lr: AboveZero
    """Learning rate at the end of the warm-up."""
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """Decay of the first and the second moment, of adamw and lamb."""
    eps: AboveZero = 1e-8
    """Added to the root of the second moment, by adamw and lamb."""
    momentum: Rate = 0.9
    """Decay of the momentum of sgd and adafactor; 0 for none."""
    momentum_dtype: Literal["fp32", "bf16"] = "fp32"
    """What adafactor stores its momentum in; Scaling ViT: bf16."""
    weight_decay: NotNegative = 0.0
    """Decay of weight matrices; biases, norms, position embedding, tokens and attention pooling's probe have none.

    Decoupled (weight_decay times the learning rate times the weights) for adamw and adafactor, part of the gradient
    for sgd, part of the direction for lamb.
    """
    head_weight_decay: NotNegative | None = None
    """That of the classifiers' matrices; null for weight_decay."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor between the learning rates of a layer and of the one above it (BEiT, EVA)."""
    fused: bool | None = None
    """One kernel for the whole update of adamw or sgd, on GPUs only; null for wherever it can be."""
    clip_norm: AboveZero | None = 1.0
    """Largest global gradient norm; null for no clipping."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        for name, kinds in _ONLY_FOR.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for {' and '.join(kinds)}, kind is {self.kind}: remove it")
        if self.momentum_dtype == "bf16" and not self.momentum:
            raise ValueError("momentum_dtype has no effect without momentum: remove it")
        if self.kind == "lamb" and not (self.weight_decay or self.head_weight_decay):
            raise ValueError("lamb adapts the rates of decayed parameters only: give weight_decay, or use kind adamw")
        return self
