import numpy as np
import torch

from vitscale.config import OptimSection
from vitscale.model import create_model
from vitscale.optim import build_optimizer


def model():
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, embed_dim=12, depth=1, num_heads=2)


def test_updates_equal_adamw_by_hand_in_float64():
    config = OptimSection(peak_lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    module = model().double()
    optimizer = build_optimizer(module, config)
    weights = {name: p.detach().numpy().copy() for name, p in module.named_parameters()}
    first = {name: np.zeros_like(w) for name, w in weights.items()}
    second = {name: np.zeros_like(w) for name, w in weights.items()}
    (b1, b2), generator = config.betas, torch.Generator().manual_seed(1)
    for update, lr in enumerate([0.02, 0.1, 0.05], start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in module.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            grad = parameter.grad.numpy()
            first[name] = b1 * first[name] + (1 - b1) * grad
            second[name] = b2 * second[name] + (1 - b2) * grad**2
            decay = config.weight_decay if grad.ndim > 1 and name not in {"pos_embed", "cls_token"} else 0.0
            direction = (first[name] / (1 - b1**update)) / (np.sqrt(second[name] / (1 - b2**update)) + config.eps)
            weights[name] = weights[name] * (1 - lr * decay) - lr * direction
        optimizer.step()
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-11, atol=1e-12, err_msg=name)


def test_groups_start_at_the_peak_rate_and_are_not_fused_on_a_cpu():
    optimizer = build_optimizer(model(), OptimSection(peak_lr=0.25))
    assert [(group["name"], group["lr"], group["fused"]) for group in optimizer.param_groups] == [
        ("decay", 0.25, False),
        ("no_decay", 0.25, False),
    ]
