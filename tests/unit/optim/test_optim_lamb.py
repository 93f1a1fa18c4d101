"""LAMB against a float64 loop over its formulas, and against timm's."""

import numpy as np
import pytest
import torch
from timm.optim.lamb import Lamb as TimmLamb

from vitscale.optim.lamb import Lamb

SHAPES = {"weight": (40, 33), "bias": (40,), "kernel": (7, 3, 2, 2), "norm": (33,), "scalar": ()}
DECAYED = ("weight", "kernel")
STEPS = 200


def parameters(dtype):
    generator = torch.Generator().manual_seed(1000)
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return {n: (torch.randn(s, generator=generator) * 0.01).bfloat16().double() for n, s in SHAPES.items()}


def groups(weights):
    return [
        {"params": [weights[name] for name in DECAYED], "weight_decay": 0.1},
        {"params": [weights[name] for name in SHAPES if name not in DECAYED], "weight_decay": 0.0},
    ]


def train(weights, optimizer, steps=STEPS):
    for step in range(steps):
        for name, gradient in gradients(step).items():
            weights[name].grad = gradient.to(weights[name].dtype)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step / 50)
        optimizer.step()
    return {name: weight.detach().double().numpy() for name, weight in weights.items()}


def loop():
    weights = {name: weight.detach().numpy().copy() for name, weight in parameters(torch.float64).items()}
    first = {name: np.zeros_like(weight) for name, weight in weights.items()}
    second = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            first[name] = 0.8 * first[name] + 0.2 * gradient.numpy()
            second[name] = 0.95 * second[name] + 0.05 * gradient.numpy() ** 2
            corrected = first[name] / (1 - 0.8 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
            direction = corrected[0] / (np.sqrt(corrected[1]) + 1e-6)
            ratio = 1.0
            if name in DECAYED:
                direction = direction + 0.1 * weights[name]
                ratio = np.sqrt((weights[name] ** 2).sum()) / np.sqrt((direction**2).sum())
            weights[name] = weights[name] - 0.01 / (1 + step / 50) * ratio * direction
    return weights


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_200_updates_equal_a_float64_loop(dtype, tolerance):
    weights = parameters(dtype)
    found = train(weights, Lamb(groups(weights), betas=(0.8, 0.95), eps=1e-6))
    for name, expected in loop().items():
        assert np.abs(found[name] - expected).max() <= tolerance * np.abs(expected).max(), name


def test_updates_equal_those_of_timm_without_its_clipping():
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    found = train(ours, Lamb(groups(ours), betas=(0.8, 0.95), eps=1e-6))
    oracle = TimmLamb(groups(theirs), betas=(0.8, 0.95), eps=1e-6, max_grad_norm=None)
    for name, expected in train(theirs, oracle).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-11, atol=1e-13, err_msg=name)


def test_zero_weights_move_by_the_rate_alone():
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.ones(3, 4)
    Lamb([weight], lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 4), -0.1))


def test_parameters_without_gradient_keep_their_state():
    still, moving = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = Lamb([still, moving], weight_decay=0.1)
    moving.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(still, torch.ones(2, 2))
    assert still not in optimizer.state
