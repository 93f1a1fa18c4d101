import numpy as np
import pytest
import torch
from pydantic import ValidationError

from vitscale.config import OptimSection
from vitscale.errors import ConfigError
from vitscale.model import create_model
from vitscale.optim import SegmentedOptimizer, build_optimizer
from vitscale.optim.build import check_fused


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


def test_each_kind_is_built_with_its_settings():
    module = model()
    sgd = build_optimizer(module, OptimSection(kind="sgd", peak_lr=0.03, momentum=0.8))
    assert type(sgd) is torch.optim.SGD
    assert {group["momentum"] for group in sgd.param_groups} == {0.8}
    lamb = build_optimizer(module, OptimSection(kind="lamb", peak_lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2))
    assert type(lamb).__name__ == "Lamb"
    assert [(g["name"], g["betas"], g["eps"], g["weight_decay"]) for g in lamb.param_groups] == [
        ("decay", (0.8, 0.9), 1e-6, 0.2),
        ("no_decay", (0.8, 0.9), 1e-6, 0.0),
    ]
    section = OptimSection(kind="adafactor", peak_lr=0.1, momentum_dtype="bf16", weight_decay=0.03, head_weight_decay=3)
    adafactor = build_optimizer(module, section)
    assert isinstance(adafactor, SegmentedOptimizer)
    assert [g["weight_decay"] for g in adafactor.param_groups] == [0.03, 3.0, 0.0]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    adafactor.step()
    assert {state["exp_avg"].dtype for state in adafactor.state.values()} == {torch.bfloat16}


def test_adafactor_factors_attention_by_head():
    torch.manual_seed(0)
    module = create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, embed_dim=64, depth=1, num_heads=2)
    optimizer = build_optimizer(module, OptimSection(kind="adafactor", peak_lr=0.1))
    found = {n: s for p in module.parameters() for n, s in optimizer.parameter_state(p)}
    rows, cols = (found["blocks.0.attn.qkv.weight"][key].numel() for key in ("exp_avg_sq_row", "exp_avg_sq_col"))
    assert (rows, cols) == (3 * 64, 3 * 2 * 64)
    assert found.keys() == {
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    }


def test_a_fused_kernel_without_a_gpu_is_refused():
    config = OptimSection(peak_lr=0.1, fused=True)
    with pytest.raises(
        ConfigError, match=r"optim\.fused=true needs parameters on a GPU, this run's are on cpu: remove it"
    ):
        build_optimizer(model(), config)
    check_fused(config, torch.device("cuda"))
    check_fused(OptimSection(peak_lr=0.1), torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sgd", "betas": (0.9, 0.95)}, "betas is for adamw and lamb, kind is sgd: remove it"),
        ({"kind": "adafactor", "eps": 1e-6}, "eps is for adamw and lamb, kind is adafactor: remove it"),
        ({"momentum": 0.8}, "momentum is for sgd and adafactor, kind is adamw: remove it"),
        ({"kind": "sgd", "momentum_dtype": "bf16"}, "momentum_dtype is for adafactor, kind is sgd: remove it"),
        ({"kind": "lamb", "weight_decay": 0.1, "fused": False}, "fused is for adamw and sgd, kind is lamb: remove it"),
        ({"kind": "lamb"}, "lamb adapts the rates of decayed parameters only: give weight_decay, or use kind adamw"),
        ({"kind": "adafactor", "momentum": 0.0, "momentum_dtype": "bf16"}, "momentum_dtype has no effect"),
    ],
)
def test_what_has_no_effect_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        OptimSection(peak_lr=0.1, **settings)
