"""Our ViT's forward and backward pass beside timm's, with the same weights and images, in fp32."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitscale.bench.turns import Ratio, median_ms, ratio, take_turns
from vitscale.errors import ConfigError
from vitscale.model import Execution, VisionTransformer, create_model

OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
"""Of a parameter's gradient, over its largest element."""
EAGER, WHOLE, BLOCKS = "eager / eager", "compiled / compiled, whole models", "compiled / compiled, ours block by block"


@dataclass(frozen=True)
class TimmRow:
    """One variant run one way."""

    name: str
    way: str
    output_difference: float
    gradient_difference: float
    ours_ms: float
    timm_ms: float
    ratio: Ratio


def compare_with_timm(name: str, micro_batch: int, pairs: int, *, compiled: bool) -> Iterator[TimmRow]:
    """Check that both compute the same, then time forward and backward of both in turn.

    Args:
        name: a variant that timm has under the same name.
        micro_batch: images of a pass.
        pairs: counted pairs.
        compiled: compile both, instead of running both as they are; ours as a whole and block by block.

    Raises:
        ConfigError: timm is not installed.
    """
    ours, theirs = _twins(name)
    images = torch.randn(micro_batch, 3, *ours.variant.image_px, generator=torch.Generator().manual_seed(1))
    probe = torch.randn(micro_batch, ours.variant.num_classes, generator=torch.Generator().manual_seed(2))
    contenders: dict[str, nn.Module] = {EAGER: ours}
    if compiled:
        compile_: Callable[[Any], Any] = partial(torch.compile, dynamic=False, fullgraph=True)
        theirs = compile_(theirs)
        in_blocks = _copy(name, ours)
        in_blocks.set_execution(Execution(compiled=compile_))
        contenders = {WHOLE: compile_(ours), BLOCKS: in_blocks}
    expected = _pass(theirs, images, probe)
    differences = {way: _differences(_pass(model, images, probe), expected) for way, model in contenders.items()}
    for output, gradient in differences.values():
        assert output <= OUTPUT_TOLERANCE, f"{name}: outputs differ from timm's by {output:.1e}"
        assert gradient <= GRADIENT_TOLERANCE, f"{name}: gradients differ from timm's by {gradient:.1e}"

    def work(model: nn.Module) -> Callable[[], object]:
        return lambda: _run(model, images, probe)

    times = take_turns({"timm": work(theirs)} | {way: work(model) for way, model in contenders.items()}, pairs)
    for way, (output, gradient) in differences.items():
        compared = ratio(times[way], times["timm"])
        yield TimmRow(name, way, output, gradient, median_ms(times[way]), median_ms(times["timm"]), compared)


def _twins(name: str) -> tuple[VisionTransformer, nn.Module]:
    """Both models in training mode with the same weights, none of which is 0 as a fresh head's are."""
    if importlib.util.find_spec("timm") is None:
        raise ConfigError("vitscale bench step --rows timm needs timm: pip install timm")
    torch.manual_seed(0)
    ours = create_model(name, num_classes=1000, weight_init="trunc_normal").train()
    theirs = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=1000).train()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _copy(name: str, model: VisionTransformer) -> VisionTransformer:
    copy = create_model(name, num_classes=1000).train()
    copy.load_state_dict(model.state_dict())
    return copy


def _run(model: nn.Module, images: Tensor, probe: Tensor) -> Tensor:
    for parameter in model.parameters():
        parameter.grad = None
    logits: Tensor = model(images)
    (logits * probe).sum().backward()  # type: ignore[no-untyped-call]
    return logits.detach()


def _pass(model: nn.Module, images: Tensor, probe: Tensor) -> dict[str, Tensor]:
    """Logits, and gradients by name."""
    logits = _run(model, images, probe)
    # A compiled model's parameters lie a level deeper.
    named = ((name.removeprefix("_orig_mod."), parameter.grad) for name, parameter in model.named_parameters())
    return {"logits": logits} | {name: gradient.clone() for name, gradient in named if gradient is not None}


def _differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, float]:
    """The largest of the logits, and of the gradients over the largest element of each parameter's."""
    assert ours.keys() == theirs.keys()
    apart = {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}
    relative = (apart[name] / theirs[name].abs().max().item() for name in apart if name != "logits")
    return apart["logits"], max(relative)
