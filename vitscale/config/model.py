"""The config of the model: which architecture, and the weights it starts from."""

from pathlib import Path
from typing import Literal

from vitscale.config.section import AboveZero, Count, NotNegative, Positive, Rate, Section


class ModelSection(Section):
    """The model: a name of the variants table, and what differs from it."""

    name: str
    """A variant, as `vitscale models` lists them."""
    num_classes: Count
    """Outputs of the head; 0 builds a model without head."""
    img_size: Positive | tuple[Positive, Positive] | None = None
    """Input in pixels, the side of a square or [height, width]; the variant's own when left out."""
    in_chans: Positive | None = None
    """Channels of the input; the variant's own when left out."""
    patch_size: Positive | tuple[Positive, Positive] | None = None
    """Patch in pixels, the side of a square or [height, width]; the variant's own when left out."""
    embed_dim: Positive | None = None
    """Width; the variant's own when left out."""
    depth: Positive | None = None
    """Number of blocks; the variant's own when left out."""
    num_heads: Positive | None = None
    """Attention heads; the variant's own when left out."""
    mlp_ratio: AboveZero | None = None
    """Hidden width of the MLP over the width; the variant's own when left out."""
    representation_size: Count | None = None
    """Width of the representation layer (Linear + tanh before the head); 0 for none; the variant's own
    when left out."""
    pool: Literal["token", "avg", "map"] | None = None
    """What the head reads: the class token, or of a model without one the mean of the patch tokens (avg) or
    what a learned probe attends to (map); the variant's own when left out."""
    qkv_bias: bool | None = None
    """Bias of the attention's input projection; the variant's own when left out."""
    distilled: bool | None = None
    """A second token with a head of its own, as in DeiT; the variant's own when left out."""
    reg_tokens: Count | None = None
    """Register tokens; the variant's own number when left out."""
    layer_scale: NotNegative | None = None
    """First value of LayerScale's factors, 0 for no LayerScale; the variant's own when left out."""
    qk_norm: bool | None = None
    """LayerNorm of queries and keys; the variant's own when left out."""
    parallel: bool | None = None
    """Attention and MLP side by side, as in ViT-22B; the variant's own when left out."""
    act: Literal["gelu", "gelu_tanh", "swiglu"] | None = None
    """Activation of the MLP; the variant's own when left out."""
    norm_bias: bool | None = None
    """Whether LayerNorms have a bias; the variant's own when left out."""
    norm_eps: AboveZero | None = None
    """Epsilon of every LayerNorm; the variant's own when left out."""
    stem: list[Positive] | None = None
    """Units of each stage of a ResNet before the patch embedding; the variant's own when left out."""
    drop_rate: Rate = 0.0
    """Dropout after the position embedding, the attention projection and inside the MLP."""
    drop_path_rate: Rate = 0.0
    """Stochastic depth of the last block; the rate grows linearly from 0 at the first."""
    drop_path_mode: Literal["mask", "subset"] = "mask"
    """Whether samples that pass a block's branch by are computed and multiplied by 0 (mask), or left out, which saves
    their work (subset): then a fixed share of each micro-batch, in whole samples and at least one, takes the branch."""
    head_multiple: Positive = 1
    """The head's matrix product is padded to a multiple of this many classes, as GPUs want it: 64 makes 21,888 of
    21,843. Weights, checkpoints, logits and exports do not change."""
    weight_init: Literal["jax", "jax_nlhb", "trunc_normal"] = "jax"
    """How fresh weights are drawn: as the ViT paper's code, the same with a head bias of -log(classes), or the
    truncated normal of DeiT."""


class InitSection(Section):
    """Weights to start from, for fine-tuning."""

    path: Path | None = None
    """A model to start from: a folder of `vitscale export` or `import`, of timm or of Hugging Face, or Google's npz;
    random weights when left out."""
    representation: Literal["keep", "drop"] = "drop"
    """Whether the representation layer of the loaded model stays. The ViT paper drops it to fine-tune."""
    pos_embed: Literal["timm", "timm_npz", "google"] = "timm"
    """How the position embedding is resized to another image size: bicubic with antialiasing (timm), bilinear
    between cell centres (timm for Google's npz) or between the corner cells (Google)."""
