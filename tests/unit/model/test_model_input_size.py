import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_models import OPTIONS, randomise, tiny
from timm.layers import resample_abs_pos_embed
from timm_twins import assert_close, outputs, timm_of_class
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitscale.errors import ConfigError
from vitscale.model import Resampling, create_model, forward_flops, resample_pos_embed
from vitscale.model.adapt import grid_resize

# Of 8 px a patch: smaller, larger, and of another shape than the 32 px that these models are made for.
SIZES = [16, 24, 40, 64, (16, 48)]
# timm resizes in its plain class only, whose parallel blocks are not ours.
LIKE_TIMMS = ("plain", "avg", "map", "registers", "map with registers", "layer scale", "oblong", "four channels")
OTHERS = ("distilled with registers", "parallel", "ViT-22B", "ResNet root", "ResNet stem", "representation", "no head")

grids = st.tuples(st.integers(1, 8), st.integers(1, 8))


def images_of(model, batch=2):
    shape = (batch, model.variant.in_chans, *model.input_variant.image_px)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def sizes_for(model):
    rows, columns = model.variant.patch_px
    return [(2 * rows, 2 * columns), (5 * rows, 5 * columns), (3 * rows, 6 * columns)]


def remade(model):
    """A model made for the size that the images have now, with the position embedding that timm makes of ours."""
    twin = create_model(**{"name": "vit_tiny_patch16_224", **model.input_variant.arguments()}).eval()
    old, prefix = model.variant, model.variant.prefix_tokens
    pos_embed = resample_abs_pos_embed(model.pos_embed, list(twin.variant.grid), list(old.grid), prefix)
    twin.load_state_dict(model.state_dict() | {"pos_embed": pos_embed})
    return twin


@given(grids, grids, st.sampled_from(get_args(Resampling)), st.integers(0, 3))
def test_the_matrix_resizes_as_the_function_does(old, new, method, prefix):
    # Larger than trained ones are; what is left over is the function's own rounding, which is fp32's.
    pos_embed = 0.3 * torch.randn(1, prefix + math.prod(old), 5, generator=torch.Generator().manual_seed(0))
    expected = resample_pos_embed(pos_embed, new, prefix, old_grid=old, method=method)[:, prefix:]
    found = grid_resize(old, new, method) @ pos_embed[:, prefix:].double()
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-6)
    if method == "timm":
        theirs = resample_abs_pos_embed(pos_embed, list(new), list(old), prefix)[:, prefix:]
        torch.testing.assert_close(found, theirs.double(), rtol=0, atol=1e-6)


@given(grids, grids)
def test_the_default_filter_is_pillows_bicubic(old, new):
    image = 0.3 * np.random.default_rng(0).standard_normal(old).astype(np.float32)
    theirs = np.array(Image.fromarray(image).resize(new[::-1], Image.Resampling.BICUBIC))
    ours = grid_resize(old, new) @ torch.from_numpy(image).double().flatten()
    torch.testing.assert_close(ours, torch.from_numpy(theirs).double().flatten(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LIKE_TIMMS)
@torch.no_grad()
def test_other_sizes_give_what_timm_gives_for_them(name):
    model = randomise(tiny(**OPTIONS[name]))
    twin = timm_of_class(model.variant, dynamic_img_size=True)
    twin.load_state_dict(model.state_dict(), strict=True, assign=True)
    for size in sizes_for(model):
        model.set_input_size(size)
        assert_close(outputs(model, images_of(model)), outputs(twin, images_of(model)))


@pytest.mark.parametrize("name", [*LIKE_TIMMS, *OTHERS])
@torch.no_grad()
def test_other_sizes_give_what_a_model_made_for_them_gives(name):
    model = randomise(tiny(**OPTIONS[name]))
    for size in sizes_for(model):
        model.set_input_size(size)
        twin = remade(model)
        assert twin.variant == model.input_variant
        assert_close(outputs(model, images_of(model)), outputs(twin, images_of(model)))
        for layer, expected in zip(
            model.get_intermediate_layers(images_of(model), 2, reshape=True),
            twin.get_intermediate_layers(images_of(model), 2, reshape=True),
            strict=True,
        ):
            assert layer.shape[2:] == twin.variant.grid
            torch.testing.assert_close(layer, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_tiny_patch16_224", [128, 160, 224, 384]),
        ("vit_huge_patch14_224", [126, 154, 168, 336]),
        ("vit_giant_patch14_224", [126, 154, 168]),
        ("vit_base_r50_s16_224", [128, 160]),
    ],
)
def test_the_sizes_of_a_schedule_have_the_flops_of_their_variant_and_the_resize(name, sizes):
    with torch.device("meta"):
        model = create_model(name, num_classes=10, depth=2)
    full = model.variant
    for size in sizes:
        model.set_input_size(size)
        now = model.input_variant
        assert now.patches == (size // now.patch_px[0]) ** 2
        assert model.variant is full
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, size, size, device="meta"))
        resize = 0 if size == 224 else 2 * now.patches * full.patches * full.embed_dim
        assert counter.get_total_flops() == forward_flops(now) + resize


@torch.no_grad()
def test_nothing_of_the_state_changes_and_the_own_size_comes_back():
    model = randomise(tiny(reg_tokens=2))
    images = images_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = list(model.buffers())
    expected = model(images)
    for size in SIZES:
        model.set_input_size(size)
        assert model(images_of(model)).shape == expected.shape
    assert model.input_variant.image_px == (16, 48)
    assert list(model.buffers()) == buffers
    model.set_input_size(None)
    assert model.input_variant == model.variant
    assert torch.equal(model(images), expected)
    model.set_input_size(24)
    model.set_input_size(32)
    assert torch.equal(model(images), expected)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_the_filter_is_the_one_that_is_asked_for():
    model = randomise(tiny())
    found = {}
    for method in get_args(Resampling):
        model.set_input_size(48, method)
        found[method] = model._position_embedding()
        expected = resample_pos_embed(model.pos_embed, (6, 6), 1, method=method)
        torch.testing.assert_close(found[method], expected, rtol=0, atol=1e-6)
    model.set_input_size(48)
    assert torch.equal(model._position_embedding(), found["timm"])
    assert not torch.equal(found["timm"], found["google"])


@pytest.mark.parametrize("size", [36, (32, 20), 0, 7])
def test_a_size_of_no_whole_number_of_patches_is_refused_and_the_model_stays(size):
    model = randomise(tiny())
    model.set_input_size(24)
    with pytest.raises(ConfigError) as caught:
        model.set_input_size(size)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.img_size ")
    assert model.input_variant.image_px == (24, 24)
    assert model(images_of(model)).shape == (2, 7)


def test_images_of_another_size_than_the_one_set_are_no_input():
    model = tiny()
    own = images_of(model)
    model.set_input_size(24)
    with pytest.raises(AssertionError, match=r"\(24, 24\) px"):
        model(own)


@pytest.mark.parametrize("size", [24, 56, (16, 48)])
def test_gradients_of_the_stored_embedding_are_those_through_the_resize(size):
    model = randomise(tiny(distilled=True)).double()
    model.set_input_size(size)
    twin = remade(model).double()
    probe = torch.randn(2, 7, dtype=torch.float64)
    for each in (model, twin):
        (each(images_of(model).double()) * probe).sum().backward()
    leaf = model.pos_embed.detach().clone().requires_grad_()
    resample_pos_embed(leaf, model.input_variant.grid, 2).backward(twin.pos_embed.grad)
    torch.testing.assert_close(model.pos_embed.grad, leaf.grad, rtol=1e-5, atol=1e-6)
    assert (model.pos_embed.grad.abs().amax(dim=2) > 0).all()  # every stored position learns


def test_gradients_are_the_same_bits_every_time():
    model = randomise(tiny())
    model.set_input_size(24)
    found = []
    for _ in range(3):
        model.zero_grad()
        model(images_of(model)).square().sum().backward()
        found.append(model.pos_embed.grad.clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@torch.no_grad()
def test_it_resizes_in_fp32_whatever_the_blocks_compute_in():
    model = randomise(tiny())
    model.set_input_size(56)
    expected = model._position_embedding()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model._position_embedding(), expected)
    model.bfloat16()
    found = model._position_embedding()
    assert found.dtype == torch.bfloat16
    rounded = resample_pos_embed(model.pos_embed.float(), (7, 7), 1)
    # Half a unit in the last place of bf16.
    torch.testing.assert_close(found.float(), rounded, rtol=2**-8, atol=1e-6)


@torch.no_grad()
def test_a_model_on_the_meta_device_can_be_set_before_it_has_weights():
    with torch.device("meta"):
        model = tiny()
        model.set_input_size(24)
    model.to_empty(device="cpu")
    randomise(model)
    assert_close(outputs(model, images_of(model)), outputs(remade(model), images_of(model)))


@torch.no_grad()
def test_it_compiles_once_a_size_and_into_one_graph():
    model = randomise(tiny())
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    graphs = []
    for size in (None, 24, 40, None, 40, 24):
        model.set_input_size(size)
        assert torch.equal(compiled(images_of(model)), model(images_of(model)))
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 3, 3, 3, 3]
    torch.compiler.reset()
