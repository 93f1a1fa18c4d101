"""Which arithmetic a device is fit for."""

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def resolve_precision(asked: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """The precision to use on `device`: auto takes bf16 where the hardware multiplies it natively, else fp32.

    A CPU without AMX or AVX512-bf16 emulates bf16 at a tenth of its fp32 speed or less, so it gets fp32.
    """
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
