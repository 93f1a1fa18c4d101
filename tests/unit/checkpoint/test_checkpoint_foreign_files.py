"""Files that others publish, of the very layouts they publish them in: the model that is read gives their logits."""

import argparse
import hashlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.models.vision_transformer_hybrid import HybridEmbed, _resnetv2
from torch import nn

from vitscale.checkpoint import Hints, read_portable
from vitscale.checkpoint.formats.inference import architecture_name, nearest_name
from vitscale.model import TABLE, VARIANTS, Preprocessing, Variant

TOLERANCE = 1e-5
TINY = Hints("vit_tiny_patch16_224", {"depth": 1})
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 7}


def filled(module, seed=0):
    """The module in memory, with values that tell every tensor from every other."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.to_empty(device="cpu").named_parameters():
        # A norm's scale or LayerScale near 0 would hide the branch behind it.
        mean = 1.0 if ("norm" in name and name.endswith("weight")) or name.endswith("gamma") else 0.0
        parameter.data.normal_(mean, 0.05, generator=generator)
    return module.eval().requires_grad_(False)


def registered(name, seed=0, **arguments):
    """A model of timm's registry."""
    with torch.device("meta"):
        return filled(timm.create_model(name, pretrained=False, **arguments), seed)


def small(seed=0, **arguments):
    """A small model of timm's class, with GELU as Google computes it unless told otherwise."""
    with torch.device("meta"):
        model = TimmViT(**{**SMALL, "act_layer": "gelu_tanh", "weight_init": "skip", **arguments})
    return filled(model, seed)


def hybrid(stages, seed=0, **arguments):
    """A small model behind a ResNet."""
    with torch.device("meta"):
        embed_layer = partial(HybridEmbed, backbone=_resnetv2(stages))
    return small(seed, embed_layer=embed_layer, **arguments)


def images_for(variant):
    return torch.randn(2, variant.in_chans, *variant.image_px, generator=torch.Generator().manual_seed(1))


def assert_same_logits(found, theirs):
    built, images = found.build(), images_for(found.variant)
    assert not built.training
    expected = theirs(images)
    assert expected.std() > 0.01  # the comparison is not one of zeros
    assert (built(images) - expected).abs().max().item() <= TOLERANCE


# State dicts of PyTorch: DeiT, DINO, MIIL, timm.


def as_it_is(state):
    return state


def of_deit(state):
    return {"model": state}


def of_a_deit_run(state):
    return {"model": state, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=5e-4, model="x")}


def of_miil(state):
    return {"state_dict": state}


def of_data_parallel(state):
    return {"epoch": 9, "state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}


def of_a_dino_run(state, prefix=""):
    """`prefix` is "module." in the student, and in the teachers of some runs."""
    head = {"head.mlp.0.weight": torch.ones(3, 3), "head.mlp.0.bias": torch.ones(3)}
    head |= {"head.last_layer.weight_g": torch.ones(3, 1), "head.last_layer.weight_v": torch.ones(3, 3)}
    teacher = {f"backbone.{key}": tensor for key, tensor in state.items()} | head
    return {
        "student": {f"module.{key}": tensor + 1 for key, tensor in teacher.items()},
        "teacher": {f"{prefix}{key}": tensor for key, tensor in teacher.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", out_dim=65536),
        "dino_loss": {"center": torch.zeros(1, 3)},
    }


def of_parallel_dino_run(state):
    return of_a_dino_run(state, "module.")


def with_patches_cut_by_hand(state):
    """The stem of early timm: patches as rows of 3 * 16 * 16 numbers, channels first, times a matrix."""
    return {key: tensor.flatten(1) if key == "patch_embed.proj.weight" else tensor for key, tensor in state.items()}


def of_deit_iii(state):
    return {"model": {key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): tensor
                      for key, tensor in state.items()}}  # fmt: skip


def in_half_precision(state):
    return {key: tensor.half() for key, tensor in state.items()}


PUBLISHED = {
    "DeiT": ("deit_tiny_patch16_224", {}, of_deit, {}),
    "DeiT distilled": ("deit_tiny_distilled_patch16_224", {}, of_deit, {}),
    "a run of DeiT's code": ("deit_tiny_patch16_224", {"depth": 1}, of_a_deit_run, {}),
    "DINO": ("vit_small_patch16_224_dino", {"depth": 2}, as_it_is, {}),
    "DINO with patches of 8": ("vit_small_patch8_224_dino", {"depth": 1}, as_it_is, {}),
    "a run of DINO's code": ("vit_small_patch16_224_dino", {"depth": 2}, of_a_dino_run, {}),
    "a run of DINO's code on many GPUs": ("vit_small_patch16_224_dino", {"depth": 2}, of_parallel_dino_run, {}),
    "MIIL": ("vit_base_patch16_224_miil", {"depth": 1}, of_miil, {}),
    "MIIL in21k": ("vit_base_patch16_224_miil_in21k", {"depth": 1, "num_classes": 13}, of_miil, {}),
    "data parallel": ("vit_tiny_patch16_224", {"depth": 1}, of_data_parallel, {}),
    "patches cut by hand": ("vit_tiny_patch16_224", {"depth": 1}, with_patches_cut_by_hand, {}),
    "LayerScale of DeiT III": ("deit_tiny_patch16_224", {"depth": 2, "init_values": 1e-6}, of_deit_iii,
                               {"layer_scale": 1e-6}),
    "hybrid with the root alone": ("vit_tiny_r_s16_p8_224", {"depth": 1}, as_it_is, {}),
    "hybrid": ("vit_small_r26_s32_224", {"depth": 1, "num_classes": 5}, as_it_is, {}),
    "other classes, pixels and channels": (
        "vit_tiny_patch16_224", {"depth": 1, "num_classes": 3, "img_size": 96, "in_chans": 1}, as_it_is, {}),
    "registers": ("vit_tiny_patch16_224", {"depth": 1, "reg_tokens": 4}, as_it_is, {}),
    "fine-tuned DINO": ("vit_small_patch16_224_dino", {"depth": 1, "num_classes": 6}, as_it_is, {}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "wrap", "changes"), PUBLISHED.values(), ids=PUBLISHED)
def test_a_published_state_dict_gives_the_logits_of_its_model(tmp_path, name, arguments, wrap, changes):
    entry = TABLE[name]
    theirs = registered(entry.timm_name, **{"num_classes": entry.variant.num_classes, **arguments})
    path = tmp_path / "published.pth"
    torch.save(wrap(theirs.state_dict()), path)
    depth = {"depth": arguments["depth"]} if "depth" in arguments else {}
    found = read_portable(path, hints=Hints(name, {**depth, **changes}))
    assert_same_logits(found, theirs)
    assert (found.name, found.preprocessing, found.labels) == (name, entry.preprocessing, ())
    assert (found.origin.path, found.origin.sha256) == (path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def test_the_in21k_weights_of_jx_keep_their_representation_layer(tmp_path):
    """jx_vit_large_patch32_224_in21k: timm of today has no such layer, so it is applied by hand."""
    features = registered("vit_large_patch32_224", depth=1, num_classes=0)
    pre_logits, head = filled(nn.Linear(1024, 1024, device="meta"), 1), filled(nn.Linear(1024, 11, device="meta"), 2)
    state = {**features.state_dict(), "pre_logits.fc.weight": pre_logits.weight, "pre_logits.fc.bias": pre_logits.bias,
             "head.weight": head.weight, "head.bias": head.bias}  # fmt: skip
    torch.save(state, tmp_path / "jx.pth")
    found = read_portable(tmp_path / "jx.pth", hints=Hints("vit_large_patch32_224_in21k", {"depth": 1}))
    assert (found.variant.representation_size, found.variant.num_classes) == (1024, 11)
    assert_same_logits(found, lambda images: head(torch.tanh(pre_logits(features(images)))))


def test_a_head_without_its_representation_layer_is_read_without_one(tmp_path):
    theirs = registered("vit_large_patch32_224", depth=1, num_classes=4)
    torch.save(theirs.state_dict(), tmp_path / "tuned.pth")
    found = read_portable(tmp_path / "tuned.pth", hints=Hints("vit_large_patch32_224_in21k", {"depth": 1}))
    assert found.variant.representation_size == 0
    assert_same_logits(found, theirs)


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_state_dict_of_torch_is_known_by_any_of_its_endings(tmp_path, suffix):
    theirs = registered(TINY.name, depth=1)
    torch.save(theirs.state_dict(), tmp_path / f"weights{suffix}")
    assert_same_logits(read_portable(tmp_path / f"weights{suffix}", hints=TINY), theirs)


def test_a_state_dict_of_torch_before_1_6_is_read(tmp_path):
    theirs = registered(TINY.name, depth=1)
    torch.save({"model": theirs.state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_logits(read_portable(tmp_path / "old.pth", hints=TINY), theirs)


def test_bare_safetensors_are_read_with_a_name(tmp_path):
    theirs = registered(TINY.name, depth=1)
    save_file(theirs.state_dict(), tmp_path / "bare.safetensors")
    found = read_portable(tmp_path / "bare.safetensors", hints=replace(TINY, labels=tuple("abcd" * 250)))
    assert_same_logits(found, theirs)
    assert found.labels == tuple("abcd" * 250)


def test_half_precision_is_read_as_fp32(tmp_path):
    theirs = registered(TINY.name, depth=1)
    torch.save(in_half_precision(theirs.state_dict()), tmp_path / "half.pth")
    theirs.load_state_dict({key: tensor.half().float() for key, tensor in theirs.state_dict().items()})
    found = read_portable(tmp_path / "half.pth", hints=TINY)
    assert {parameter.dtype for parameter in found.build().parameters()} == {torch.float32}
    assert_same_logits(found, theirs)


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_built_model_does_not_change_with_its_file(tmp_path, suffix):
    """What is read lies in the file, as memory that the kernel fills in: fine-tuning may write over that very file."""
    path, theirs = tmp_path / f"weights{suffix}", registered(TINY.name, depth=1)
    (save_file if suffix == ".safetensors" else torch.save)(theirs.state_dict(), path)
    found = read_portable(path, hints=TINY)
    built, again = found.build(), found.build()
    for parameter in again.parameters():
        parameter.zero_()
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    expected = theirs(images_for(found.variant))
    assert (built(images_for(found.variant)) - expected).abs().max().item() <= TOLERANCE


# timm's own folders.

FOLDERS = {
    "a plain row": ("vit_tiny_patch16_224", {}),
    "in21k": ("vit_tiny_patch16_224.augreg_in21k", {"depth": 1, "num_classes": 31}),
    "no head": ("vit_small_patch16_224.dino", {"depth": 1}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"depth": 1}),
    "no qkv bias": ("vit_base_patch16_224_miil", {"depth": 1}),
    "mean of the patches": ("vit_tiny_patch16_224", {"depth": 1, "global_pool": "avg", "class_token": False,
                                                     "fc_norm": False}),
    "other channels and pixels": ("vit_tiny_patch16_224", {"depth": 1, "in_chans": 1, "img_size": 64}),
    "registers and LayerScale": ("vit_tiny_patch16_224", {"depth": 1, "reg_tokens": 4, "init_values": 1e-5,
                                                          "qk_norm": True}),
    "an odd MLP": ("vit_giant_patch14_224", {"depth": 1, "mlp_ratio": 48 / 11 + 1e-9, "embed_dim": 176}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"depth": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_timm_writes_gives_the_logits_of_its_model(tmp_path, name, arguments):
    theirs = registered(name, **arguments)
    labels = [f"n{index:08}" for index in range(theirs.num_classes)]
    save_for_hf(theirs, tmp_path / "saved", {"label_names": labels}, safe_serialization=True)
    found = read_portable(tmp_path / "saved")
    assert_same_logits(found, theirs)
    cfg = theirs.pretrained_cfg
    assert found.labels == tuple(labels)
    assert (found.preprocessing.mean, found.preprocessing.crop) == (tuple(cfg["mean"]), cfg["crop_pct"])


# Google's npz: written by hand from timm's tensors, index by index.


def google_arrays(theirs, big_vision=False):
    """The arrays of Google's file, as Flax lays out what timm's tensors compute.

    Letters: o out, i in, h head, c channel of a head, x and y pixels; timm stacks queries, keys and values.
    """
    state = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    heads = theirs.blocks[0].attn.num_heads
    found = {}

    def norm(theirs_name, key):
        found[f"{key}/scale"], found[f"{key}/bias"] = state[f"{theirs_name}.weight"], state[f"{theirs_name}.bias"]

    def dense(theirs_name, key):
        found[f"{key}/kernel"] = np.einsum("oi->io", state[f"{theirs_name}.weight"])
        found[f"{key}/bias"] = state[f"{theirs_name}.bias"]

    def projections(theirs_name, key, names):
        weight = state[f"{theirs_name}.weight"]
        weight = weight.reshape(len(names), heads, -1, weight.shape[1])
        bias = state[f"{theirs_name}.bias"].reshape(len(names), heads, -1)
        for index, name in enumerate(names):
            found[f"{key}/{name}/kernel"] = np.einsum("hci->ihc", weight[index])
            found[f"{key}/{name}/bias"] = bias[index]

    def attention_output(theirs_name, key):
        weight = state[f"{theirs_name}.weight"]
        found[f"{key}/out/kernel"] = np.einsum("ohc->hco", weight.reshape(weight.shape[0], heads, -1))
        found[f"{key}/out/bias"] = state[f"{theirs_name}.bias"]

    def convolution(theirs_name, key):
        found[f"{key}/kernel"] = np.einsum("oiyx->yxio", state[f"{theirs_name}.weight"])

    def group_norm(theirs_name, key):  # early Flax kept the axes of the image
        for ours, part in (("weight", "scale"), ("bias", "bias")):
            found[f"{key}/{part}"] = state[f"{theirs_name}.{ours}"].reshape(1, 1, 1, -1)

    convolution("patch_embed.proj", "embedding")
    found["embedding/bias"] = state["patch_embed.proj.bias"]
    # In big_vision the class token comes after the position embedding and has none.
    found["pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"] = state["pos_embed"]
    if theirs.cls_token is not None:
        found["cls"] = state["cls_token"]
    attention, mlp, second = ("0", "0", "1") if big_vision else ("1", "3", "2")
    for index in range(len(theirs.blocks)):
        block, key = f"blocks.{index}", f"Transformer/encoderblock_{index}"
        norm(f"{block}.norm1", f"{key}/LayerNorm_0")
        projections(f"{block}.attn.qkv", f"{key}/MultiHeadDotProductAttention_{attention}", ("query", "key", "value"))
        attention_output(f"{block}.attn.proj", f"{key}/MultiHeadDotProductAttention_{attention}")
        norm(f"{block}.norm2", f"{key}/LayerNorm_{second}")
        dense(f"{block}.mlp.fc1", f"{key}/MlpBlock_{mlp}/Dense_0")
        dense(f"{block}.mlp.fc2", f"{key}/MlpBlock_{mlp}/Dense_1")
    norm("norm", "Transformer/encoder_norm")
    if theirs.attn_pool is not None:
        key = "MAPHead_0/MultiHeadDotProductAttention_0"
        found["MAPHead_0/probe"] = state["attn_pool.latent"]
        projections("attn_pool.q", key, ("query",))
        projections("attn_pool.kv", key, ("key", "value"))
        attention_output("attn_pool.proj", key)
        norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
        dense("attn_pool.mlp.fc1", "MAPHead_0/MlpBlock_0/Dense_0")
        dense("attn_pool.mlp.fc2", "MAPHead_0/MlpBlock_0/Dense_1")
    if theirs.num_classes:
        dense("head", "head")
    for name in state:  # the hybrid's ResNet
        if not name.startswith("patch_embed.backbone.") or not name.endswith("weight"):
            continue
        module, (*stage, layer) = name.removesuffix(".weight"), name.removesuffix(".weight").split(".")[2:]
        if "blocks" in stage:
            unit = f"block{int(stage[1]) + 1}/unit{int(stage[3]) + 1}/"
            end = "_proj" if "downsample" in stage else layer[-1]
        else:
            unit, end = "", "_root"
        if layer.startswith("conv"):
            convolution(module, f"{unit}conv{end}")
        else:
            group_norm(module, f"{unit}gn{end}")
    return found


def write_google(path, arrays, prefix="", **beside):
    np.savez(path, **{prefix + key: array for key, array in arrays.items()}, **beside)
    return path


ORIGINAL = {
    "plain": (small, {}),
    "three heads": (small, {"embed_dim": 36, "num_heads": 3, "depth": 3}),
    "mean of the patches": (small, {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "no head": (small, {"num_classes": 0}),
    "one channel": (small, {"in_chans": 1}),
    "an odd MLP": (small, {"mlp_ratio": 48 / 11 + 1e-9, "embed_dim": 44}),
    "oblong patches": (small, {"patch_size": (8, 16), "img_size": (32, 64)}),
    "other pixels": (small, {"img_size": 56}),
    "hybrid with the root alone": (hybrid, {"stages": (), "patch_size": 2}),
    "hybrid": (hybrid, {"stages": (1, 2), "patch_size": 1}),
}
# timm's way to say that the class token has no position.
BIG_VISION = {
    "class token": {"no_embed_class": True},
    "mean of the patches": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "one channel": {"in_chans": 1, "class_token": False, "global_pool": "map"},
}
OPTIMIZER = {"opt/state/step": np.array(7), "opt/state/param_states/embedding/kernel/grad_ema": np.ones(3)}
TEXT_TOWER = {
    "params/txt/Transformer/encoderblock_0/LayerNorm_0/scale": np.ones(3), "params/txt/head/kernel": np.ones((3, 3)),
    "params/t": np.ones(1), "params/b": np.ones(1), "opt/0/mu/img/cls": np.ones(3),
}  # fmt: skip
ORIGINAL_PREFIXES = {"": {}, "opt/target/": OPTIMIZER}
BIG_VISION_PREFIXES = {"params/": OPTIMIZER, "params/img/": TEXT_TOWER}


def assert_inferred(variant, theirs):
    """Everything that the shapes tell is as in timm's model, and what they do not tell is Google's."""
    patch_embed = theirs.patch_embed
    hybrid = hasattr(patch_embed, "backbone")
    expected = Variant(
        patch_size=tuple(patch_embed.proj.kernel_size),
        embed_dim=theirs.embed_dim,
        depth=len(theirs.blocks),
        num_heads=theirs.blocks[0].attn.num_heads,
        mlp_ratio=theirs.blocks[0].mlp.fc1.out_features / theirs.embed_dim,
        num_classes=theirs.num_classes,
        img_size=tuple(patch_embed.img_size),
        in_chans=next(patch_embed.parameters()).shape[1],
        pool=theirs.global_pool,
        act="gelu_tanh",
        stem=tuple(len(stage.blocks) for stage in getattr(patch_embed.backbone, "stages", ())) if hybrid else None,
    )
    assert variant == expected


def assert_timm_reads_the_same(path, theirs, empty):
    """timm's own reader makes the model of this file that it was written from."""
    empty.load_pretrained(str(path))
    images = torch.randn(2, next(theirs.patch_embed.parameters()).shape[1], *theirs.patch_embed.img_size)
    assert torch.equal(empty(images), theirs(images))


@pytest.mark.parametrize(("prefix", "beside"), ORIGINAL_PREFIXES.items())
@pytest.mark.parametrize(("make", "arguments"), ORIGINAL.values(), ids=ORIGINAL)
def test_an_original_npz_gives_the_logits_of_its_model(tmp_path, make, arguments, prefix, beside):
    theirs = make(**arguments)
    path = write_google(tmp_path / "google.npz", google_arrays(theirs), prefix, **beside)
    found = read_portable(path)
    assert_inferred(found.variant, theirs)
    assert_same_logits(found, theirs)
    assert_timm_reads_the_same(path, theirs, make(seed=9, **arguments))
    assert found.preprocessing == Preprocessing()
    assert found.origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("prefix", "beside"), BIG_VISION_PREFIXES.items())
@pytest.mark.parametrize("arguments", BIG_VISION.values(), ids=BIG_VISION)
def test_a_big_vision_npz_gives_the_logits_of_its_model(tmp_path, arguments, prefix, beside):
    theirs = small(**arguments)
    path = write_google(tmp_path / "google.npz", google_arrays(theirs, big_vision=True), prefix, **beside)
    found = read_portable(path)
    assert_inferred(found.variant, theirs)
    assert_same_logits(found, theirs)
    assert_timm_reads_the_same(path, theirs, small(seed=9, **arguments))


@pytest.mark.parametrize("big_vision", [False, True])
def test_the_representation_layer_of_an_npz_is_between_features_and_head(tmp_path, big_vision):
    features = small(num_classes=0, **({"no_embed_class": True} if big_vision else {}))
    pre_logits, head = filled(nn.Linear(48, 20, device="meta"), 1), filled(nn.Linear(20, 7, device="meta"), 2)
    arrays = google_arrays(features, big_vision)
    for key, layer in (("pre_logits", pre_logits), ("head", head)):
        arrays |= {f"{key}/kernel": layer.weight.T.numpy(), f"{key}/bias": layer.bias.numpy()}
    found = read_portable(write_google(tmp_path / "google.npz", arrays, "params/" if big_vision else ""))
    assert (found.variant.representation_size, found.variant.num_classes) == (20, 7)
    assert_same_logits(found, lambda images: head(torch.tanh(pre_logits(features(images)))))


def test_jax_bf16_arrives_as_it_was_rounded(tmp_path):
    theirs = small(no_embed_class=True)
    for parameter in theirs.parameters():
        parameter.copy_(parameter.bfloat16())
    arrays = {
        key: torch.from_numpy(np.ascontiguousarray(array)).bfloat16().view(torch.int16).numpy().view("V2")
        for key, array in google_arrays(theirs, big_vision=True).items()
    }
    assert_same_logits(read_portable(write_google(tmp_path / "bf16.npz", arrays, "params/")), theirs)


def test_an_npz_of_four_channels_is_read(tmp_path):  # timm's reader knows no other than one and three
    theirs = small(in_chans=4)
    found = read_portable(write_google(tmp_path / "google.npz", google_arrays(theirs)))
    assert_inferred(found.variant, theirs)
    assert_same_logits(found, theirs)


def test_a_compressed_npz_of_float16_is_read(tmp_path):
    theirs = small()
    for parameter in theirs.parameters():
        parameter.copy_(parameter.half())
    halves = {key: array.astype(np.float16) for key, array in google_arrays(theirs).items()}
    np.savez_compressed(tmp_path / "half.npz", **halves)
    assert_same_logits(read_portable(tmp_path / "half.npz"), theirs)


def test_hints_say_what_the_arrays_of_an_npz_do_not(tmp_path):
    theirs = small(act_layer="gelu")
    path = write_google(tmp_path / "google.npz", google_arrays(theirs))
    as_google, told = read_portable(path), read_portable(path, hints=Hints(changes={"act": "gelu"}))
    assert (as_google.variant.act, told.variant.act) == ("gelu_tanh", "gelu")
    assert_same_logits(told, theirs)
    images = images_for(told.variant)
    assert (as_google.build()(images) - theirs(images)).abs().max() > TOLERANCE


def test_a_name_gives_an_npz_its_pixels_and_its_labels_stay(tmp_path):
    theirs = registered("vit_base_patch16_224", depth=1, num_classes=3, img_size=96, act_layer="gelu_tanh")
    path = write_google(tmp_path / "google.npz", google_arrays(theirs))
    hints = Hints("deit_base_patch16_224", {"depth": 1}, ("cat", "dog", "eel"))
    found = read_portable(path, hints=hints)
    assert found.preprocessing == TABLE["deit_base_patch16_224"].preprocessing != Preprocessing()
    assert (found.name, found.labels, found.variant.img_size) == ("deit_base_patch16_224", ("cat", "dog", "eel"), 96)
    assert_same_logits(found, theirs)


def test_an_npz_of_images_that_are_not_square_is_read_when_told_so(tmp_path):
    theirs = small(img_size=(32, 64))
    path = write_google(tmp_path / "google.npz", google_arrays(theirs))
    found = read_portable(path, hints=Hints(changes={"img_size": [32, 64]}))
    assert found.variant.image_px == (32, 64)
    assert_same_logits(found, theirs)


# Names.


@pytest.mark.parametrize("name", VARIANTS)
def test_the_nearest_name_of_a_row_is_the_first_with_its_trunk(name):
    variant = VARIANTS[name]
    near = VARIANTS[nearest_name(replace(variant, num_classes=3, representation_size=0, reg_tokens=2))]
    trunk = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_hidden", "stem")
    assert [getattr(near, key) for key in trunk] == [getattr(variant, key) for key in trunk]


def test_the_nearest_name_of_an_own_shape_is_that_of_b16():
    assert nearest_name(VARIANTS["vit_large_patch16_224_in21k"]) == "vit_large_patch16_224"
    assert nearest_name(replace(VARIANTS["vit_large_patch16_224"], depth=23)) == "vit_base_patch16_224"
    assert nearest_name(replace(VARIANTS["vit_large_patch16_224"], mlp_ratio=3.0)) == "vit_base_patch16_224"


@pytest.mark.parametrize(
    ("timm_architecture", "name"),
    [
        ("vit_base_patch16_224", "vit_base_patch16_224"),
        ("vit_base_patch16_224_miil", "vit_base_patch16_224_miil_in21k"),
        ("deit_base_distilled_patch16_384", "deit_base_distilled_patch16_384"),
        ("vit_base_r50_s16_384", "vit_base_r50_s16_384"),
        ("vit_base2_patch32_256", "vit_base2_patch32_256"),
        ("vit_base", None),
        ("resnet50", None),
    ],
)
def test_an_architecture_of_timm_has_a_name_or_none(timm_architecture, name):
    assert architecture_name(timm_architecture) == name


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if entry.timm_name])
def test_every_architecture_of_timm_in_the_table_finds_a_row_of_its_shape(name):
    row = TABLE[name]
    found = TABLE[architecture_name(row.timm_name.split(".")[0])].variant
    without_head = {"num_classes": 0, "representation_size": 0}
    assert replace(found, **without_head) == replace(row.variant, **without_head)
