import pytest
import scipy.ndimage
import torch
from timm.layers import resample_abs_pos_embed
from timm.models._manipulate import adapt_input_conv

from vitscale.errors import CheckpointError
from vitscale.model import adapt_in_chans, resample_pos_embed

SQUARES = [((14, 14), (24, 24)), ((14, 14), (7, 7)), ((16, 16), (37, 37)), ((3, 3), (4, 4)), ((2, 2), (1, 1))]
OBLONGS = [((14, 14), (7, 21)), ((4, 6), (6, 4)), ((3, 8), (5, 16)), ((1, 4), (2, 2)), ((5, 3), (5, 4))]
TIMM = {"timm": {}, "timm_npz": {"interpolation": "bilinear", "antialias": False}}


def pos_embed_of(grid, prefix, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, prefix + grid[0] * grid[1], 12, generator=generator).to(dtype)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("old", "new"), [*SQUARES, *OBLONGS])
@pytest.mark.parametrize("method", TIMM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timms_methods_equal_timm(method, old, new, prefix, dtype):
    pos_embed = pos_embed_of(old, prefix, dtype)
    ours = resample_pos_embed(pos_embed, new, prefix, old_grid=old, method=method)
    theirs = resample_abs_pos_embed(pos_embed, list(new), old_size=list(old), num_prefix_tokens=prefix, **TIMM[method])
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(ours[:, :prefix], pos_embed[:, :prefix])


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("old", "new"), [*SQUARES, *OBLONGS])
def test_googles_method_equals_what_googles_code_calls(old, new, prefix):
    pos_embed = pos_embed_of(old, prefix)
    ours = resample_pos_embed(pos_embed, new, prefix, old_grid=old, method="google")
    grid = pos_embed[0, prefix:].reshape(*old, -1).numpy()
    zoomed = scipy.ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
    torch.testing.assert_close(ours[0, prefix:], torch.from_numpy(zoomed).flatten(0, 1), rtol=0, atol=1e-6)
    assert torch.equal(ours[:, :prefix], pos_embed[:, :prefix])


def test_the_methods_differ_and_timms_is_the_default():
    pos_embed = pos_embed_of((4, 4), 1)
    timm, npz, google = (resample_pos_embed(pos_embed, (6, 6), 1, method=m) for m in ("timm", "timm_npz", "google"))
    assert torch.equal(resample_pos_embed(pos_embed, (6, 6), 1), timm)
    assert min((a - b).abs().max() for a, b in ((timm, npz), (npz, google), (google, timm))) > 0.01


def test_without_the_old_grid_it_is_a_square():
    pos_embed = pos_embed_of((4, 4), 2)
    assert torch.equal(
        resample_pos_embed(pos_embed, (2, 6), 2), resample_pos_embed(pos_embed, (2, 6), 2, old_grid=(4, 4))
    )


@pytest.mark.parametrize("grid", [(4, 4), (6, 5)])
@pytest.mark.parametrize("old_prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_the_first_prefix_tokens_stay_and_missing_ones_are_zero(old_prefix, prefix, grid):
    pos_embed = pos_embed_of((4, 4), old_prefix)
    out = resample_pos_embed(pos_embed, grid, prefix, old_prefix_tokens=old_prefix)
    kept = min(prefix, old_prefix)
    assert out.shape == (1, prefix + grid[0] * grid[1], 12)
    assert torch.equal(out[:, :kept], pos_embed[:, :kept])
    assert not out[:, kept:prefix].any()
    patches = pos_embed[:, old_prefix:]
    assert torch.equal(out[:, prefix:], patches if grid == (4, 4) else resample_pos_embed(patches, grid, 0))


@pytest.mark.parametrize("arguments", [{}, {"old_grid": (3, 3)}, {"old_prefix_tokens": 1}, {"method": "google"}])
def test_the_same_grid_and_prefix_are_untouched(arguments):
    pos_embed = torch.randn(1, 10, 4)
    assert resample_pos_embed(pos_embed, (3, 3), 1, **arguments) is pos_embed


def test_a_grid_of_another_shape_with_as_many_patches_is_resampled():
    pos_embed = pos_embed_of((2, 8), 0)
    out = resample_pos_embed(pos_embed, (4, 4), 0, old_grid=(2, 8))
    assert out.shape == pos_embed.shape
    assert not torch.equal(out, pos_embed)


@pytest.mark.parametrize(
    ("tokens", "prefix", "arguments", "counted"),
    [
        (10, 0, {}, "10 tokens less 0 before the patches are no grid of 3 x 3"),
        (10, 2, {}, "10 tokens less 2 before the patches are no grid of 2 x 2"),
        (10, 1, {"old_prefix_tokens": 4}, "10 tokens less 4 before the patches are no grid of 2 x 2"),
        (10, 1, {"old_grid": (2, 4)}, "10 tokens less 1 before the patches are no grid of 2 x 4"),
        (2, 2, {}, "2 tokens less 2 before the patches are no grid of 0 x 0"),
        (2, 5, {}, "2 tokens less 5 before the patches are no grid of 0 x 0"),
    ],
)
def test_tokens_that_are_no_grid(tokens, prefix, arguments, counted):
    with pytest.raises(CheckpointError) as caught:
        resample_pos_embed(torch.zeros(1, tokens, 4), (3, 3), prefix, **arguments)
    assert str(caught.value) == (
        f"pos_embed: {counted}: the checkpoint has another number of prefix tokens (model.pool, model.reg_tokens) "
        "or was made on images of another shape"
    )


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 6, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_are_adapted_as_timm_does(in_chans, dtype):
    weight = torch.randn(5, 3, 4, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.clone()
    ours = adapt_in_chans(weight, in_chans)
    assert ours.shape == (5, in_chans, 4, 2)
    assert ours.dtype == dtype
    assert torch.equal(weight, before)
    assert torch.equal(ours, adapt_input_conv(in_chans, weight))
    assert (ours is weight) == (in_chans == 3)


@pytest.mark.parametrize(("old", "new"), [(1, 3), (4, 2), (4, 6), (2, 1)])
def test_an_image_of_equal_channels_gives_what_it_gave_where_the_channels_divide(old, new):
    torch.manual_seed(0)
    weight = torch.ones(5, old, 2, 2) * torch.randn(5, 1, 2, 2)
    image = torch.randn(1, 1, 4, 4)
    before = torch.nn.functional.conv2d(image.expand(-1, old, -1, -1), weight)
    after = torch.nn.functional.conv2d(image.expand(-1, new, -1, -1), adapt_in_chans(weight, new))
    torch.testing.assert_close(after, before)
