"""Exports in the libraries they are for, and those libraries' own files in ours: the same numbers from the same pixels.

The tolerances: 1e-5 in fp32, and 1e-9 in fp64, where nothing but another order of the same sums is left.
"""

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from portable_models import PIXELS, images_for, random_portable
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

from vitscale.checkpoint import FORMATS, ExportOptions, Hints, read_portable, write_portable
from vitscale.errors import CheckpointError
from vitscale.model import Preprocessing

TOLERANCES = [pytest.param(torch.float32, 1e-5, id="fp32"), pytest.param(torch.float64, 1e-9, id="fp64")]
OBLONG = {"img_size": (32, 48), "patch_size": (8, 16)}


@pytest.fixture(scope="module")
def transformers():
    """Its import takes seconds, which no other test has to wait for."""
    library = importlib.import_module("transformers")
    library.utils.logging.disable_progress_bar()
    return library


def exported(model, out, format_, precision="fp32", **options):
    write_portable(model, out, ExportOptions(format=format_, precision=precision, **options))
    return out


def scramble(model, seed=3):
    """Values for every parameter of another library's model, so that none of them is at its harmless first one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = name.endswith("weight") and parameter.ndim == 1  # a norm's
            parameter.normal_(float(scale), 0.1, generator=generator)
    return model.eval()


def largest_difference(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-3, "the comparison is not one of zeros"
    return (ours - theirs).abs().max().item()


@torch.no_grad()
def assert_same_as_timm(ours, theirs, dtype, tolerance):
    """Features of all tokens and logits of a portable model and a timm model."""
    built, theirs, images = ours.build(dtype), theirs.to(dtype).eval(), images_for(ours, dtype)
    assert largest_difference(built.forward_features(images), theirs.forward_features(images)) <= tolerance
    assert largest_difference(built(images), theirs(images)) <= tolerance


# timm reads ours.

FOR_TIMM = [
    {},
    {"pool": "avg"},
    {"pool": "map"},
    {"pool": "map", "reg_tokens": 2, "in_chans": 1},
    {"reg_tokens": 2, "qk_norm": True, "layer_scale": 0.1},
    {"act": "gelu_tanh", "qkv_bias": False},
    {"distilled": True},
    {"distilled": True, "layer_scale": 0.1, "qkv_bias": False},
    {"mlp_ratio": 60 / 22, "embed_dim": 22},  # timm cuts 22 * (60 / 22) off to 59
    {**OBLONG, "in_chans": 4},
    {"stem": (), "patch_size": 2, "in_chans": 1},
    {"num_classes": 0},
    {"num_classes": 0, "pool": "map"},
]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("changes", FOR_TIMM, ids=str)
def test_timm_computes_from_our_folder_what_we_do(tmp_path, changes, dtype, tolerance):
    model = random_portable(**changes)
    theirs = timm.create_model(f"local-dir:{exported(model, tmp_path / 'out', 'timm')}", pretrained=True)
    assert_same_as_timm(model, theirs, dtype, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("vit_small_r26_s32_224", 64), ("vit_large_r50_s32_224", 64)])
def test_timm_computes_from_our_folder_of_a_hybrid_what_we_do(tmp_path, name, size):
    model = random_portable(name, patch_size=1, img_size=size)
    theirs = timm.create_model(f"local-dir:{exported(model, tmp_path / 'out', 'timm')}", pretrained=True)
    assert_same_as_timm(model, theirs, torch.float64, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_huge_patch14_224", "vit_giant_patch14_224", "vit_gigantic_patch14_224"])
def test_timm_computes_from_one_block_of_the_large_widths_what_we_do(tmp_path, name):
    """The ratios 48/11 and 64/13 are no floats, and timm cuts off what is behind the point."""
    width, heads = {"huge": (1280, 16), "giant": (1408, 16), "gigantic": (1664, 16)}[name.split("_")[1]]
    ratio = {1280: 4.0, 1408: 48 / 11, 1664: 64 / 13}[width]
    changes = {"img_size": 28, "patch_size": 14, "depth": 1, "embed_dim": width, "num_heads": heads}
    model = random_portable(name, **changes, mlp_ratio=ratio)
    theirs = timm.create_model(f"local-dir:{exported(model, tmp_path / 'out', 'timm')}", pretrained=True)
    assert_same_as_timm(model, theirs, torch.float64, 1e-9)


def test_timm_computes_from_our_bf16_folder_what_we_compute_from_it(tmp_path):
    out = exported(random_portable(), tmp_path / "out", "timm", "bf16")
    assert_same_as_timm(read_portable(out), timm.create_model(f"local-dir:{out}", pretrained=True), torch.float64, 1e-9)


@pytest.mark.parametrize("name", ["vit_base2_patch32_256", "vit_so400m_patch14_224", "deit_tiny_distilled_patch16_224"])
def test_a_name_that_timm_does_not_have_goes_under_one_that_it_has(tmp_path, name):
    model = random_portable(name)
    theirs = timm.create_model(f"local-dir:{exported(model, tmp_path / 'out', 'timm')}", pretrained=True)
    assert_same_as_timm(model, theirs, torch.float64, 1e-9)


def test_timm_knows_pixels_labels_and_head_of_our_folder(tmp_path):
    model = random_portable(img_size=(32, 48))
    theirs = timm.create_model(f"local-dir:{exported(model, tmp_path / 'out', 'timm')}", pretrained=True)
    assert resolve_model_data_config(theirs) == {
        "input_size": (3, 32, 48), "interpolation": "bilinear", "crop_pct": 0.8, "crop_mode": "center",
        "mean": list(PIXELS.mean), "std": list(PIXELS.std),
    }  # fmt: skip
    config = theirs.pretrained_cfg
    assert config["num_classes"] == 5
    assert tuple(config["label_names"]) == model.labels
    assert config["first_conv"] == "patch_embed.proj"
    assert config["classifier"] == "head"


@pytest.mark.parametrize(
    ("changes", "first_conv", "classifier"),
    [
        ({"distilled": True}, "patch_embed.proj", ("head", "head_dist")),
        ({"stem": (), "patch_size": 2}, "patch_embed.backbone.conv", "head"),
    ],
)
def test_timm_adapts_our_folder_to_other_channels_and_classes(tmp_path, changes, first_conv, classifier):
    """It finds the tensors to change by the names in the config."""
    out = exported(random_portable(**changes), tmp_path / "out", "timm")
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True, in_chans=1, num_classes=2)
    assert theirs.pretrained_cfg["first_conv"] == first_conv
    found = theirs.pretrained_cfg["classifier"]
    assert (found if isinstance(found, str) else tuple(found)) == classifier
    assert theirs.head.weight.shape == (2, 24)
    weight = theirs.get_parameter(f"{first_conv}.weight")
    ours = random_portable(**changes).weights[f"{first_conv}.weight"]
    assert torch.allclose(weight, ours.sum(dim=1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("img_size", [48, 16])
def test_timm_resizes_our_position_embedding_as_our_option_does(tmp_path, img_size):
    model = random_portable()
    out = exported(model, tmp_path / "out", "timm")
    resized = read_portable(exported(model, tmp_path / "resized", "timm", img_size=img_size))
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True, img_size=img_size)
    assert_same_as_timm(resized, theirs, torch.float32, 1e-5)


# We read timm's.

FROM_TIMM = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}),
    ("vit_base_patch16_224", {"reg_tokens": 3, "init_values": 0.1, "qk_norm": True}),
    ("vit_base_patch16_224", {"mlp_ratio": 3.3, "in_chans": 1}),
    ("vit_base_patch16_224", {"img_size": (32, 48), "patch_size": (8, 16)}),
    ("vit_base_patch16_224", {"num_classes": 0}),
    ("vit_base_patch16_224_miil", {}),
    ("deit_tiny_patch16_224", {}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("vit_tiny_r_s16_p8_224", {"patch_size": 2}),
]  # fmt: skip


def saved_by_timm(folder, architecture, hints=None, **changes):
    """A random model of timm's, small, and what we read from the folder that timm itself writes."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    arguments = {**small, **changes}
    theirs = scramble(timm.create_model(architecture, **arguments))
    given = {key: value for key, value in arguments.items() if key != "num_classes"}
    save_for_hf(theirs, str(folder), model_args=given, safe_serialization=True)
    return theirs, read_portable(folder, hints=hints)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(("architecture", "changes"), FROM_TIMM, ids=str)
def test_we_compute_from_timms_folder_what_timm_does(tmp_path, architecture, changes, dtype, tolerance):
    theirs, ours = saved_by_timm(tmp_path, architecture, **changes)
    assert_same_as_timm(ours, theirs, dtype, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["vit_huge_patch14_224", "vit_giant_patch14_224", "vit_gigantic_patch14_224"])
def test_we_compute_from_timms_large_widths_what_timm_does(tmp_path, architecture):
    """Nothing but the architecture's name says the width of the MLP."""
    theirs = scramble(timm.create_model(architecture, img_size=28, depth=1, num_classes=5))
    given = {"img_size": 28, "depth": 1}
    save_for_hf(theirs, str(tmp_path), model_args=given, safe_serialization=True)
    assert_same_as_timm(read_portable(tmp_path), theirs, torch.float64, 1e-9)


def test_a_folder_of_an_architecture_that_we_do_not_name_is_read_with_one_that_we_do(tmp_path):
    siglip = {"patch_size": 16, "img_size": 32}
    with pytest.raises(CheckpointError, match="'vit_base_patch16_siglip_224' is not of our table: give --model"):
        saved_by_timm(tmp_path, "vit_base_patch16_siglip_224", **siglip)
    theirs, ours = saved_by_timm(
        tmp_path, "vit_base_patch16_siglip_224", hints=Hints(name="vit_base_patch16_224"), **siglip
    )
    assert ours.variant.pool == "map"
    assert_same_as_timm(ours, theirs, torch.float64, 1e-9)


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}, "fc_norm True"),
        ("vit_tiny_patch16_224", {"act_layer": "relu"}, "act_layer 'relu'"),
        ("vit_tiny_patch16_224", {"no_embed_class": True}, "model_args no_embed_class=True is not known"),
        ("vit_tiny_patch16_224", {"pre_norm": True}, "model_args pre_norm=True is not known"),
        ("vit_tiny_patch16_224", {"final_norm": False}, "model_args final_norm=False is not known"),
    ],
)
def test_a_model_of_timms_that_computes_something_else_is_refused(tmp_path, architecture, changes, said):
    with pytest.raises(CheckpointError, match=said):
        saved_by_timm(tmp_path, architecture, **changes)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_base_patch16_224_miil"])
def test_pixels_come_from_timms_folder(tmp_path, architecture):
    theirs, ours = saved_by_timm(tmp_path, architecture)
    config = resolve_model_data_config(theirs)
    assert ours.preprocessing == Preprocessing(
        tuple(config["mean"]), tuple(config["std"]), config["crop_pct"], config["interpolation"]
    )


@pytest.mark.parametrize(
    "names",
    [["a", "b", "c", "d", "e"], {str(index): name for index, name in zip((2, 0, 1, 4, 3), "cabed", strict=True)}],
)
def test_labels_come_from_timms_folder(tmp_path, names):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, embed_dim=24, depth=1, num_heads=2)
    save_for_hf(
        theirs, str(tmp_path), {"label_names": names}, {"embed_dim": 24, "depth": 1, "num_heads": 2}, True
    )  # fmt: skip
    assert read_portable(tmp_path).labels == tuple("abcde")


# transformers reads ours.

FOR_TRANSFORMERS = {
    "classifier": ({}, "ViTForImageClassification", {}),
    "tanh GELU": ({"act": "gelu_tanh"}, "ViTForImageClassification", {}),
    "no bias": ({"qkv_bias": False, "norm_eps": 1e-12}, "ViTForImageClassification", {}),
    "oblong": ({**OBLONG, "in_chans": 4, "mlp_ratio": 3.3}, "ViTForImageClassification", {}),
    "pooler": ({"num_classes": 0, "representation_size": 7}, "ViTModel", {}),
    "no pooler": ({"num_classes": 0}, "ViTModel", {"add_pooling_layer": False}),
    "distilled": ({"distilled": True}, "DeiTForImageClassificationWithTeacher", {}),
}


@torch.no_grad()
def assert_same_as_transformers(ours, theirs, dtype, tolerance):
    """Features of all tokens, and logits or what represents the image."""
    built, theirs, images = ours.build(dtype), theirs.to(dtype).eval(), images_for(ours, dtype)
    backbone = getattr(theirs, theirs.base_model_prefix, theirs)
    features = backbone(images).last_hidden_state
    assert largest_difference(built.forward_features(images), features) <= tolerance
    outputs = theirs(images)
    if "logits" in outputs:
        expected = outputs.logits
    else:
        expected = features[:, 0] if outputs.pooler_output is None else outputs.pooler_output
    assert largest_difference(built(images), expected) <= tolerance


def loaded(transformers, class_, folder, **arguments):
    """The model that transformers makes of a folder; nothing was left over or made up."""
    theirs, info = getattr(transformers, class_).from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return theirs


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("kind", FOR_TRANSFORMERS)
def test_transformers_computes_from_our_folder_what_we_do(tmp_path, transformers, kind, dtype, tolerance):
    changes, class_, arguments = FOR_TRANSFORMERS[kind]
    model = random_portable(**changes)
    theirs = loaded(transformers, class_, exported(model, tmp_path / "out", "hf"), **arguments)
    assert theirs.dtype == torch.float32
    assert_same_as_transformers(model, theirs, dtype, tolerance)


def test_transformers_computes_from_our_bf16_folder_what_we_compute_from_it(tmp_path, transformers):
    out = exported(random_portable(), tmp_path / "out", "hf", "bf16")
    theirs = loaded(transformers, "ViTForImageClassification", out)
    assert_same_as_transformers(read_portable(out), theirs, torch.float64, 1e-9)


def test_the_features_of_a_model_with_a_representation_layer_are_transformers_pooler(tmp_path, transformers):
    model = random_portable(representation_size=7)
    out = exported(model, tmp_path / "out", "hf", features_only=True)
    theirs = loaded(transformers, "ViTModel", out).double().eval()
    images = images_for(model)
    built = model.build(torch.float64)
    with torch.no_grad():
        expected = built.pre_logits(built.pool(built.forward_features(images)))
        assert largest_difference(theirs(images).pooler_output, expected) <= 1e-9


def test_a_note_says_how_to_load_what_has_no_pooler(tmp_path, transformers):
    """Without the argument transformers makes a random pooler up."""
    model = random_portable(num_classes=0)
    certificate = write_portable(model, tmp_path / "out", ExportOptions(format="hf"))
    assert certificate.notes == [
        "load with ViTModel.from_pretrained(folder, add_pooling_layer=False): this model has no pooler"
    ]
    _, info = transformers.ViTModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert set(info["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.mark.parametrize("changes", [{}, {"distilled": True}], ids=str)
def test_transformers_auto_class_finds_the_model_and_its_labels(tmp_path, transformers, changes):
    model = random_portable(**changes)
    out = exported(model, tmp_path / "out", "hf")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(out)
    assert type(theirs).__name__ == (
        "DeiTForImageClassificationWithTeacher" if changes else "ViTForImageClassification"
    )
    assert theirs.config.id2label == dict(enumerate(model.labels))
    assert theirs.config.label2id == {name: index for index, name in enumerate(model.labels)}
    assert_same_as_transformers(model, theirs, torch.float64, 1e-9)


def photograph(height, width):
    """Smooth colours with edges, as an image file holds them."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [127 + 120 * np.sin(x / 9 + c) * np.cos(y / (7 + c)) for c in range(3)]
    pixels = np.stack(channels, axis=-1)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 90)
    return Image.fromarray(pixels.astype(np.uint8))


def by_hand(image, model):
    """What the preprocessing means: shorter side to crop's share, centre, normalise."""
    height, width = model.variant.image_px
    pixels, edge = model.preprocessing, round(min(height, width) / model.preprocessing.crop)
    shorter = min(image.size)
    size = (int(image.width * edge / shorter), int(image.height * edge / shorter))
    filter_ = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[pixels.interpolation]
    array = np.asarray(image.convert("RGB").resize(size, filter_), dtype=np.float32) / 255
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    crop = array[top : top + height, left : left + width]
    return torch.from_numpy((crop - np.float32(pixels.mean)) / np.float32(pixels.std)).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("img_size", "size"), [(32, (60, 96)), (32, (130, 70)), ((32, 48), (80, 128))])
def test_transformers_processor_makes_of_an_image_what_the_preprocessing_says(
    tmp_path, transformers, img_size, size, interpolation
):
    model = random_portable(img_size=img_size)
    model = replace(model, preprocessing=replace(model.preprocessing, interpolation=interpolation))
    processor = transformers.AutoImageProcessor.from_pretrained(exported(model, tmp_path / "out", "hf"))
    image = photograph(*size)
    found = processor(image, return_tensors="pt")["pixel_values"]
    assert found.shape == (1, 3, *model.variant.image_px)
    # Two rounding steps of 1/255 between the libraries' resizing, in units of the normalised pixels.
    assert largest_difference(found[0], by_hand(image, model)) <= 2 / 255 / min(model.preprocessing.std) + 1e-6


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_transformers_processor_normalises_a_plain_image_exactly(tmp_path, transformers, mode):
    model = random_portable()
    processor = transformers.AutoImageProcessor.from_pretrained(exported(model, tmp_path / "out", "hf"))
    image = Image.new("RGB", (50, 40), (60, 60, 60)).convert(mode)
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    expected = (60 / 255 - torch.tensor(PIXELS.mean)) / torch.tensor(PIXELS.std)
    assert torch.allclose(found, expected[:, None, None].expand(3, 32, 32), atol=1e-5)


def test_an_image_goes_through_transformers_pipeline_to_our_labels(tmp_path, transformers):
    model = random_portable()
    classify = transformers.pipeline("image-classification", model=str(exported(model, tmp_path / "out", "hf")))
    found = classify(photograph(60, 96), top_k=5)
    assert {entry["label"] for entry in found} == set(model.labels)
    with torch.no_grad():
        logits = model.build()(by_hand(photograph(60, 96), model)[None])[0]
    assert found[0]["label"] == model.labels[logits.argmax()]


def test_there_is_no_processor_for_images_that_are_not_rgb(tmp_path):
    certificate = write_portable(random_portable(in_chans=4), tmp_path / "out", ExportOptions(format="hf"))
    assert certificate.notes == ["no preprocessor_config.json: transformers' processors are for RGB images"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "certificate.json", "config.json", "model.safetensors"
    }  # fmt: skip


# We read transformers'.

TINY = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 50, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
FROM_TRANSFORMERS = {
    "classifier": ("ViTForImageClassification", {"num_labels": 5, "layer_norm_eps": 1e-12}, {}),
    "gelu_new": ("ViTForImageClassification", {"num_labels": 5, "hidden_act": "gelu_new"}, {}),
    "gelu_pytorch_tanh": ("ViTForImageClassification", {"num_labels": 2, "hidden_act": "gelu_pytorch_tanh"}, {}),
    "no bias": ("ViTForImageClassification", {"num_labels": 3, "qkv_bias": False, "layer_norm_eps": 1e-5}, {}),
    "oblong": ("ViTForImageClassification", {"image_size": [32, 48], "patch_size": [8, 16], "num_channels": 4}, {}),
    "pooler": ("ViTModel", {}, {}),
    "pooler of another width": ("ViTModel", {"pooler_output_size": 7}, {}),
    "no pooler": ("ViTModel", {}, {"add_pooling_layer": False}),
    "distilled": ("DeiTForImageClassificationWithTeacher", {"num_labels": 5}, {}),
}


def saved_by_transformers(transformers, folder, kind):
    class_, changes, arguments = FROM_TRANSFORMERS[kind]
    config = getattr(transformers, "DeiTConfig" if class_.startswith("DeiT") else "ViTConfig")(**{**TINY, **changes})
    theirs = scramble(getattr(transformers, class_)(config, **arguments))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("kind", FROM_TRANSFORMERS)
def test_we_compute_from_transformers_folder_what_it_does(tmp_path, transformers, kind, dtype, tolerance):
    theirs = saved_by_transformers(transformers, tmp_path, kind)
    assert_same_as_transformers(read_portable(tmp_path), theirs, dtype, tolerance)


def test_what_a_config_leaves_out_is_as_transformers_has_it(tmp_path, transformers):
    saved_by_transformers(transformers, tmp_path, "classifier")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("layer_norm_eps", "qkv_bias", "hidden_act", "num_channels"):
        del config[key]
    path.write_text(json.dumps(config), encoding="utf-8")
    theirs = loaded(transformers, "ViTForImageClassification", tmp_path)
    assert_same_as_transformers(read_portable(tmp_path), theirs, torch.float64, 1e-9)


def test_what_transformers_saves_of_our_folder_is_our_model_again(tmp_path, transformers):
    model = random_portable()
    theirs = loaded(transformers, "ViTForImageClassification", exported(model, tmp_path / "ours", "hf"))
    theirs.save_pretrained(tmp_path / "theirs")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "theirs")
    back = read_portable(tmp_path / "theirs")
    assert back.variant == model.variant
    assert back.labels == model.labels
    assert back.preprocessing == model.preprocessing
    assert all(torch.equal(back.weights[name], tensor) for name, tensor in model.weights.items())


def test_pixels_come_from_transformers_own_processor(tmp_path, transformers):
    saved_by_transformers(transformers, tmp_path, "classifier")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_std=[0.25, 0.5, 0.5]).save_pretrained(
        tmp_path
    )
    assert read_portable(tmp_path).preprocessing == Preprocessing(
        (0.5, 0.5, 0.5), (0.25, 0.5, 0.5), crop=1.0, interpolation="bilinear"
    )


# timm's reader of Google's npz reads ours.

NPZ = {
    "class token": ("npz", {}, {"global_pool": "token"}),
    "average": ("npz", {"pool": "avg"}, {"global_pool": "avg"}),
    "tanh GELU": ("npz", {"act": "gelu_tanh"}, {"global_pool": "token", "act_layer": "gelu_tanh"}),
    "oblong": ("npz", OBLONG, {"global_pool": "token", **OBLONG}),
    "one channel": ("npz", {"in_chans": 1}, {"global_pool": "token", "in_chans": 1}),
    "ResNet root": ("npz", {"stem": (), "patch_size": 2}, {"global_pool": "token", "patch_size": 2}),
    "big_vision: class token": ("big_vision", {}, {"global_pool": "token", "no_embed_class": True}),
    "big_vision: average": ("big_vision", {"pool": "avg"}, {"global_pool": "avg"}),
    "big_vision: map": ("big_vision", {"pool": "map"}, {"global_pool": "map"}),
    "big_vision: oblong": (
        "big_vision", {**OBLONG, "pool": "map", "in_chans": 1}, {"global_pool": "map", **OBLONG, "in_chans": 1}
    ),
}  # fmt: skip


def read_by_timms_npz_reader(folder, changes, num_classes=5):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "fc_norm": False}
    arguments |= changes | {"class_token": changes["global_pool"] == "token", "num_classes": num_classes}
    hybrid = changes.get("patch_size") == 2
    theirs = timm.create_model("vit_tiny_r_s16_p8_224" if hybrid else "vit_base_patch16_224", **arguments)
    theirs.load_pretrained(str(folder / "model.npz"))
    return theirs


@pytest.mark.parametrize("kind", NPZ)
def test_timms_reader_of_googles_npz_makes_our_model_of_our_file(tmp_path, kind):
    format_, changes, theirs = NPZ[kind]
    model = random_portable(**changes)
    theirs = read_by_timms_npz_reader(exported(model, tmp_path / "out", format_), theirs)
    assert_same_as_timm(FORMATS[format_].as_target(model), theirs, torch.float64, 1e-9)
    # What is not in the target's model: big_vision keeps the class token's sum, rounded.
    assert_same_as_timm(model, theirs.float(), torch.float32, 1e-5)


def test_timms_reader_of_googles_npz_takes_the_features_without_the_representation_layer(tmp_path):
    """And copies a head that fits, which is then another model: why the notes and --verify speak of features."""
    model = random_portable(representation_size=24)
    folder = exported(model, tmp_path / "out", "npz")
    theirs = read_by_timms_npz_reader(folder, {"global_pool": "token"}, num_classes=0).double().eval()
    images, built = images_for(model), model.build(torch.float64)
    with torch.no_grad():
        assert largest_difference(built.pool(built.forward_features(images)), theirs(images)) <= 1e-9
        wrong = read_by_timms_npz_reader(folder, {"global_pool": "token"}).double().eval()
        assert largest_difference(built(images), wrong(images)) > 0.01


# The verification that a user asks for with --verify.


@pytest.mark.parametrize("format_", ["npz", "big_vision"])
def test_the_verification_says_that_timms_npz_reader_takes_only_some_channels(tmp_path, format_):
    model = random_portable(in_chans=4)
    with pytest.raises(NotImplementedError):
        read_by_timms_npz_reader(exported(model, tmp_path / "out", format_), {"global_pool": "token", "in_chans": 4})
    said = "--verify: timm's reader of npz takes images of 1 or 3 channels, not 4: export without --verify"
    with pytest.raises(CheckpointError, match=said):
        write_portable(model, tmp_path / "verified", ExportOptions(format=format_, verify=True))
    assert not (tmp_path / "verified").exists()


@pytest.mark.parametrize(
    ("format_", "changes"),
    [
        ("timm", {}), ("timm", {"pool": "map", "reg_tokens": 1}), ("timm", {"num_classes": 0}),
        ("hf", {}), ("hf", {"num_classes": 0}), ("hf", {"num_classes": 0, "representation_size": 7}),
        ("hf", {"distilled": True}), ("npz", {"representation_size": 7}), ("npz", {"stem": (), "patch_size": 2}),
        ("big_vision", {}), ("big_vision", {"pool": "map"}),
    ],
    ids=str,
)  # fmt: skip
def test_the_verification_finds_the_library_equal(tmp_path, transformers, format_, changes):
    options = ExportOptions(format=format_, verify=True)
    found = write_portable(random_portable(**changes), tmp_path / "out", options).verification
    assert found.library.startswith("transformers " if format_ == "hf" else "timm ")
    assert len(found.blocks) == 2
    assert max(*found.blocks, found.features, found.output) <= 1e-9
    assert found.largest > 0.1
    representation = changes.get("representation_size") and format_ == "hf"
    pooled = "num_classes" in changes or "representation_size" in changes
    assert found.output_is == ("representation" if representation else "pooled features" if pooled else "logits")


@pytest.mark.parametrize("format_", ["npz", "big_vision"])
def test_the_verification_says_in_a_number_what_googles_tanh_gelu_changes(tmp_path, format_):
    options = ExportOptions(format=format_, verify=True)
    exact = write_portable(random_portable(), tmp_path / "exact", options)
    assert 1e-9 < exact.verification.tanh_gelu < 1e-2
    assert any("GELU in its tanh form" in note for note in exact.notes)
    tanh = write_portable(random_portable(act="gelu_tanh"), tmp_path / "tanh", options)
    assert tanh.verification.tanh_gelu is None
    assert tanh.notes == []


def test_other_libraries_compute_gelu_as_the_config_says_so_no_such_number_is_given(tmp_path):
    found = write_portable(random_portable(), tmp_path / "out", ExportOptions(format="timm", verify=True))
    assert found.verification.tanh_gelu is None
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["model_args"]["act_layer"] == "gelu"


def test_a_hybrids_note_says_how_googles_norms_differ(tmp_path):
    certificate = write_portable(
        random_portable(stem=(), patch_size=2, act="gelu_tanh"), tmp_path / "out", ExportOptions(format="npz")
    )
    (note,) = certificate.notes
    assert note.startswith("Google's StdConv divides by std + 1e-5 and its GroupNorm has an epsilon of 1e-6; ours are")
