import gc
import itertools
from functools import partial

import pytest
import torch
from small_models import OPTIONS, images_for, randomise, tiny
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vitscale.model import Execution, executed_train_flops, forward_flops, train_flops
from vitscale.model.drop_path import drop_path_rates, kept_samples

POLICIES = {
    "full": Execution(recompute="full"),
    "every_k": Execution(recompute="every_k", every=2),
    "selective": Execution(recompute="selective"),
}
BATCH = 8
# Options that change what a block or a head multiplies.
SHAPES = [OPTIONS[name] for name in ("plain", "parallel", "map", "layer scale", "SwiGLU", "distilled with registers")]


def step(model, images, seed=3):
    """Outputs and gradients of a training step whose dropout and drop path follow from the seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = model(images)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(output.square().sum() for output in outputs).backward()
    return [*(output.detach() for output in outputs), *(parameter.grad.clone() for parameter in model.parameters())]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_bitwise_the_same_with_every_policy(options):
    for mode in ("mask", "subset") if options in SHAPES else ("mask",):
        model = randomise(tiny(drop_rate=0.2, drop_path_rate=0.5, drop_path_mode=mode, **options)).train()
        images = images_for(model, BATCH)
        expected = step(model, images)
        assert all(value.any() for value in expected)
        for name, execution in POLICIES.items():
            model.set_execution(execution)
            assert equal(step(model, images), expected), (mode, name)
        assert not equal(step(model, images, seed=4), expected), "the seed has to matter"


def executed(model, execution, **drops):
    model.set_execution(execution)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(model, images_for(model, BATCH))
    return counter.get_total_flops(), executed_train_flops(model.variant, BATCH, execution=execution, **drops)


@pytest.mark.parametrize("options", SHAPES)
def test_torch_counts_the_flops_of_the_formula(options):
    drops = [
        {"drop_path_rate": 0.6},
        {"drop_path_rate": 0.6, "drop_path_mode": "subset"},
        {"drop_rate": 0.2},
    ]
    for drop, execution in itertools.product(drops, (Execution(), *POLICIES.values())):
        model = randomise(tiny(**options, **drop)).train()
        counted, formula = executed(model, execution, **drop)
        # The convention has two products behind each; nothing asks for the gradient of the images.
        patches = BATCH * 2 * model.patch_embed.proj.weight.numel() * model.variant.patches
        # And it counts by image, where a learned probe makes one query for the whole batch.
        queries = (BATCH - 1) * 3 * 2 * model.variant.embed_dim**2 if model.variant.pool == "map" else 0
        assert counted == formula - patches - queries, (drop, execution.recompute)


def test_the_recompute_factor_of_a_model_is_that_of_its_blocks():
    variant = tiny(depth=4).variant
    block = forward_flops(variant) - forward_flops(tiny(depth=3).variant)
    last = 2 * variant.tokens * variant.mlp_hidden * variant.embed_dim
    train = BATCH * train_flops(variant)
    assert executed_train_flops(variant, BATCH, execution=Execution()) == train
    assert executed_train_flops(variant, BATCH, execution=Execution(recompute="selective")) == train
    for execution, blocks in [
        (Execution(recompute="full"), 4),
        (Execution(recompute="every_k", every=1), 4),
        (Execution(recompute="every_k", every=2), 2),
        (Execution(recompute="every_k", every=3), 1),
        (Execution(recompute="every_k", every=5), 0),
    ]:
        more = executed_train_flops(variant, BATCH, execution=execution) - train
        assert more == BATCH * blocks * (block - last), execution
    kept = sum(kept_samples(BATCH, rate) for rate in drop_path_rates(0.5, 4))
    subset = executed_train_flops(variant, BATCH, execution=Execution(), drop_path_rate=0.5, drop_path_mode="subset")
    assert train - subset == (4 * BATCH - kept) * 3 * block


class Storages(TorchDispatchMode):
    """Every storage that operations write, with its size; those that are alive later can be asked for."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out


def kept_elements(model, images):
    """fp32 elements that live between forward and backward, without parameters, input and output."""
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), images)}
    with Storages() as storages:
        output = model(images)
    gc.collect()
    known.add(output.untyped_storage()._cdata)
    alive = (n for key, (ref, n) in storages.made.items() if key not in known and not ref.expired())
    return sum(alive) / 4


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("act", "halves"), [("gelu", 1), ("swiglu", 2)])
@pytest.mark.parametrize(
    ("embed_dim", "mlp_ratio", "num_heads"), [(48, 3, 4), pytest.param(32, 4, 2, marks=pytest.mark.slow)]
)
def test_what_a_block_keeps_a_token(embed_dim, mlp_ratio, num_heads, act, halves, parallel):
    """The closed formulas of docs and planner: elements of d, f = MLP width, h heads."""
    d, f, h, norms = embed_dim, embed_dim * mlp_ratio, num_heads, 1 if parallel else 2
    expected = {
        # In: the norms (with two statistics each), qkv, attention and its sums; the MLP's product and activation.
        "none": (6 if parallel else 8) * d + 2 * halves * f + h + 2 * norms,
        "selective": 6 * d + halves * f + h,
        "full": d,
    }
    for recompute, elements in expected.items():
        kept = {}
        for depth in (2, 3):
            model = tiny(
                embed_dim=d, mlp_ratio=mlp_ratio, num_heads=h, act=act, parallel=parallel, depth=depth, pool="avg"
            ).train()
            model.set_execution(Execution(recompute=recompute))
            kept[depth] = kept_elements(model, images_for(model))
        assert kept[3] - kept[2] == 2 * model.variant.tokens * elements, recompute
    assert expected["none"] > expected["selective"] > expected["full"]


def test_every_k_keeps_between_none_and_full():
    model = tiny(depth=6).train()
    images, kept = images_for(model), []
    for execution in (
        Execution(),
        Execution(recompute="every_k", every=3),
        Execution(recompute="every_k", every=2),
        Execution(recompute="full"),
    ):
        model.set_execution(execution)
        kept.append(kept_elements(model, images))
    none, thirds, halves, full = kept
    assert none - thirds == pytest.approx((none - full) / 3)
    assert none - halves == pytest.approx((none - full) / 2)


def test_evaluation_recomputes_nothing():
    model = randomise(tiny())
    images = images_for(model)
    expected = model(images)
    for execution in POLICIES.values():
        model.set_execution(execution)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert torch.equal(model(images), expected)
        assert counter.get_total_flops() > 0
        assert kept_elements_without_grad(model, images) == 0


def kept_elements_without_grad(model, images):
    with torch.no_grad():
        return kept_elements(model, images)


class Attentions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func) or func in (
            torch.ops.aten._softmax.default,
            torch.ops.aten._safe_softmax.default,
        ):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_attention_kernel_is_the_one_asked_for_in_the_recomputation_too(recompute):
    model = randomise(tiny(depth=2)).train()
    images, found = images_for(model), {}
    for attention in ("flash", "math"):
        model.set_execution(Execution(recompute=recompute, attention=attention))
        with Attentions() as seen:
            step(model, images)
        found[attention] = seen.names
    runs = 4 if recompute == "full" else 2
    assert sum("flash_attention_for_cpu.default" in name for name in found["flash"]) == runs
    assert len(found["flash"]) == runs + 2  # and each block's backward
    assert len(found["math"]) == runs
    assert not any("flash" in name for name in found["math"])
    model.set_execution(Execution(attention="cudnn"))
    with pytest.raises(RuntimeError, match="No viable backend"):
        model(images)


class Counting:
    """A backend of torch.compile that runs the graph as it is and counts the graphs."""

    def __init__(self):
        self.graphs = 0
        torch._dynamo.reset()

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward

    def execution(self, **options):
        return Execution(compiled=partial(torch.compile, backend=self, fullgraph=True, dynamic=False), **options)


@pytest.mark.parametrize("parallel", [False, True])
def test_blocks_of_one_shape_share_one_graph(parallel):
    """32 blocks have 32 rates: with the rate in the graph there would be as many of them."""
    model = randomise(tiny(depth=32, embed_dim=16, num_heads=2, drop_path_rate=0.4, parallel=parallel)).train()
    images = images_for(model, BATCH)
    expected = step(model, images)
    backend = Counting()
    model.set_execution(backend.execution())
    assert equal(step(model, images), expected)
    assert backend.graphs == 2, "the first block drops nothing"
    step(model, images, seed=9)
    assert backend.graphs == 2
    model.eval()
    with torch.no_grad():
        model(images)
    assert backend.graphs == 3


@pytest.mark.parametrize(("recompute", "graphs"), [("full", 2), ("selective", 2), ("every_k", 3)])
def test_recomputed_blocks_share_graphs_too(recompute, graphs):
    model = randomise(tiny(depth=7, drop_path_rate=0.4)).train()
    backend = Counting()
    model.set_execution(backend.execution(recompute=recompute, every=2))
    step(model, images_for(model, BATCH))
    assert backend.graphs == graphs


def test_subsets_have_a_graph_for_each_number_of_samples():
    model = randomise(tiny(depth=9, drop_path_rate=0.5, drop_path_mode="subset")).train()
    backend = Counting()
    model.set_execution(backend.execution())
    step(model, images_for(model, 4))
    assert backend.graphs == len({kept_samples(4, rate) for rate in drop_path_rates(0.5, 9)}) == 3


@pytest.mark.parametrize("mode", ["mask", "subset"])
@pytest.mark.parametrize("recompute", ["none", "full", "every_k", "selective"])
def test_a_compiled_step_draws_and_computes_what_the_plain_one_does(recompute, mode):
    model = randomise(tiny(depth=2, drop_path_rate=0.5, drop_path_mode=mode)).train()
    images = images_for(model, BATCH)
    expected = step(model, images)
    torch._dynamo.reset()
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    model.set_execution(Execution(recompute=recompute, every=2, compiled=compiled))
    for ours, theirs in zip(step(model, images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_a_compiled_dropout_is_the_same_in_the_recomputation(recompute):
    """Its random numbers need not be the plain one's, so the gradient is held against differences of the loss."""
    model = randomise(tiny(depth=1, drop_rate=0.3)).double().train()
    images, weight = images_for(model, 4).double(), model.blocks[0].mlp.fc1.weight
    torch._dynamo.reset()
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    model.set_execution(Execution(recompute=recompute, compiled=compiled))

    def loss():
        torch.manual_seed(5)
        return model(images).square().sum()

    def moved(shift):
        weight.data += shift
        value = loss().item()
        weight.data -= shift
        return value

    loss().backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    difference = (moved(1e-5 * direction) - moved(-1e-5 * direction)) / 2e-5
    assert (weight.grad * direction).sum().item() == pytest.approx(difference, rel=1e-5)
