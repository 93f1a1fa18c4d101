"""Adafactor against a float64 loop over its formulas, and against timm's."""

import numpy as np
import pytest
import torch
from timm.optim.adafactor_bv import AdafactorBigVision

from vitscale.optim.adafactor import Adafactor
from vitscale.optim.segments import Flat, Segment, whole_parameters

SHAPES = {"qkv": (192, 40), "proj": (40, 64), "bias": (192,), "scalar": (), "embedding": (1, 50, 48), "small": (5, 33)}
BY_HEAD = {"qkv": (3, 2, 32, 40), "proj": (40, 2, 32)}
STEPS = 200


def gradients(step, dtype):
    generator = torch.Generator().manual_seed(step)
    return {n: (torch.randn(s, generator=generator) * 0.01).bfloat16().to(dtype) for n, s in SHAPES.items()}


def parameters(dtype):
    generator = torch.Generator().manual_seed(1000)
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def rate(step):
    return 0.01 / (1 + step / 50)


def train(weights, optimizer, steps):
    for step in range(steps):
        for name, gradient in gradients(step, torch.float64).items():
            weights[name].grad = gradient.to(weights[name].dtype)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
    return {name: weight.detach().double().numpy() for name, weight in weights.items()}


def root_of_second_moment(moments, squares, decay):
    """Of one matrix or vector, by the formulas of Shazeer and Stern."""
    if squares.ndim < 2 or min(squares.shape) < 32:
        moments["whole"] = decay * moments.get("whole", 0.0) + (1 - decay) * squares
        return np.sqrt(moments["whole"])
    moments["rows"] = decay * moments.get("rows", 0.0) + (1 - decay) * squares.mean(axis=1)
    moments["cols"] = decay * moments.get("cols", 0.0) + (1 - decay) * squares.mean(axis=0)
    return np.sqrt(np.outer(moments["rows"], moments["cols"]) / moments["rows"].mean())


def matrices(name, array):
    """The matrices that are factored apart, as writable views."""
    if name == "qkv":
        return [array.reshape(3, 2, 32, 40)[which, head] for which in range(3) for head in range(2)]
    if name == "proj":
        return [array.reshape(40, 2, 32)[:, head] for head in range(2)]
    return [array[0] if array.ndim == 3 else array]


def loop(steps, weight_decay):
    weights = {name: weight.detach().numpy().copy() for name, weight in parameters(torch.float64).items()}
    momentum = {name: np.zeros_like(weight) for name, weight in weights.items()}
    moments = {name: [{} for _ in matrices(name, weight)] for name, weight in weights.items()}
    for step in range(steps):
        decay = min(0.999, 1 - (step + 1) ** -0.8)
        for name, gradient in gradients(step, torch.float64).items():
            scaled = np.zeros_like(weights[name])
            parts = zip(moments[name], matrices(name, gradient.numpy()), matrices(name, scaled), strict=True)
            for kept, part, out in parts:
                out[...] = part / root_of_second_moment(kept, part**2 + 1e-30, decay)
            momentum[name] = 0.9 * momentum[name] + 0.1 * scaled
            weights[name] = weights[name] - rate(step) * (momentum[name] + weight_decay * weights[name])
    return weights


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_200_updates_equal_a_float64_loop(dtype, tolerance):
    weights = parameters(dtype)
    optimizer = Adafactor(list(weights.values()), momentum_dtype=dtype, weight_decay=0.3, shapes=BY_HEAD)
    optimizer.bind(whole_parameters(weights.items()), None)
    found = train(weights, optimizer, STEPS)
    for name, expected in loop(STEPS, 0.3).items():
        assert np.abs(found[name] - expected).max() <= tolerance * np.abs(expected).max(), name


def test_updates_equal_those_of_timm_where_no_head_is_told_apart():
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    found = train(ours, Adafactor(list(ours.values()), momentum_dtype=torch.float64, weight_decay=0.3), STEPS)
    oracle = AdafactorBigVision(
        list(theirs.values()), weight_decay=0.3, min_dim_size_to_factor=32, clipping_threshold=None,
        momentum_dtype=torch.float64,
    )  # fmt: skip
    for name, expected in train(theirs, oracle, STEPS).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-11, atol=1e-13, err_msg=name)


def test_momentum_in_bf16_is_rounded_between_steps_only():
    weights, exact = parameters(torch.float32), parameters(torch.float32)
    optimizer = Adafactor(list(weights.values()), momentum_dtype=torch.bfloat16)
    reference = Adafactor(list(exact.values()))
    assert all(np.array_equal(w, v) for w, v in zip(
        train(weights, optimizer, 1).values(), train(exact, reference, 1).values(), strict=True
    ))  # fmt: skip
    for weight, twin in zip(weights.values(), exact.values(), strict=True):
        kept, momentum = optimizer.state[weight]["exp_avg"], reference.state[twin]["exp_avg"]
        assert kept.dtype == torch.bfloat16
        assert torch.equal(kept, momentum.bfloat16())


def test_without_momentum_there_is_none_in_the_state():
    weights = parameters(torch.float32)
    optimizer = Adafactor(list(weights.values()), momentum=0.0)
    before = weights["bias"].detach().clone()
    train(weights, optimizer, 1)
    assert all("exp_avg" not in state for state in optimizer.state.values())
    # The first update is then the gradient's sign.
    moved = (before - weights["bias"].detach()) / rate(0)
    torch.testing.assert_close(moved, gradients(0, torch.float32)["bias"].sign(), rtol=1e-4, atol=1e-4)


def test_padding_of_a_flat_tensor_stays_as_it_is():
    flat = torch.nn.Parameter(torch.ones(40 * 33 + 5))
    optimizer = Adafactor([flat], lr=0.1)
    optimizer.bind([Flat(flat, (Segment("weight", (40, 33), 0, 0, 40 * 33),))], None)
    flat.grad = torch.ones_like(flat)
    optimizer.step()
    assert torch.equal(flat[-5:], torch.ones(5))
    torch.testing.assert_close(flat[:-5].detach(), torch.full((40 * 33,), 1 - 0.1 * 0.1))
