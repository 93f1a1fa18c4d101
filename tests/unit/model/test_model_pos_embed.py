import pytest
import torch
from timm.layers import resample_abs_pos_embed

from vitscale.errors import CheckpointError
from vitscale.model import resample_pos_embed


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 7), (16, 37), (3, 4), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_timm(prefix, old, new, dtype):
    generator = torch.Generator().manual_seed(0)
    pos_embed = torch.randn(1, prefix + old**2, 12, generator=generator).to(dtype)
    ours = resample_pos_embed(pos_embed, new, prefix)
    theirs = resample_abs_pos_embed(pos_embed, [new, new], num_prefix_tokens=prefix)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(ours[:, :prefix], pos_embed[:, :prefix])


def test_the_same_grid_is_untouched():
    pos_embed = torch.randn(1, 10, 4)
    assert resample_pos_embed(pos_embed, 3, 1) is pos_embed


def test_no_square_grid():
    message = "pos_embed: 10 tokens less 0 before the patches are no square grid"
    with pytest.raises(CheckpointError, match=message):
        resample_pos_embed(torch.zeros(1, 10, 4), 3, 0)
