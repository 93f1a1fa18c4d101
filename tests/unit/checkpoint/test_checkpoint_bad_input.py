"""Files from outside that are no model, not the model they are said to be, or hostile: one clear line, nothing run."""

import argparse
import inspect
import json
import os
import pickle
import random
import struct
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from portable_models import random_portable, with_weights
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer as TimmViT

from vitscale.checkpoint import FORMATS, ExportOptions, Hints, format_of, read_portable, record_file, write_portable
from vitscale.checkpoint.containers import open_tensors
from vitscale.errors import CheckpointError, ConfigError
from vitscale.model import VARIANTS, VisionTransformer

TINY = "vit_tiny_patch16_224"
# What the small models of these tests are, to a reader of a file that does not say it.
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def refusal(path, hints=None):
    """The line with which a file is refused, at the latest when the model is built."""
    with pytest.raises(CheckpointError) as caught:
        read_portable(path, hints=hints).build()
    said = str(caught.value)
    assert said.isprintable(), said  # one line, without a terminal's colours
    return said


@cache
def files_of(format_, **changes):
    """What an export consists of."""
    with TemporaryDirectory() as folder:
        FORMATS[format_].write(random_portable(**changes), Path(folder), "fp32")
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def written(folder, format_="vitscale", **changes):
    """A sound export."""
    folder.mkdir()
    for name, content in files_of(format_, **changes).items():
        (folder / name).write_bytes(content)
    return folder


def bare_npz(tmp_path, format_="npz", **changes):
    """The arrays of an export without their card, as Google publishes them."""
    return (written(tmp_path / "export", format_, **changes) / "model.npz").rename(tmp_path / "google.npz")


def state_of(model):
    return {name: model.weights[name] for name in model.shapes}


def edit(path, **changes):
    """Set keys of a JSON file; a function gets the old value."""
    tree = json.loads(path.read_text())
    tree |= {key: value(tree[key]) if callable(value) else value for key, value in changes.items()}
    path.write_text(json.dumps(tree))


def without_key(path, key):
    tree = json.loads(path.read_text())
    del tree[key]
    path.write_text(json.dumps(tree))


# Tensors that do not fit.

# Where each format keeps the last norm's scale of the second block, in which file, and under which prefix.
PLACES = {
    "vitscale": ("model.safetensors", "", "blocks.1.norm2.weight"),
    "timm": ("model.safetensors", "", "blocks.1.norm2.weight"),
    "hf": ("model.safetensors", "", "vit.encoder.layer.1.layernorm_after.weight"),
    "npz": ("model.npz", "", "Transformer/encoderblock_1/LayerNorm_2/scale"),
    "big_vision": ("model.npz", "params/", "Transformer/encoderblock_1/LayerNorm_1/scale"),
    "state_dict": ("bare.pth", "", "blocks.1.norm2.weight"),
}


def changed(tmp_path, format_, change):
    """An export whose tensors were changed before it was written; its path and the name of the file of weights."""
    name, prefix, key = PLACES[format_]
    if format_ == "state_dict":
        state = state_of(random_portable())
        change(state, key)
        torch.save(state, tmp_path / name)
        return tmp_path / name
    folder = written(tmp_path / "export", format_)
    path = folder / name
    if name.endswith("npz"):
        with np.load(path) as arrays:
            tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        change(tensors, prefix + key)
        np.savez(path, **{key: tensor.numpy() for key, tensor in tensors.items()})
    else:
        tensors = load_file(path)
        change(tensors, key)
        save_file(tensors, path)
    if (folder / "card.json").exists():  # not damaged on the way, but wrong from the start
        edit(folder / "card.json", weights=record_file(path).model_dump())
    return folder


def needed(format_):
    """What has to be said of a file that does not say it itself."""
    return Hints(TINY, SMALL) if format_ == "state_dict" else None


@pytest.mark.parametrize("format_", PLACES)
def test_the_place_of_a_format_is_one_it_has(tmp_path, format_):
    """The tests below would pass with any key that is not there."""
    seen = []
    path = changed(tmp_path, format_, lambda tensors, key: seen.append(tuple(tensors[key].shape)))
    assert seen == [(24,)]
    read_portable(path, hints=needed(format_)).build()


@pytest.mark.parametrize("format_", PLACES)
def test_a_missing_tensor_is_named_with_its_shape(tmp_path, format_):
    file, _, key = PLACES[format_]
    path = changed(tmp_path, format_, lambda tensors, key: tensors.pop(key))
    said = refusal(path, needed(format_))
    assert f"{file}: {key} [24] is missing" in said


@pytest.mark.parametrize("format_", PLACES)
def test_a_tensor_of_another_shape_is_named_with_both(tmp_path, format_):
    file, _, key = PLACES[format_]
    path = changed(tmp_path, format_, lambda tensors, key: tensors.update({key: torch.ones(25)}))
    said = refusal(path, needed(format_))
    assert f"{file}: {key} has shape [25], the model wants [24]" in said


@pytest.mark.parametrize("format_", PLACES)
def test_tensors_that_have_no_place_are_named_and_counted(tmp_path, format_):
    file, _, key = PLACES[format_]

    def add(tensors, key):
        tensors |= {f"{key}_a": torch.ones(2, 3), f"{key}_b": torch.ones(1), f"{key}_c": torch.ones(1)}

    said = refusal(changed(tmp_path, format_, add), needed(format_))
    assert f"{file}: {key}_a [2, 3] has no place in this model (and 2 more)" in said


@pytest.mark.parametrize(
    ("format_", "mend"),
    [
        ("timm", "config.json says vit_tiny_patch16_224"),
        ("hf", "config.json says ViTForImageClassification"),
        ("npz", "it was taken for vit_tiny_patch16_224: leave --model out"),
        ("state_dict", "it was taken for vit_tiny_patch16_224: say what it is with --model"),
    ],
)
def test_the_line_about_a_tensor_says_what_to_look_at(tmp_path, format_, mend):
    path = changed(tmp_path, format_, lambda tensors, key: tensors.pop(key))
    if format_ == "npz":
        (path / "card.json").unlink()
    assert mend in refusal(path, Hints(TINY, SMALL))


@pytest.mark.parametrize("format_", PLACES)
def test_values_that_are_no_numbers_are_counted_when_the_model_is_built(tmp_path, format_):
    def spoil(tensors, key):
        tensors[key][3:5] = torch.tensor([float("nan"), float("-inf")])

    said = refusal(changed(tmp_path, format_, spoil), needed(format_))
    assert "blocks.1.norm2.weight: 2 of 24 values are NaN or infinite" in said
    assert "damaged or of a run that diverged" in said


@pytest.mark.parametrize("format_", FORMATS)
def test_values_that_are_no_numbers_are_never_exported(tmp_path, format_):
    model = random_portable()
    spoilt = model.weights["blocks.0.attn.qkv.weight"].clone()
    spoilt[7, 7] = float("inf")
    with pytest.raises(CheckpointError) as caught:
        write_portable(
            with_weights(model, blocks__0__attn__qkv__weight=spoilt), tmp_path / "out", ExportOptions(format_)
        )
    assert "run/step-00000001: blocks.0.attn.qkv.weight: 1 of 1728 values are NaN or infinite" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_what_a_key_says_to_a_terminal_is_not_passed_on(tmp_path, suffix):
    key = "Transformer/\x1b]0;owned\x07\nall is well"
    if suffix == ".npz":
        with np.load(bare_npz(tmp_path)) as arrays:
            np.savez(tmp_path / "x.npz", **{**arrays, key: np.ones(2)})
    else:
        state = state_of(random_portable()) | {key: torch.ones(2)}
        (save_file if suffix == ".safetensors" else torch.save)(state, tmp_path / f"x{suffix}")
    said = refusal(tmp_path / f"x{suffix}", Hints(TINY, SMALL))
    assert "Transformer/?]0;owned? all is well [2] has no place" in said


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_resnet_is_no_vision_transformer(tmp_path, suffix):
    state = {
        "conv1.weight": torch.ones(8, 3, 7, 7),
        "layer1.0.bn1.weight": torch.ones(8),
        "fc.weight": torch.ones(5, 8),
    }
    path = tmp_path / f"resnet{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    said = refusal(path, Hints(TINY))
    assert f"{path}: patch_embed.proj.weight is missing: this is no Vision Transformer with timm's names" in said


def test_arrays_of_another_network_are_no_vision_transformer(tmp_path):
    np.savez(tmp_path / "bit.npz", **{"resnet/root_block/standardized_conv2d/kernel": np.ones((7, 7, 3, 64))})
    said = refusal(tmp_path / "bit.npz")
    assert f"{tmp_path / 'bit.npz'}: embedding/kernel is missing: no Vision Transformer of Google's" in said


def test_a_vision_transformer_of_another_width_is_named_with_both_shapes(tmp_path):
    torch.save(state_of(random_portable(patch_size=16)), tmp_path / "narrow.pth")
    said = refusal(tmp_path / "narrow.pth", Hints(TINY))
    assert "narrow.pth: cls_token has shape [1, 1, 24], the model wants [1, 1, 192]" in said
    assert "--model" in said


def test_an_npz_of_another_width_is_named_with_both_shapes(tmp_path):
    said = refusal(bare_npz(tmp_path, patch_size=16), Hints(TINY))
    assert "google.npz: embedding/kernel has shape [16, 16, 3, 24], the model wants [16, 16, 3, 192]" in said
    assert "--model" in said


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("pos_embed", (17,)),
        ("patch_embed.proj.weight", (24,)),
        ("head.weight", (5,)),
        ("pos_embed", (1, 17, 24, 1)),
        ("patch_embed.proj.weight", (24, 0, 8, 8)),
    ],
)
def test_a_tensor_of_other_dimensions_than_a_vision_transformers_is_named(tmp_path, key, shape):
    torch.save(state_of(random_portable()) | {key: torch.ones(shape)}, tmp_path / "odd.pth")
    said = refusal(tmp_path / "odd.pth", Hints(TINY, SMALL))
    assert f"odd.pth: {key} has shape {list(shape)}" in said


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("embedding/kernel", (192, 24)),  # big_vision's NaFlex embeds flat patches
        ("Transformer/posembed_input/pos_embedding", (17, 24)),
        ("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel", (24, 24)),
        ("Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel", (24,)),
        ("head/kernel", (5,)),
        ("embedding/kernel", (8, 8, 3, 0)),
    ],
)
def test_an_array_of_other_dimensions_than_googles_is_named(tmp_path, key, shape):
    folder = written(tmp_path / "export", "npz")
    with np.load(folder / "model.npz") as arrays:
        np.savez(tmp_path / "odd.npz", **{**arrays, key: np.ones(shape)})
    said = refusal(tmp_path / "odd.npz")
    assert f"odd.npz: {key} has shape {list(shape)}, where" in said


# Code.


class Canary:
    """Unpickled, it creates a file."""

    def __init__(self, path, how="open"):
        self.path, self.how = str(path), how

    def __reduce__(self):
        return {
            "open": (open, (self.path, "w")),
            "system": (os.system, (f"touch {self.path}",)),
            "exec": (exec, (f"open({self.path!r}, 'w')",)),
        }[self.how]


def plainly_pickled(path, protocol):
    return lambda obj: path.write_bytes(pickle.dumps(obj, protocol=protocol))


def as_objects(path, canary):
    np.savez(path, **{"embedding/kernel": np.array([canary], dtype=object)})


HOSTILE = {
    "a plain pickle": ("x.pth", lambda path, canary: path.write_bytes(pickle.dumps(canary, protocol=2))),
    "a plain pickle of today": ("x.bin", lambda path, canary: path.write_bytes(pickle.dumps({"model": canary}))),
    "torch.save": ("x.pth", lambda path, canary: torch.save(canary, path)),
    "torch.save beside sound weights": (
        "x.pt", lambda path, canary: torch.save({"model": state_of(random_portable()), "args": canary}, path)),
    "torch.save in arguments": ("x.pth", lambda path, canary: torch.save(
        {"model": state_of(random_portable()), "args": argparse.Namespace(lr=canary)}, path)),
    "torch.save before 1.6": (
        "x.pth", lambda path, canary: torch.save(canary, path, _use_new_zipfile_serialization=False)),
    "an array of objects": ("x.npz", as_objects),
    "an array of objects beside sound ones": ("x.npz", lambda path, canary: np.savez(
        path, **google_arrays(), optimizer=np.array(canary, dtype=object))),
}  # fmt: skip
MASKED = {
    "a pickle called safetensors": (
        "x.safetensors", lambda path, canary: path.write_bytes(pickle.dumps(canary))),
    "a pickle called npz": ("x.npz", lambda path, canary: path.write_bytes(pickle.dumps(canary))),
    "a checkpoint of torch called npz": ("x.npz", lambda path, canary: torch.save(canary, path)),
    "arrays called pth": ("x.pth", lambda path, canary: as_objects(path.with_suffix(".npz"), canary)
                          or path.with_suffix(".npz").rename(path)),
}  # fmt: skip


def google_arrays():
    state = {"embedding/kernel": np.ones((8, 8, 3, 24), np.float32), "cls": np.ones((1, 1, 24), np.float32)}
    return state | {"embedding/bias": np.ones(24, np.float32)}


def test_the_canary_is_alive(tmp_path):
    """Unpickled without care, each of them creates its file: else the tests below would show nothing."""
    for how in ("open", "system", "exec"):
        pickle.loads(pickle.dumps(Canary(tmp_path / how, how)))
        assert (tmp_path / how).exists()
    as_objects(tmp_path / "x.npz", Canary(tmp_path / "by numpy"))
    with np.load(tmp_path / "x.npz", allow_pickle=True) as arrays:
        arrays["embedding/kernel"]
    torch.save(Canary(tmp_path / "by torch"), tmp_path / "x.pth")
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert (tmp_path / "by numpy").exists()
    assert (tmp_path / "by torch").exists()


@pytest.mark.parametrize("how", ["open", "system", "exec"])
@pytest.mark.parametrize(("name", "write"), HOSTILE.values(), ids=HOSTILE)
def test_code_in_a_file_is_refused_and_never_run(tmp_path, name, write, how):
    path, canary = tmp_path / name, tmp_path / "canary"
    write(path, Canary(canary, how))
    said = refusal(path, Hints(TINY, SMALL))
    assert not canary.exists()
    assert said.startswith(f"{path}: ")
    assert "refused" in said


@pytest.mark.parametrize(("name", "write"), MASKED.values(), ids=MASKED)
def test_code_under_a_wrong_ending_is_never_run(tmp_path, name, write):
    path, canary = tmp_path / name, tmp_path / "canary"
    write(path, Canary(canary))
    said = refusal(path, Hints(TINY, SMALL))
    assert not canary.exists()
    assert said.startswith(f"{path}: ")


def test_a_refused_file_names_what_it_asked_for_and_not_how_to_run_it_all_the_same(tmp_path):
    torch.save({"model": {}, "path": Path("/x")}, tmp_path / "x.pth")
    said = refusal(tmp_path / "x.pth", Hints(TINY))
    assert "pathlib.PosixPath" in said
    assert "state dict alone" in said
    assert "safe_globals" not in said
    assert "weights_only" not in said


def test_a_whole_module_is_refused(tmp_path):
    torch.save(VisionTransformer(random_portable().variant), tmp_path / "module.pth")
    assert "refused" in refusal(tmp_path / "module.pth", Hints(TINY, SMALL))


def test_the_arguments_of_a_run_are_allowed_for_the_one_load_alone(tmp_path):
    before = torch.serialization.get_safe_globals()
    torch.save({"model": {"x": torch.ones(2)}, "args": argparse.Namespace(lr=1)}, tmp_path / "x.pth")
    assert list(open_tensors(tmp_path / "x.pth")) == ["x"]
    assert set(torch.serialization.get_safe_globals()) == set(before)


# Damage.


def safetensors_file(folder):
    path = folder / "sound.safetensors"
    save_file(state_of(random_portable()), path)
    return path


def npz_file(folder):
    return bare_npz(folder)


def compressed_npz_file(folder):
    with np.load(bare_npz(folder)) as arrays:
        np.savez_compressed(folder / "sound.npz", **arrays)
    return folder / "sound.npz"


def torch_file(folder):
    torch.save({"model": state_of(random_portable())}, folder / "sound.pth")
    return folder / "sound.pth"


def old_torch_file(folder):
    torch.save({"model": state_of(random_portable())}, folder / "sound.pth", _use_new_zipfile_serialization=False)
    return folder / "sound.pth"


FILES = [safetensors_file, npz_file, compressed_npz_file, torch_file, old_torch_file]


@pytest.mark.parametrize("sound", FILES)
def test_a_file_that_is_sound_is_read(tmp_path, sound):
    read_portable(sound(tmp_path), hints=Hints(TINY, SMALL)).build()


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("sound", FILES)
def test_a_truncated_file_is_one_line_that_names_it(tmp_path, sound, kept):
    path = sound(tmp_path)
    os.truncate(path, int(path.stat().st_size * kept))
    said = refusal(path, Hints(TINY, SMALL))
    assert said.startswith(f"{path}: ")
    # Not only the name: the reason too.
    assert len(said.rpartition(": ")[2]) > 3


@pytest.mark.parametrize("sound", FILES)
def test_no_damage_ends_in_another_error(tmp_path, sound):
    path = sound(tmp_path)
    whole, chance = path.read_bytes(), random.Random(0)
    front = min(len(whole), 4000)  # what is not a tensor's values lies at both ends of a file
    places = [*range(front), *range(len(whole) - front, len(whole))]
    refused = []
    for _ in range(150):
        damaged = bytearray(whole)
        for place in chance.choices(places, k=chance.choice([1, 1, 2, 8])):
            damaged[place] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            file = open_tensors(path)
            for key in file:
                file[key]
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 15
    assert all(line.isprintable() and line.startswith(f"{path}: ") for line in refused)


def test_a_flipped_bit_of_an_npz_is_found_by_its_checksum(tmp_path):
    path = npz_file(tmp_path)
    content = bytearray(path.read_bytes())
    place = content.find(b"Transformer/encoder_norm/bias.npy") + 200
    content[place] ^= 1
    path.write_bytes(content)
    said = refusal(path)
    assert "Bad CRC-32" in said
    assert "Transformer/encoder_norm/bias" in said


@pytest.mark.parametrize(
    "header",
    [
        b"",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 20) + b"{not json at all....",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 75) + b'{"head.weight":{"dtype":"F32","shape":[5,24],"data_offsets":[0,99999999]}}   ',
        struct.pack("<Q", 63) + b'{"head.weight":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}' + b"\0" * 4,
    ],
    ids=["none", "longer than the file", "no JSON", "no object", "beyond the end", "unknown dtype"],
)
def test_a_damaged_header_of_safetensors_is_one_line(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header)
    assert refusal(path, Hints(TINY)).startswith(f"{path}: not a readable safetensors file: ")


@pytest.mark.parametrize(
    "tree",
    [[torch.ones(2)], torch.ones(2), {}, {"epoch": 3, "lr": 0.1}, {"model": {0: torch.ones(2)}}, {"model": {"a": 1}}],
    ids=["a list", "a tensor", "empty", "numbers", "numbered tensors", "a number by name"],
)
def test_a_checkpoint_of_torch_without_tensors_by_name_says_what_was_expected(tmp_path, tree):
    torch.save(tree, tmp_path / "x.pth")
    said = refusal(tmp_path / "x.pth", Hints(TINY))
    assert f"{tmp_path / 'x.pth'}: holds no state dict: its tensors by name were expected" in said


def test_arrays_that_are_no_numbers_are_named(tmp_path):
    folder = written(tmp_path / "export", "npz")
    with np.load(folder / "model.npz") as arrays:
        np.savez(tmp_path / "text.npz", **{**arrays, "embedding/bias": np.array(["x"] * 24)})
        np.savez(tmp_path / "long.npz", **{**arrays, "embedding/bias": np.ones(24, np.longdouble)})
    assert "embedding/bias cannot be read: its dtype is <U1, not a number" in refusal(tmp_path / "text.npz")
    assert "embedding/bias cannot be read: " in refusal(tmp_path / "long.npz")


# What a file does not say.


@pytest.mark.parametrize(
    ("name", "fitting"),
    [
        ("vit_tiny_patch16_224", ["vit_tiny_patch16_224", "vit_tiny_patch16_384", "vit_tiny_patch16_224_in21k",
                                  "deit_tiny_patch16_224"]),
        ("deit_tiny_distilled_patch16_224", ["deit_tiny_distilled_patch16_224"]),
        ("vit_base_patch16_224_miil", ["vit_base_patch16_224_miil_in21k", "vit_base_patch16_224_miil"]),
        ("vit_small_patch8_224_dino", ["vit_small_patch8_224_dino"]),
        ("vit_tiny_r_s16_p8_224", ["vit_tiny_r_s16_p8_224", "vit_tiny_r_s16_p8_384", "vit_tiny_r_s16_p8_224_in21k"]),
    ],
)  # fmt: skip
def test_a_file_without_a_config_lists_the_variants_it_fits(tmp_path, name, fitting):
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in VisionTransformer(VARIANTS[name]).state_dict().items()}
    # One number as a tensor of any shape: a file of a few kilobytes.
    torch.save({key: torch.ones(1).expand(shape) for key, shape in shapes.items()}, tmp_path / "bare.pth")
    said = refusal(tmp_path / "bare.pth")
    assert "say what it is with --model" in said
    assert said.endswith(f"(its shapes fit {', '.join(fitting)})")


def test_a_file_of_an_own_shape_fits_no_variant(tmp_path):
    torch.save(state_of(random_portable()), tmp_path / "bare.pth")
    assert "its shapes fit no variant of the table" in refusal(tmp_path / "bare.pth")


def test_a_name_that_is_no_variants_is_answered_with_near_ones(tmp_path):
    torch.save(state_of(random_portable()), tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match="did you mean vit_tiny_patch16_224"):
        read_portable(tmp_path / "bare.pth", hints=Hints("vit_tiny_patch16_225"))


@pytest.mark.parametrize("format_", ["npz", "big_vision", "state_dict"])
def test_patches_that_are_no_square_ask_for_the_size_of_the_images(tmp_path, format_):
    if format_ == "state_dict":
        path = tmp_path / "oblong.pth"
        torch.save(state_of(random_portable(img_size=(32, 48))), path)
    else:
        path = bare_npz(tmp_path, format_, img_size=(32, 48))
    size_apart = {key: value for key, value in SMALL.items() if key != "img_size"}
    said = refusal(path, Hints(TINY, size_apart))
    assert f"{path}: " in said
    assert "leaves 24 patches, which are no square grid" in said
    assert "model.img_size=[H,W]" in said
    read_portable(path, hints=Hints(TINY, {**SMALL, "img_size": (32, 48)})).build()
    assert "model.img_size=32 makes 17 tokens, the position embedding has 25" in refusal(path, Hints(TINY, SMALL))


def test_a_scanned_checkpoint_of_big_vision_says_what_to_do(tmp_path):
    folder = written(tmp_path / "export", "big_vision")
    with np.load(folder / "model.npz") as arrays:
        scanned = {key: array for key, array in arrays.items() if "encoderblock" not in key}
    block = "params/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"
    np.savez(tmp_path / "scanned.npz", **scanned, **{block: np.ones((2, 24, 2, 12))})
    said = refusal(tmp_path / "scanned.npz")
    assert "MultiHeadDotProductAttention_0/query/kernel is missing (a scanned checkpoint: unstack it" in said


@pytest.mark.parametrize(
    ("hints", "why"),
    [
        (Hints(TINY, {**SMALL, "qk_norm": True}), "blocks.0.attn.k_norm.bias has no place in it"),
        (Hints(TINY, {**SMALL, "parallel": True}), "blocks.0.norm2.bias is in every one"),
        (Hints(TINY, {**SMALL, "layer_scale": 0.1}), "blocks.0.ls1.gamma has no place in it"),
        (Hints(TINY, {**SMALL, "qkv_bias": False}), "blocks.0.attn.qkv.bias is in every one"),
    ],
)
def test_a_model_that_googles_arrays_cannot_be_is_refused(tmp_path, hints, why):
    path = bare_npz(tmp_path)
    said = refusal(path, hints)
    assert f"{path}: no file of this format is of the model that was asked for: {why}" in said


def test_an_npz_taken_for_what_divides_into_no_heads_is_one_line(tmp_path):
    path = bare_npz(tmp_path)
    said = refusal(path, Hints(changes={"num_heads": 5}))
    assert said.startswith(f"{path}: model.embed_dim 24 is no multiple of model.num_heads 5")


# Labels.


@pytest.mark.parametrize("format_", ["timm", "hf", "state_dict", "npz"])
def test_labels_that_are_given_must_be_one_for_each_class(tmp_path, format_):
    path = bare_npz(tmp_path) if format_ == "npz" else changed(tmp_path, format_, lambda tensors, key: None)
    said = refusal(path, Hints(TINY, SMALL, ("cat", "dog")))
    assert said == f"{path.name}: 2 labels for a head of 5 classes"
    found = read_portable(path, hints=Hints(TINY, SMALL, ("cat", "dog", "eel", "fox", "gnu")))
    assert found.labels == ("cat", "dog", "eel", "fox", "gnu")


@pytest.mark.parametrize(
    ("format_", "file", "change"),
    [
        ("vitscale", "card.json", {"labels": ["cat", "dog"]}),
        ("npz", "card.json", {"labels": ["cat", "dog"]}),
        ("big_vision", "card.json", {"labels": ["cat", "dog"]}),
        ("timm", "config.json", {"label_names": ["cat", "dog"]}),
        ("timm", "config.json", {"label_names": {"0": "cat", "1": "dog"}}),
        ("hf", "config.json", {"id2label": {"0": "cat", "1": "dog"}}),
    ],
)
def test_labels_of_a_folder_must_be_one_for_each_class(tmp_path, format_, file, change):
    folder = written(tmp_path / "export", format_)
    edit(folder / file, **change)
    assert refusal(folder) == "export: 2 labels for a head of 5 classes"


# Configs.


@pytest.mark.parametrize("format_", ["timm", "hf", "vitscale"])
@pytest.mark.parametrize("text", ["", "{", '{"architecture": "vit"', "\x00", "[1, 2]", "null", '"vit"'])
def test_a_config_that_is_no_json_object_is_named(tmp_path, format_, text):
    folder = written(tmp_path / "export", format_)
    path = folder / ("card.json" if format_ == "vitscale" else "config.json")
    path.write_text(text)
    assert refusal(folder).startswith(f"{path}: ")


def test_a_config_that_is_no_text_is_named(tmp_path):
    folder = written(tmp_path / "export", "timm")
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert refusal(folder).startswith(f"{folder / 'config.json'}: not readable JSON")


def test_a_config_of_timm_with_other_classes_than_its_tensors_is_refused(tmp_path):
    folder = written(tmp_path / "export", "timm")
    edit(folder / "config.json", num_classes=9, label_names=[])
    said = refusal(folder)
    assert "model.safetensors: head.weight has shape [5, 24], the model wants [9, 24]" in said
    assert "config.json says vit_tiny_patch16_224" in said


def test_an_architecture_of_timm_that_is_not_in_the_table_asks_for_a_name(tmp_path):
    folder = written(tmp_path / "export", "timm")
    edit(folder / "config.json", architecture="deit3_small_patch16_224")
    said = refusal(folder)
    assert said == f"{folder / 'config.json'}: architecture 'deit3_small_patch16_224' is not of our table: give --model"
    read_portable(folder, hints=Hints(TINY)).build()


# What is taken over, and what decides nothing in the evaluated model.
TAKEN = {
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads", "mlp_ratio",
    "qkv_bias", "qk_norm", "init_values", "class_token", "reg_tokens", "fc_norm", "act_layer",
}  # fmt: skip
IDLE = {
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    "weight_init", "fix_init", "dynamic_img_size",
}  # fmt: skip
ARGUMENTS_OF_TIMM = set(inspect.signature(TimmViT).parameters)


def test_the_arguments_of_timm_are_still_those_that_were_sorted():
    assert TAKEN | IDLE <= ARGUMENTS_OF_TIMM
    assert {"no_embed_class", "pre_norm", "pos_embed", "norm_layer"} <= ARGUMENTS_OF_TIMM - TAKEN - IDLE


@pytest.mark.parametrize("argument", sorted(ARGUMENTS_OF_TIMM - TAKEN - IDLE))
def test_an_argument_of_timm_whose_effect_is_not_ours_is_refused(tmp_path, argument):
    folder = written(tmp_path / "export", "timm")
    edit(folder / "config.json", model_args=lambda old: {**old, argument: True})
    assert refusal(folder) == f"{folder / 'config.json'}: model_args {argument}=True is not known to this model"


@pytest.mark.parametrize("argument", sorted(IDLE))
def test_an_argument_of_timm_without_effect_is_passed_over(tmp_path, argument):
    folder = written(tmp_path / "export", "timm")
    before = read_portable(folder).variant
    edit(folder / "config.json", model_args=lambda old: {**old, argument: 0.1})
    assert read_portable(folder).variant == before


@pytest.mark.parametrize(
    "change",
    [
        {"global_pool": "avg", "class_token": False, "fc_norm": True},
        {"global_pool": "avg", "class_token": True, "fc_norm": False},
        {"global_pool": "avgmax", "class_token": False, "fc_norm": False},
        {"global_pool": "", "class_token": True},
        {"class_token": False},
        {"act_layer": "relu"},
        {"act_layer": ["gelu"]},
    ],
    ids=str,
)
def test_a_pooling_or_activation_of_timm_that_is_not_ours_is_refused(tmp_path, change):
    folder = written(tmp_path / "export", "timm")
    edit(folder / "config.json", model_args=lambda old: {**old, **change})
    said = refusal(folder)
    assert said.startswith(f"{folder / 'config.json'}: ")


def test_the_mean_of_patches_in_timms_own_order_is_refused(tmp_path):
    """timm's default for `avg` norms after pooling; nothing in the config says so."""
    folder = written(tmp_path / "export", "timm", pool="avg")
    read_portable(folder).build()
    edit(folder / "config.json", model_args=lambda old: {k: v for k, v in old.items() if k != "fc_norm"})
    said = refusal(folder)
    assert "fc_norm True" in said
    assert "the final norm before pooling" in said


@pytest.mark.parametrize(
    ("format_", "change", "key"),
    [
        ("timm", {"architecture": 7}, "architecture"),
        ("timm", {"architecture": None}, "architecture"),
        ("timm", {"num_classes": "many"}, "num_classes"),
        ("timm", {"model_args": None}, "model_args"),
        ("timm", {"model_args": [1]}, "model_args"),
        ("timm", {"pretrained_cfg": None}, "pretrained_cfg"),
        ("timm", {"label_names": 5}, "label_names"),
        ("timm", {"label_names": {"zero": "cat"}}, "zero"),
        ("timm", {"model_args": {"depth": "two"}}, ""),
        ("timm", {"model_args": {"mlp_ratio": "4"}}, ""),
        ("timm", {"model_args": {"embed_dim": 25, "num_heads": 2}}, "model.embed_dim 25 is no multiple"),
        ("timm", {"model_args": {"patch_size": 0}}, ""),
        ("timm", {"pretrained_cfg": {"mean": [0.1, 0.2]}}, ""),
        ("timm", {"pretrained_cfg": {"std": "dark"}}, ""),
        ("timm", {"pretrained_cfg": {"crop_pct": None}}, ""),
        ("timm", {"pretrained_cfg": {"interpolation": "random"}}, "random"),
        ("hf", {"architectures": "ViTModel"}, "architectures"),
        ("hf", {"architectures": ["BeitForImageClassification"]}, "BeitForImageClassification"),
        ("hf", {"architectures": []}, "no architecture"),
        ("hf", {"model_type": "beit"}, "beit"),
        ("hf", {"model_type": 3}, "model_type"),
        ("hf", {"hidden_act": "relu"}, "relu"),
        ("hf", {"hidden_act": ["gelu"]}, "hidden_act"),
        ("hf", {"pooler_act": "gelu"}, "pooler_act 'gelu'"),
        ("hf", {"hidden_size": 0}, ""),
        ("hf", {"hidden_size": "wide"}, ""),
        ("hf", {"num_hidden_layers": None}, ""),
        ("hf", {"num_attention_heads": 7}, "model.embed_dim 24 is no multiple"),
        ("hf", {"image_size": [32]}, ""),
        ("hf", {"image_size": 33}, "model.img_size 33 is no multiple"),
        ("hf", {"id2label": ["cat"]}, "id2label"),
        ("hf", {"id2label": {"cat": 0}}, "cat"),
    ],
)
def test_a_config_with_a_value_that_cannot_be_is_one_line_that_names_it(tmp_path, format_, change, key):
    folder = written(tmp_path / "export", format_)
    edit(folder / "config.json", **change)
    said = refusal(folder)
    assert said.startswith(f"{folder / 'config.json'}: ")
    assert key in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3}, "vit.encoder.layer.2.layernorm_before.weight [24] is missing"),
        ({"num_hidden_layers": 1}, "has no place in this model (and 15 more)"),
        ({"hidden_size": 32}, "vit.embeddings.cls_token has shape [1, 1, 24], the model wants [1, 1, 32]"),
        ({"image_size": 40}, "position_embeddings has shape [1, 17, 24], the model wants [1, 26, 24]"),
        ({"architectures": ["ViTModel"]}, "embeddings.cls_token [1, 1, 24] is missing: config.json says ViTModel"),
        ({"architectures": ["DeiTForImageClassificationWithTeacher"]}, "cls_classifier.weight is missing"),
    ],
)
def test_a_config_of_hugging_face_that_is_of_another_model_is_refused(tmp_path, change, said):
    folder = written(tmp_path / "export", "hf")
    edit(folder / "config.json", **change)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [{"image_mean": [0.1, 0.2]}, {"image_mean": None}, {"image_std": 1}, {"size": {"shortest_edge": 0}}],
    ids=str,
)
def test_a_preprocessor_with_a_value_that_cannot_be_is_named(tmp_path, change):
    folder = written(tmp_path / "export", "hf")
    edit(folder / "preprocessor_config.json", **change)
    assert refusal(folder).startswith(f"{folder / 'preprocessor_config.json'}: ")


# Cards.


def test_weights_without_their_card_are_no_export(tmp_path):
    folder = written(tmp_path / "export")
    (folder / "card.json").unlink()
    said = refusal(folder)
    assert said.startswith(f"{folder}: no exported model: ")
    assert "card.json" in said


def test_a_path_that_cannot_be_looked_at_is_one_line(tmp_path):
    name = "a" * 300
    for look in (format_of, read_portable):
        with pytest.raises(CheckpointError, match=rf"{name}.*: cannot be read: File name too long"):
            look(tmp_path / name)


@pytest.mark.parametrize(
    ("format_", "file"), [("vitscale", "model.safetensors"), ("npz", "model.npz"), ("timm", "model.safetensors")]
)
def test_a_folder_without_its_weights_is_one_line(tmp_path, format_, file):
    folder = written(tmp_path / "export", format_)
    (folder / file).unlink()
    said = refusal(folder)
    assert said.startswith(str(folder))
    assert "no exported model" in said or file in said


@pytest.mark.parametrize("format_", ["vitscale", "npz"])
@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"extra": 1}, "extra"),
        ({"crop": "most"}, "crop"),
        ({"mean": [0.5]}, "mean"),
        ({"model": {"name": "vit_tiny_patch16_225", "num_classes": 5}}, "vit_tiny_patch16_225"),
        ({"model": {"num_classes": 5}}, "name"),
        ({"model": lambda old: {**old, "colour": "red"}}, "colour"),
        ({"model": lambda old: {**old, "num_heads": 5}}, "num_heads"),
        ({"model": lambda old: {**old, "depth": "two"}}, ""),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"weights": {"name": "model.safetensors"}}, "weights"),
    ],
)
def test_a_card_with_a_value_that_cannot_be_is_one_line_that_names_it(tmp_path, format_, change, key):
    folder = written(tmp_path / "export", format_)
    edit(folder / "card.json", **change)
    said = refusal(folder)
    assert said.startswith(f"{folder / 'card.json'}: damaged: ")
    assert key in said


@pytest.mark.parametrize("key", ["model", "labels", "mean", "weights", "trained"])
def test_a_card_without_one_of_its_fields_is_damaged(tmp_path, key):
    folder = written(tmp_path / "export")
    without_key(folder / "card.json", key)
    said = refusal(folder)
    assert said.startswith(f"{folder / 'card.json'}: damaged: ")
    assert key in said


def test_an_origin_that_does_not_say_which_weights_is_that_of_raw_ones(tmp_path):
    folder = written(tmp_path / "export")
    edit(folder / "card.json", origin={})
    assert read_portable(folder).origin.weights == "raw"
    without_key(folder / "card.json", "origin")
    assert read_portable(folder).origin.weights == "raw"


@pytest.mark.parametrize("format_", ["vitscale", "npz", "big_vision"])
@pytest.mark.parametrize(("hints", "said"), [(Hints(TINY), "--model"), (Hints(changes={"depth": 2}), "model.depth")])
def test_what_a_card_says_is_not_to_be_said_again(tmp_path, format_, hints, said):
    folder = written(tmp_path / "export", format_)
    assert refusal(folder, hints) == f"{folder}: card.json says what this is ({TINY}): leave {said} out"


@pytest.mark.parametrize("format_", ["vitscale", "npz", "big_vision"])
def test_labels_that_are_given_go_before_those_of_a_card(tmp_path, format_):
    folder = written(tmp_path / "export", format_)
    assert read_portable(folder, hints=Hints(labels=tuple("abcde"))).labels == tuple("abcde")
    assert refusal(folder, Hints(labels=("cat",))) == "export: 1 labels for a head of 5 classes"


@pytest.mark.parametrize(("format_", "file"), [("vitscale", "model.safetensors"), ("npz", "model.npz")])
def test_weights_that_are_not_those_of_the_card_are_refused(tmp_path, format_, file):
    folder = written(tmp_path / "export", format_)
    path = folder / file
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    assert refusal(folder).startswith(f"{path}: its SHA-256 is not the recorded one")
    path.write_bytes(whole[:-1])
    said = refusal(folder)
    assert said in {
        f"{path}: {len(whole) - 1} bytes where {len(whole)} were written",
        f"{path}: not a readable npz file: File is not a zip file",
    }
    path.write_bytes(whole)
    read_portable(folder).build()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 3}, "blocks.2.norm1.weight [24] is missing"),
        ({"depth": 1}, "blocks.1.attn.proj.bias [24] has no place in this model (and 11 more)"),
        ({"embed_dim": 32}, "cls_token has shape [1, 1, 24], the model wants [1, 1, 32]"),
        ({"pool": "avg"}, "pos_embed has shape [1, 17, 24], the model wants [1, 16, 24]"),
        ({"qk_norm": True}, "blocks.0.attn.q_norm.weight [12] is missing"),
        ({"num_classes": 6}, "head.weight has shape [5, 24], the model wants [6, 24]"),
    ],
)
def test_a_card_of_another_model_is_refused_at_the_first_tensor(tmp_path, change, said):
    folder = written(tmp_path / "export")
    edit(folder / "card.json", model=lambda old: {**old, **change})
    assert f"{folder / 'model.safetensors'}: {said}" in refusal(folder)


# Paths.


def test_a_path_that_does_not_exist_is_named(tmp_path):
    assert refusal(tmp_path / "nowhere.npz") == f"{tmp_path / 'nowhere.npz'}: no such file or folder"


@pytest.mark.parametrize("name", ["weights.h5", "weights", "notes.txt", "model.onnx"])
def test_a_file_of_an_unknown_kind_is_answered_with_the_known_ones(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    said = refusal(tmp_path / name)
    assert said.startswith(f"{tmp_path / name}: no exported model: ")
    assert ".npz, .pth, .pt, .bin or .safetensors" in said


def test_a_folder_of_no_format_is_answered_with_what_makes_one(tmp_path):
    (tmp_path / "config.json").write_text('{"hello": 1}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path}: no exported model: ")
    assert "card.json or config.json" in said


def test_a_folder_with_the_ending_of_a_file_is_one_line(tmp_path):
    (tmp_path / "x.pth").mkdir()
    assert str(tmp_path / "x.pth") in refusal(tmp_path / "x.pth", Hints(TINY))


def test_a_file_read_as_another_format_is_one_line(tmp_path):
    path = safetensors_file(tmp_path)
    for format_ in FORMATS:
        if format_ == "state_dict":
            continue
        with pytest.raises(CheckpointError) as caught:
            read_portable(path, format_, Hints(TINY, SMALL)).build()
        assert str(caught.value).isprintable()
        assert str(path) in str(caught.value)
