"""From a config to an optimizer."""

import torch

from vitscale.config import OptimSection
from vitscale.optim.groups import DecayRule, parameter_groups


def build_optimizer(model: DecayRule, config: OptimSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over the model's decay groups, at the peak learning rate.

    The trainer sets the rate before each update. One fused kernel does the update where the parameters are
    on a GPU.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.peak_lr,
        betas=config.betas,
        eps=config.eps,
        fused=any(parameter.is_cuda for _, parameter in model.named_parameters()),
    )
