"""Files that Google's projects have written over the years: other numbers of submodules, other places of one tensor."""

import numpy as np
import pytest
import torch
from portable_models import random_portable

from vitscale.checkpoint import ExportOptions, Hints, read_portable, write_portable
from vitscale.errors import CheckpointError

# What a block of the original is called since Flax counts each class apart.
COUNTED_APART = {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "LayerNorm_2": "LayerNorm_1",
                 "MlpBlock_3": "MlpBlock_0"}  # fmt: skip


def arrays_of(model, folder, format_):
    write_portable(model, folder / "export", ExportOptions(format=format_))
    with np.load(folder / "export/model.npz") as file:
        return {key: file[key] for key in file.files if not key.startswith("vitscale/")}


def read_arrays(arrays, folder, **hints):
    np.savez(folder / "old.npz", **arrays)
    return read_portable(folder / "old.npz", hints=Hints(**hints))


def assert_same_weights(found, model):
    assert found.weights.keys() == model.weights.keys()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in model.weights.items())


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_original_with_todays_numbers_is_read(tmp_path, pool):
    model = random_portable(act="gelu_tanh", pool=pool, img_size=32, patch_size=8)
    arrays = arrays_of(model, tmp_path, "npz")
    for old, new in COUNTED_APART.items():
        arrays = {key.replace(f"/{old}/", f"/{new}/"): value for key, value in arrays.items()}
    found = read_arrays(arrays, tmp_path)
    assert found.variant == model.variant
    assert_same_weights(found, model)


@pytest.mark.parametrize("key", ["Transformer/pos_embedding", "pos_embedding"])
def test_big_vision_before_2022_had_a_row_for_the_class_token(tmp_path, key):
    model = random_portable(act="gelu_tanh", img_size=32, patch_size=8)
    arrays = arrays_of(model, tmp_path, "big_vision")
    del arrays["params/pos_embedding"]
    arrays[f"params/{key}"] = model.weights["pos_embed"].numpy()
    arrays["params/cls"] = model.weights["cls_token"].numpy()
    found = read_arrays(arrays, tmp_path)
    assert found.variant == model.variant
    assert_same_weights(found, model)


def test_a_scanned_checkpoint_is_refused_with_the_way_out(tmp_path):
    arrays = arrays_of(random_portable(act="gelu_tanh", depth=2), tmp_path, "big_vision")
    stacked = {key.replace("encoderblock_0", "encoderblock"): np.stack([value] * 2) for key, value in arrays.items()
               if "encoderblock_0" in key}  # fmt: skip
    rest = {key: value for key, value in arrays.items() if "encoderblock_" not in key}
    with pytest.raises(CheckpointError, match="a scanned checkpoint: unstack it with big_vision first"):
        read_arrays(rest | stacked, tmp_path)


def test_a_grid_of_one_more_than_a_square_is_not_taken_for_a_class_token(tmp_path):
    """2 x 5 patches are 3 x 3 and one more: the card says what they are."""
    model = random_portable(img_size=(16, 40), patch_size=8)
    write_portable(model, tmp_path / "out", ExportOptions(format="big_vision"))
    assert_same_weights(read_portable(tmp_path / "out"), model)


def test_a_size_that_was_told_and_does_not_fit_is_refused(tmp_path):
    arrays = arrays_of(random_portable(act="gelu_tanh", img_size=32, patch_size=8), tmp_path, "npz")
    with pytest.raises(
        CheckpointError, match=r"model.img_size=\(32, 64\) makes 33 tokens, the position embedding has 17"
    ):
        read_arrays(arrays, tmp_path, changes={"img_size": [32, 64]})
