"""The config of the optimizer."""

from vitscale.config.section import AboveZero, NotNegative, Rate, Section


class OptimSection(Section):
    """AdamW (Loshchilov and Hutter 2019, decoupled weight decay) and what is done to the gradients before it."""

    peak_lr: AboveZero
    """Learning rate at the end of the warm-up."""
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: AboveZero = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.0
    """Decoupled decay of weight matrices; biases, norms, position embedding and class token have none."""
    clip_norm: AboveZero | None = 1.0
    """Largest global gradient norm; null for no clipping."""
