"""Bytes of activations that a micro-batch leaves for the backward pass.

With e bytes an element (bf16 2, fp32 4), S tokens, width d, MLP width f and h heads, eager PyTorch with a fused
attention kernel keeps of a block, a token,

    attention   norm's input d, output d, mean and rstd 8 bytes; qkv 3d; attention's output d and log-sum-exp 4h bytes
    MLP         norm's input d, output d, mean and rstd; hidden layer f before and f after GELU

which is (8d + 2f) e + 4h + 16 bytes: in bf16 the 16d + 4f + 4h of facts and papers (Korthikanti et al. 2022, arXiv
2205.05198, count the same for GPT). Options add

    QK-norm     3d (both outputs, and attention's output in another layout) and 16h bytes of statistics
    SwiGLU      2f (twice the hidden layer before, the gated half after silu)
    LayerScale  d a branch, what it multiplies
    dropout     masks of f and 2d, a byte an element on a GPU; d more on the embedding
    parallel    one norm, so 2d and 8 bytes less, and one LayerScale
    drop path   as mask a factor a sample and branch; as subset all of a branch's bytes times the share that takes it,
                and d of each of those more, its output (of a recomputed block, the last branch's)

Recomputation keeps of a block: full its input d; selective its input, qkv 3d, attention's output d and log-sum-exp,
projection d, hidden layer f (SwiGLU 2f), and d more where LayerScale or dropout follow; budget is the compiler's
choice of so many bytes, an estimate. Counted in tests/unit/planning/test_planning_activations.py.
"""

from dataclasses import dataclass

from vitscale.engine import Precision
from vitscale.model import Execution, Recompute, Variant
from vitscale.model.drop_path import drop_path_rates, kept_samples
from vitscale.planning.states import ELEMENT_BYTES

_FP32_BYTES = 4
_INDEX_BYTES = 8


@dataclass(frozen=True)
class ActivationRule:
    """All that decides what is kept, beside the architecture."""

    precision: Precision = "bf16"
    recompute: Recompute = "none"
    every: int = 1
    """Of every_k: each k-th block recomputes."""
    budget: float = 1.0
    """Of budget: the share that is kept of what the blocks would keep."""
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    drop_path_subset: bool = False
    on_gpu: bool = True
    """A CPU keeps norms' statistics and dropout's masks in the dtype of the activations."""

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return ELEMENT_BYTES[self.precision]

    @property
    def mask(self) -> int:
        """Bytes of an element of dropout's mask; none without dropout."""
        return (1 if self.on_gpu else self.element) if self.drop_rate else 0

    @property
    def statistics(self) -> int:
        """Bytes of a norm's mean and reciprocal deviation."""
        return 2 * (_FP32_BYTES if self.on_gpu else self.element)

    def recomputes(self, index: int) -> bool:
        """Whether all of a block, counted from 0, is recomputed."""
        return Execution(recompute=self.recompute, every=self.every).recomputes(index)


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that a micro-batch takes on one rank between its forward and its backward pass."""

    blocks: int
    """What the blocks keep."""
    head: int
    """Final norm, pooling, representation layer and the gradient of the logits, which the loss keeps."""
    embedding: int
    """The input in the dtype of the weights, once more cut into patches, and dropout's mask."""
    recomputed: int
    """What one block adds while backward recomputes it, less what later blocks have let go by then."""
    working: int
    """What backward makes at its height, the gradient of a hidden layer, less what the head has let go by then."""

    @property
    def kept(self) -> int:
        """What forward leaves."""
        return self.blocks + self.head + self.embedding

    @property
    def peak(self) -> int:
        """At the height of the backward pass."""
        return self.kept + self.recomputed + self.working


def activation_bytes(variant: Variant, images: int, rule: ActivationRule) -> ActivationBytes:
    """What a micro-batch of `images` keeps, without those of the parameters.

    A ResNet stem is not counted.
    """
    tokens, width, element = variant.tokens, variant.embed_dim, rule.element
    kept = recomputed = 0
    whole = _block_bytes(variant, rule)
    for index, rate in reversed(list(enumerate(drop_path_rates(rule.drop_path_rate, variant.depth)))):
        taking, draws = _taking(variant, rule, images, rate)
        own = taking * tokens * whole
        entry = images * tokens * width * element
        added = taking * tokens * width * element * (taking < images)
        again = 0
        if rule.recomputes(index):
            again, own = own - entry, entry + added
        elif rule.recompute == "selective":
            products = taking * tokens * _product_bytes(variant, rule)
            again, own = own - entry - products, entry + products + added
        elif rule.recompute == "budget":
            again, own = round(own * (1 - rule.budget)), round(own * rule.budget)
        else:
            own += (1 if variant.parallel else 2) * added
        # What later blocks have kept is free by then.
        recomputed = max(recomputed, again - kept)
        kept += own + draws
    channels = variant.in_chans * variant.image_px[0] * variant.image_px[1]
    hidden = (2 if variant.act == "swiglu" else 1) * variant.mlp_hidden
    return ActivationBytes(
        blocks=kept,
        head=_head_bytes(variant, images, rule),
        embedding=images * (2 * channels * element + tokens * width * rule.mask),
        recomputed=recomputed,
        working=images * tokens * element * max(0, hidden - width * (variant.pool != "avg")),
    )


def _taking(variant: Variant, rule: ActivationRule, images: int, rate: float) -> tuple[int, int]:
    """Images that take a block's branches, and the bytes of what was drawn."""
    branches = 1 if variant.parallel else 2
    if rate == 0.0:
        return images, 0
    if not rule.drop_path_subset:
        return images, branches * images * rule.element
    taking = kept_samples(images, rate)
    return taking, branches * images * _INDEX_BYTES if taking < images else 0


def _block_bytes(variant: Variant, rule: ActivationRule) -> int:
    """What a block keeps of a token."""
    width, heads, branches = variant.embed_dim, variant.num_heads, 1 if variant.parallel else 2
    elements = 2 * branches * width + 4 * width + branches * width * bool(variant.layer_scale)
    extra = branches * rule.statistics + _FP32_BYTES * heads + rule.mask * 2 * width
    if variant.qk_norm:
        elements += 3 * width
        extra += 2 * heads * rule.statistics
    return rule.element * (elements + _mlp_elements(variant)) + extra + rule.mask * variant.mlp_hidden


def _mlp_elements(variant: Variant) -> int:
    return (4 if variant.act == "swiglu" else 2) * variant.mlp_hidden


def _product_bytes(variant: Variant, rule: ActivationRule) -> int:
    """What selective recomputation keeps of a token beside the block's input."""
    last = bool(variant.layer_scale or rule.drop_rate)
    hidden = (2 if variant.act == "swiglu" else 1) * variant.mlp_hidden
    return rule.element * (5 * variant.embed_dim + hidden + last * variant.embed_dim) + _FP32_BYTES * variant.num_heads


def _head_bytes(variant: Variant, images: int, rule: ActivationRule) -> int:
    """Final norm to loss."""
    width, element = variant.embed_dim, rule.element
    norm = variant.tokens * (width * element + rule.statistics)
    # The class token is a view, which keeps the whole of the norm's output.
    pooled = {"token": variant.tokens * width, "avg": width, "map": variant.patches * width}[variant.pool] * element
    constant = 0
    if variant.pool == "map":
        pooled += element * (2 * variant.patches * width + 4 * width + _mlp_elements(variant))
        pooled += _FP32_BYTES * variant.num_heads + rule.statistics
        constant = element * width
    heads = 2 if variant.distilled else 1
    logits = heads * variant.num_classes + variant.representation_size
    return images * (norm + pooled + element * logits) + constant
