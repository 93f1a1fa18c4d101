"""From a config to an optimizer."""

from typing import Any

import torch

from vitscale.config import OptimSection
from vitscale.errors import ConfigError
from vitscale.optim.adafactor import Adafactor
from vitscale.optim.factoring import attention_shapes
from vitscale.optim.groups import DecayRule, parameter_groups
from vitscale.optim.lamb import Lamb
from vitscale.optim.segmented import SegmentedOptimizer
from vitscale.optim.segments import whole_parameters

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_optimizer(model: DecayRule, config: OptimSection) -> torch.optim.Optimizer:
    """The configured optimizer over the model's parameter groups, at the peak learning rate.

    The engine sets the rate before each update, and tells LAMB and Adafactor where it puts the parameters.

    Raises:
        ConfigError: a fused kernel for parameters that are not on a GPU.
    """
    groups = parameter_groups(model, config.weight_decay, config.head_weight_decay, config.layer_decay)
    optimizer = _create(model, config, groups)
    if isinstance(optimizer, SegmentedOptimizer):
        optimizer.bind(whole_parameters(model.named_parameters()), None)
    return optimizer


def check_fused(config: OptimSection, device: torch.device) -> None:
    """Refuse a fused kernel where there is none.

    Raises:
        ConfigError: the device is no GPU.
    """
    if config.fused and device.type != "cuda":
        raise ConfigError(f"optim.fused=true needs parameters on a GPU, this run's are on {device.type}: remove it")


def _create(model: DecayRule, config: OptimSection, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    device = next(parameter.device for group in groups for parameter in group["params"])
    lr, betas, eps = config.peak_lr, config.betas, config.eps
    if config.kind == "lamb":
        return Lamb(groups, lr, betas, eps)
    if config.kind == "adafactor":
        return Adafactor(groups, lr, config.momentum, _DTYPES[config.momentum_dtype], shapes=attention_shapes(model))
    check_fused(config, device)
    fused = device.type == "cuda" if config.fused is None else config.fused
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr, config.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr, betas, eps, fused=fused)
