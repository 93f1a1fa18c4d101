"""The config of what executes a step."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from vitscale.config.section import Positive, Section


class EngineSection(Section):
    """What executes a step."""

    kind: Literal["deepspeed", "torch"] = "deepspeed"
    """DeepSpeed, or the plain torch loop that serves as its oracle."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: what is partitioned over ranks (1 optimizer state, 2 + gradients, 3 + parameters)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of forward and backward; auto is bf16 where the hardware multiplies it natively."""
    activation_checkpointing: Literal["none", "full", "every_k", "selective", "budget"] = "none"
    """What backward recomputes instead of keeping it: nothing, whole blocks, whole blocks every `checkpoint_every`,
    all but matrix products and attention, or what the compiler picks to keep `activation_budget`."""
    checkpoint_every: Positive | None = None
    """The k of every_k: each k-th block recomputes."""
    activation_budget: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Of budget: the share that is kept of the bytes that a compiled block would keep."""
    compile: bool = False
    """Compile the blocks: one graph for all that have the same shapes."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """Kernel of the blocks' attention; auto leaves the choice to torch."""
    fp8: bool = False
    """Multiply the blocks' linear layers in float8 (torchao, tensorwise scales); needs an H100 or newer."""
    bucket_elements: Positive = 100_000_000
    """Elements of one gradient reduction; at stage 3 half as many are gathered ahead and twice as many kept."""
    overlap_comm: bool = False
    """Reduce gradients (and gather weights, at stage 3) on a stream of their own, beside the computation."""
    offload: Literal["none", "optimizer", "optimizer_and_params"] = "none"
    """What lies in the host's memory instead of the GPU's: master weights and moments, which are then updated by the
    CPU, and at stage 3 the weights too."""
    offload_pin_memory: bool = True
    """Offload to page-locked memory, which copies fast and cannot be paged out."""
    hpz: Positive = 1
    """Ranks that keep a second partition of the weights among themselves, which backward gathers from (ZeRO++ hpZ);
    the GPUs of a node or a divisor of them. 1 for none."""
    qwz: bool = False
    """Gather weights in 8 bits (ZeRO++ qwZ)."""
    deepspeed_overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys merged over the rendered DeepSpeed config, for what has no key here."""

    @model_validator(mode="after")
    def _zero_can_run(self) -> Self:
        needs = {  # the least ZeRO stage at which a key has an effect
            "overlap_comm": (self.overlap_comm, 1),
            "offload": (self.offload != "none", 1),
            "hpz": (self.hpz > 1, 3),
            "qwz": (self.qwz, 3),
        }
        for key, (used, stage) in needs.items():
            if used and self.kind == "torch":
                raise ValueError(f"engine.{key} is for engine.kind=deepspeed: remove it")
            if used and self.zero_stage < stage:
                raise ValueError(
                    f"engine.{key} has no effect at engine.zero_stage={self.zero_stage}: "
                    f"use engine.zero_stage={stage}, or remove it"
                )
        if self.offload == "optimizer_and_params" and self.zero_stage != 3:
            raise ValueError(
                f"engine.offload=optimizer_and_params moves partitioned weights, engine.zero_stage={self.zero_stage} "
                "keeps them whole: use engine.zero_stage=3, or engine.offload=optimizer"
            )
        return self

    @model_validator(mode="after")
    def _blocks_can_run(self) -> Self:
        kind = self.activation_checkpointing
        for policy, key in (("every_k", "checkpoint_every"), ("budget", "activation_budget")):
            given = getattr(self, key) is not None
            if kind == policy and not given:
                raise ValueError(f"engine.activation_checkpointing={policy} leaves the amount open: give engine.{key}")
            if kind != policy and given:
                raise ValueError(
                    f"engine.{key} is for activation_checkpointing={policy}, not {kind}: remove engine.{key}"
                )
        if kind == "budget" and not self.compile:
            raise ValueError(
                "engine.activation_checkpointing=budget is the compiler's: set engine.compile=true or use selective"
            )
        if self.fp8 and not self.compile:
            raise ValueError(
                "engine.fp8 is slower than bf16 unless compiled: set engine.compile=true or engine.fp8=false"
            )
        if self.fp8 and self.kind == "deepspeed" and self.zero_stage == 3:
            raise ValueError(
                "engine.fp8 is not for ZeRO stage 3, which would gather bf16 weights to cast them: "
                "use engine.zero_stage=2 or engine.fp8=false"
            )
        if self.fp8 and self.precision == "fp32":
            raise ValueError("engine.fp8 replaces bf16 products: set engine.precision=bf16 or engine.fp8=false")
        return self
