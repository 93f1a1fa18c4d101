"""Whether a GPU computes what the CPU does: logits and gradients of one small model, kernel by kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitscale.losses import classification_loss
from vitscale.model import Execution, VisionTransformer, create_model
from vitscale.model.execution import AttentionKernel

CLASSES, IMAGES, IMAGE_PX = 100, 8, 112
KERNELS: tuple[AttentionKernel, ...] = ("auto", "flash", "cudnn", "efficient", "math")


@dataclass(frozen=True)
class Parity:
    """One way of computing beside the CPU's fp32; differences over the largest value of the CPU's."""

    way: str
    logits: float
    gradients: float
    failed: str = ""
    """Why it could not run."""


def compare_with_cpu(device: torch.device) -> list[Parity]:
    """fp32 and, with each attention kernel, bf16 on `device`."""
    model = _model()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, IMAGE_PX, IMAGE_PX, generator=generator)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    oracle = _outcome(model, images, labels)
    ways: list[tuple[torch.dtype, AttentionKernel]] = [(torch.float32, "auto")]
    ways += [(torch.bfloat16, kernel) for kernel in KERNELS]
    return [_compare(oracle, device, images, labels, *way) for way in ways]


def _model() -> VisionTransformer:
    torch.manual_seed(0)
    # Heads of 88 as in g/14, which kernels pad.
    return create_model(
        "vit_tiny_patch16_224", num_classes=CLASSES, img_size=IMAGE_PX, embed_dim=176, num_heads=2, depth=4,
        weight_init="trunc_normal",
    )  # fmt: skip


def _outcome(model: VisionTransformer, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, C] and all gradients [P], in fp32 on the CPU."""
    logits = model(images.to(model.pos_embed))
    assert isinstance(logits, Tensor)
    classification_loss("softmax")(logits, labels.to(logits.device)).backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return logits.detach().float().cpu(), torch.cat(gradients).float().cpu()


def _compare(
    oracle: tuple[Tensor, Tensor],
    device: torch.device,
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    kernel: AttentionKernel,
) -> Parity:
    way = f"{str(dtype).removeprefix('torch.')}, attention {kernel}"
    model = _model().to(device, dtype)
    model.set_execution(Execution(attention=kernel))
    try:
        found = _outcome(model, images.to(device), labels)
    except RuntimeError as error:
        return Parity(way, float("nan"), float("nan"), str(error).splitlines()[0])
    logits, gradients = (
        float((ours - right).abs().max() / right.abs().max()) for ours, right in zip(found, oracle, strict=True)
    )
    return Parity(way, logits, gradients)
