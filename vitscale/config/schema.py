"""The config of a run: frozen pydantic models, one class a section.

A field exists only where some code reads it, and nothing changes after load. Numbers that follow from
others (accumulation, total steps) are not fields: `vitscale.config.derive` computes them.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from vitscale.config.data import DataSection
from vitscale.config.section import AboveZero, Count, NotNegative, Positive, Rate, Section


class RunSection(Section):
    """Where the run lives and the one seed that everything random follows from."""

    dir: Path | None = None
    """Run directory; `runs/<config stem>` when left out."""
    seed: Count = 0
    """Seed of the initial weights, the data order, the augmentation, dropout and drop path."""


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


class BatchSection(Section):
    """Images an optimizer step sees, and how many of them a rank holds at once."""

    global_batch: Positive
    """Images a step, over all ranks and accumulation."""
    micro_batch: Positive
    """Images a rank and forward; even, because augmentation pairs position p with p xor 1."""

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.micro_batch % 2:
            raise ValueError(
                f"micro_batch {self.micro_batch} is odd: use an even number, such as {self.micro_batch + 1}"
            )
        return self


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


class ScheduleSection(Section):
    """How long the run is and how the learning rate moves."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    steps: Positive | None = None
    """Length in optimizer steps; give this or `epochs`."""
    epochs: AboveZero | None = None
    """Length in passes over the training split; give this or `steps`."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from 0, part of the length."""
    final_lr: NotNegative = 0.0
    """Learning rate that the decay would reach just after the last step."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class LossSection(Section):
    """The training loss."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    """Softmax cross-entropy, or sigmoid cross-entropy summed over classes (head bias starts at -10)."""
    label_smoothing: Rate = 0.0
    """Mass that softmax targets spread evenly over all classes."""


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


class CheckpointSection(Section):
    """When the run is saved and what is kept."""

    every_steps: Positive = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: Positive = 2
    """Newest valid checkpoints that are kept."""


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


class Config(Section):
    """A whole run, as one YAML file describes it."""

    run: RunSection = RunSection()
    model: ModelSection
    init: InitSection = InitSection()
    data: DataSection
    batch: BatchSection
    optim: OptimSection
    schedule: ScheduleSection
    loss: LossSection = LossSection()
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.loss.kind == "sigmoid" and self.loss.label_smoothing:
            raise ValueError("loss.label_smoothing is for the softmax loss: set it to 0 with loss.kind=sigmoid")
        if self.engine.kind == "torch" and self.engine.deepspeed_overrides:
            raise ValueError("engine.deepspeed_overrides has no effect with engine.kind=torch: remove it")
        if self.log.samples and self.data.stream is not None:
            raise ValueError("log.samples names samples by their index, data.stream has none: set log.samples=false")
        if self.model.num_classes == 0:
            raise ValueError("model.num_classes is 0, which builds no head to train: give the number of classes")
        return self
