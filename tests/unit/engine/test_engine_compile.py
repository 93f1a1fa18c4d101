import sys
from types import ModuleType

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch._dynamo.utils import counters

from vitscale.config import EngineSection
from vitscale.engine.compile import check_execution, convert_to_fp8, prepare_model, takes_fp8
from vitscale.errors import ConfigError
from vitscale.model import create_model

CPU = torch.device("cpu")


def micro(depth=1, **options):
    torch.manual_seed(0)
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "representation_size": 16}
    return create_model("vit_tiny_patch16_224", num_classes=16, depth=depth, **arguments, **options).train()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"activation_checkpointing": "every_k"}, "give engine.checkpoint_every"),
        ({"activation_checkpointing": "full", "checkpoint_every": 2}, "remove engine.checkpoint_every"),
        ({"activation_checkpointing": "budget", "compile": True}, "give engine.activation_budget"),
        ({"activation_budget": 0.5}, "remove engine.activation_budget"),
        ({"activation_checkpointing": "budget", "activation_budget": 0.5}, "set engine.compile=true or use selective"),
        ({"fp8": True}, "set engine.compile=true or engine.fp8=false"),
        ({"fp8": True, "compile": True, "zero_stage": 3}, "use engine.zero_stage=2 or engine.fp8=false"),
        ({"fp8": True, "compile": True, "precision": "fp32"}, "set engine.precision=bf16 or engine.fp8=false"),
    ],
)
def test_what_cannot_run_anywhere_is_refused_with_the_mend(keys, message):
    with pytest.raises(ValidationError) as caught:
        EngineSection(**keys)
    (error,) = caught.value.errors()
    assert message in error["msg"]
    assert "\n" not in error["msg"]


def test_every_policy_can_be_asked_for():
    for keys in (
        {"activation_checkpointing": "every_k", "checkpoint_every": 3},
        {"activation_checkpointing": "budget", "activation_budget": 0.5, "compile": True},
        {"activation_checkpointing": "selective"},
        {"fp8": True, "compile": True, "zero_stage": 2, "precision": "bf16"},
    ):
        section = EngineSection(**keys)
        assert keys.items() <= section.model_dump().items()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kernel", "there"), [("flash", True), ("math", True), ("cudnn", False), ("efficient", False)])
def test_an_attention_kernel_that_is_not_there_is_refused(kernel, there, precision):
    engine = EngineSection(attention=kernel)
    if there:
        return check_execution(engine, precision, CPU, 16)
    with pytest.raises(ConfigError) as caught:
        check_execution(engine, precision, CPU, 16)
    expected = (
        f"engine.attention={kernel} does not run on cpu in {precision} with heads of 16: use engine.attention=auto"
    )
    assert str(caught.value) == expected
    with pytest.raises(ConfigError, match="does not run on cpu"):
        prepare_model(micro(), engine, precision=precision, device=CPU)


FP8 = EngineSection(fp8=True, compile=True, zero_stage=1)


@pytest.mark.parametrize(
    ("device", "capability", "precision", "installed", "message"),
    [
        ("cpu", None, "bf16", True, "needs an NVIDIA GPU of compute capability 8.9, not cpu"),
        ("cuda", (8, 0), "bf16", True, "needs compute capability 8.9, the GPU has 8.0"),
        ("cuda", (9, 0), "fp32", True, "engine.precision is fp32: set it to bf16"),
        ("cuda", (9, 0), "bf16", False, r"needs torchao: pip install 'vitscale\[fp8\]'"),
        ("cuda", (8, 9), "bf16", True, None),
    ],
)
def test_float8_is_refused_with_the_reason(monkeypatch, device, capability, precision, installed, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    module = ModuleType("torchao")
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "torchao", module if installed else None)
    if not installed:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    if message is None:
        return check_execution(FP8, precision, torch.device(device), 64)
    with pytest.raises(ConfigError, match=message):
        check_execution(FP8, precision, torch.device(device), 64)


def test_float8_takes_the_blocks_linears_and_neither_head_nor_odd_shapes(monkeypatch):
    """Against torchao's interface: it walks the module and asks the filter about every linear layer by name."""
    converted = []

    def convert_to_float8_training(module, *, module_filter_fn=None, config=None):
        found = ((name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear))
        converted.extend(name for name, child in found if module_filter_fn(child, name))
        return module

    fake = ModuleType("torchao.float8")
    fake.convert_to_float8_training = convert_to_float8_training
    monkeypatch.setitem(sys.modules, "torchao.float8", fake)
    model = micro(depth=2)
    convert_to_fp8(model.blocks)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert sorted(converted) == sorted(f"{index}.{layer}" for index in range(2) for layer in layers)
    assert [takes_fp8(nn.Linear(*sides)) for sides in [(32, 48), (32, 40), (40, 32)]] == [True, False, False]
    assert not takes_fp8(nn.LayerNorm(32))


def kept_bytes(model, images):
    """What autograd keeps, parameters left out: each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for pointer, size in storages.items() if pointer not in known)


def test_a_budget_keeps_less_and_computes_the_same():
    """Compiled by Inductor, since the budget is its own."""
    model, images = micro(drop_path_rate=0.5, weight_init="trunc_normal"), torch.randn(4, 3, 16, 16)
    gradients, kept = [], []
    for keys in ({}, {"compile": True, "activation_checkpointing": "budget", "activation_budget": 0.3}):
        torch._dynamo.reset()
        counters.clear()
        prepare_model(model, EngineSection(**keys), precision="fp32", device=CPU)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        kept.append(kept_bytes(model, images))
    for plain, compiled in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
    assert kept[1] < 0.7 * kept[0]
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})
