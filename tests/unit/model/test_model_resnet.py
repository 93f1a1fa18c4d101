import pytest
import torch
import torch.nn.functional as F
from small_models import count, images_for, randomise, tiny
from timm.layers import StdConv2dSame
from timm.models.vision_transformer_hybrid import _resnetv2
from torch.utils.flop_counter import FlopCounterMode

from vitscale.model import Variant
from vitscale.model.resnet import StdConv, Unit, build_stem, stem_chans, stem_flops, stem_parameters

STAGES = [(), (1,), (2,), (1, 2), (1, 1, 2), (1, 1, 1, 1)]


def standardised(weight, eps=1e-8):
    flat = weight.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    return (centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()).view_as(weight)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("size", [(8, 8), (9, 12), (5, 7)])
def test_a_standardised_convolution_equals_timms(kernel, stride, size):
    torch.manual_seed(0)
    ours = randomise(StdConv(4, 6, kernel, stride))
    theirs = StdConv2dSame(4, 6, kernel, stride, eps=1e-8)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 4, *size)
    out = ours(x)
    assert out.shape[2:] == tuple(-(-side // stride) for side in size)
    torch.testing.assert_close(out, theirs(x), rtol=0, atol=1e-6)


def test_kernels_are_standardised_each_on_its_own():
    conv = randomise(StdConv(4, 6, 3)).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(conv(x), F.conv2d(x, standardised(conv.weight), padding=1), rtol=0, atol=1e-12)
    conv.weight.data = conv.weight.data * torch.arange(1.0, 7.0).view(-1, 1, 1, 1) + 5
    # The epsilon is all that scale and shift leave behind.
    torch.testing.assert_close(conv(x), F.conv2d(x, standardised(conv.weight), padding=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stages", STAGES, ids=str)
@torch.no_grad()
def test_a_stem_equals_timms(stages):
    ours, theirs = randomise(build_stem(3, stages)), _resnetv2(stages)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(ours(images), theirs.eval()(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stages", STAGES, ids=str)
def test_a_stem_has_the_stride_channels_parameters_and_flops_that_are_computed(stages):
    variant = Variant(patch_size=1, embed_dim=8, depth=1, num_heads=1, img_size=(64, 96), in_chans=2, stem=stages)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        stem = build_stem(2, stages)
        cells = stem(torch.empty(1, 2, 64, 96))
    assert cells.shape == (1, stem_chans(stages), *variant.grid)
    assert counter.get_total_flops() == stem_flops(2, stages, (64, 96))
    assert count(stem) == stem_parameters(2, stages)


@pytest.mark.parametrize(("in_chans", "out_chans", "stride"), [(256, 256, 1), (128, 256, 1), (128, 256, 2)])
def test_a_unit_begins_as_its_shortcut(in_chans, out_chans, stride):
    torch.manual_seed(0)
    unit = Unit(in_chans, out_chans, stride)
    x = torch.randn(2, in_chans, 8, 8)
    assert not unit.norm3.weight.any()
    assert all(norm.weight.eq(1).all() for norm in (unit.norm1, unit.norm2))
    assert torch.equal(unit(x), F.relu(unit.downsample(x)))
    # Only a unit of the same shape on both sides has nothing to project.
    assert torch.equal(unit.downsample(x), x) == (in_chans == out_chans and stride == 1)
    torch.nn.init.ones_(unit.norm3.weight)
    assert not torch.equal(unit(x), F.relu(unit.downsample(x)))


def test_the_image_reaches_the_blocks_through_the_stem():
    model = randomise(tiny(stem=(1,), patch_size=2)).double()
    images = images_for(model).double()
    embed = model.patch_embed
    cells = embed.backbone(images)
    patches = F.conv2d(cells, embed.proj.weight, embed.proj.bias, stride=2).flatten(2).transpose(1, 2)
    assert cells.shape == (2, 256, 8, 8)
    torch.testing.assert_close(embed(images), patches, rtol=0, atol=1e-12)
