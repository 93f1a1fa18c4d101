"""What an export is held to, and that one which is not kept leaves nothing behind."""

import fcntl
import hashlib
import importlib
import json
from dataclasses import replace
from importlib.metadata import version

import pytest
import timm
import torch
from portable_models import PIXELS, random_portable, with_weights
from safetensors.torch import load_file, save_file
from torch import nn

from vitscale.checkpoint import (
    CERTIFICATE_NAME,
    FORMATS,
    Certificate,
    CheckpointStore,
    ExportOptions,
    Manifest,
    export_model,
    rank_file_name,
    read_portable,
    record_file,
    write_fragments,
    write_portable,
)
from vitscale.checkpoint.containers import DTYPES
from vitscale.checkpoint.export import _LOCK_NAME, portable_checkpoint
from vitscale.checkpoint.verification import TOLERANCE
from vitscale.engine import MASTER, Fragment
from vitscale.errors import CheckpointError
from vitscale.model import resolve_variant

FILES = {
    "vitscale": {"card.json", "model.safetensors"},
    "timm": {"config.json", "model.safetensors"},
    "hf": {"config.json", "model.safetensors", "preprocessor_config.json"},
    "npz": {"card.json", "model.npz"},
    "big_vision": {"card.json", "model.npz"},
}


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def raises_and_leaves_nothing(folder, model, options, said):
    """Exporting fails with one line, and neither the destination nor what was written on the way is there."""
    with pytest.raises(CheckpointError, match=said) as error:
        write_portable(model, folder / "out", options)
    assert "\n" not in str(error.value)
    assert list(folder.iterdir()) == []


# What it says.


@pytest.mark.parametrize("format_", FORMATS)
def test_a_certificate_tells_what_was_written_from_what(tmp_path, format_):
    model = random_portable(img_size=(32, 48))
    returned = write_portable(model, tmp_path / "out", ExportOptions(format=format_))
    certificate = Certificate.model_validate_json((tmp_path / "out" / CERTIFICATE_NAME).read_text(encoding="utf-8"))
    assert certificate.model_dump(mode="json") == returned.model_dump(mode="json")
    assert (certificate.format, certificate.precision, certificate.verification) == (format_, "fp32", None)
    assert certificate.origin == {"path": "run/step-00000001", "sha256": "a" * 64, "weights": "raw"}
    assert resolve_variant(**certificate.model) == model.variant
    assert certificate.notes == FORMATS[format_].notes(model)
    assert certificate.round_trip.tensors == len(model.weights)
    assert certificate.round_trip.elements == sum(tensor.numel() for tensor in model.weights.values())
    assert certificate.versions == {name: version(name) for name in ("vitscale", "torch", "safetensors", "numpy")}


@pytest.mark.parametrize("format_", FORMATS)
def test_a_certificate_records_every_file_as_it_is_on_the_disk(tmp_path, format_):
    certificate = write_portable(random_portable(), tmp_path / "out", ExportOptions(format=format_))
    assert {record.name for record in certificate.files} == FILES[format_]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES[format_], CERTIFICATE_NAME}
    for record in certificate.files:
        path = tmp_path / "out" / record.name
        assert (record.size_bytes, record.sha256) == (path.stat().st_size, sha256_of(path))


def test_a_certificate_says_the_precision(tmp_path):
    certificate = write_portable(random_portable(), tmp_path / "out", ExportOptions(precision="bf16"))
    assert certificate.precision == "bf16"
    fp32 = write_portable(random_portable(), tmp_path / "fp32", ExportOptions())
    weights = {record.name: record.size_bytes for record in fp32.files}["model.safetensors"]
    assert {record.name: record.size_bytes for record in certificate.files}["model.safetensors"] < 0.7 * weights


def test_equal_models_give_equal_files(tmp_path):
    for format_ in FORMATS:
        first, second = (
            write_portable(random_portable(), tmp_path / f"{format_}-{turn}", ExportOptions(format=format_))
            for turn in (1, 2)
        )
        assert first == second


def test_what_is_converted_names_the_file_that_it_came_from(tmp_path):
    write_portable(random_portable(), tmp_path / "timm-folder", ExportOptions(format="timm"))
    found = read_portable(tmp_path / "timm-folder")
    certificate = write_portable(found, tmp_path / "out", ExportOptions(format="hf"))
    expected = sha256_of(tmp_path / "timm-folder" / "model.safetensors")
    assert certificate.origin == {"path": "timm-folder", "sha256": expected, "weights": "raw"}


@pytest.mark.parametrize("format_", ["vitscale", "npz", "big_vision"])
def test_a_card_carries_how_the_weights_were_trained_and_where_they_are_from(tmp_path, format_):
    model = replace(random_portable(), trained={"step": 7, "metrics": {"top1": 0.5}})
    write_portable(model, tmp_path / "out", ExportOptions(format=format_))
    origin = {"path": "run/step-00000001", "sha256": "a" * 64, "weights": "raw"}
    found = read_portable(tmp_path / "out")
    assert found.trained == {"step": 7, "metrics": {"top1": 0.5}, "origins": [origin]}
    write_portable(found, tmp_path / "next", ExportOptions(format=format_))
    asked = {"path": "out", "sha256": found.origin.sha256, "weights": "raw"}
    assert read_portable(tmp_path / "next").trained["origins"] == [origin, asked]


@pytest.fixture
def run(tmp_path):
    """A run directory with one checkpoint, cut over two ranks, that has a moving average too; and its two models."""
    model = random_portable(representation_size=7)
    average = replace(model, weights={name: tensor + 1 for name, tensor in model.weights.items()})
    store = CheckpointStore(tmp_path / "run")
    staging = store.staging(3, 1)
    for rank in (0, 1):
        fragments = []
        for name, tensor in model.weights.items():
            half = tensor.numel() // 2
            piece = slice(0, half) if rank == 0 else slice(half, None)
            values = {MASTER: tensor.flatten()[piece], "ema": average.weights[name].flatten()[piece]}
            fragments.append(Fragment(name, half * rank, values, True))
        write_fragments(fragments, staging / rank_file_name(rank))
    pixels = {"mean": PIXELS.mean, "std": PIXELS.std, "val_crop": PIXELS.crop, "interpolation": PIXELS.interpolation}
    manifest = Manifest(
        step=3, generation=1, world_size=2, optimizer_steps=3, cursor={"position": 24}, config={"data": pixels},
        model={"name": model.name, **model.variant.arguments()}, labels=list(model.labels),
        shapes={name: list(tensor.shape) for name, tensor in model.weights.items()}, metrics={"top1": 0.25},
        versions={"torch": "1"}, saved_at="", files=[record_file(staging / rank_file_name(rank)) for rank in (0, 1)],
    )  # fmt: skip
    store.commit(staging, manifest)
    return tmp_path / "run", {"raw": model, "ema": average}


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("named", ["run", "tag"])
def test_an_export_of_a_run_is_certified_against_the_tags_manifest(tmp_path, run, weights, named):
    directory, models = run
    tag = directory / "checkpoints" / "step-00000003"
    certificate = export_model(tag if named == "tag" else directory, tmp_path / "out", weights=weights)
    manifest = sha256_of(tag / "manifest.json")
    assert certificate.origin == {"path": "run/step-00000003", "sha256": manifest, "weights": weights}
    back = read_portable(tmp_path / "out")
    assert back.variant == models[weights].variant
    assert (back.labels, back.preprocessing) == (models[weights].labels, PIXELS)
    assert all(torch.equal(back.weights[name], tensor) for name, tensor in models[weights].weights.items())
    trained = back.trained
    assert (trained["source"], trained["step"], trained["images_seen"]) == ("run/step-00000003", 3, 24)
    assert (trained["metrics"], trained["versions"]) == ({"top1": 0.25}, {"torch": "1"})
    assert trained["origins"] == [certificate.origin]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"config": {}}, "'data'"),
        ({"model": {}}, "'name'"),
        ({"cursor": {}}, "'position'"),
        ({"shapes": {}}, "'blocks.0"),
    ],
)
def test_a_manifest_that_does_not_describe_its_model_is_refused(tmp_path, run, changes, key):
    directory, _ = run
    store = CheckpointStore(directory)
    manifest = store.manifest("step-00000003").model_copy(update=changes)
    with pytest.raises(CheckpointError, match=rf"manifest\.json: does not say what was trained: {key}"):
        portable_checkpoint(store.path("step-00000003"), manifest)


# What is not kept is not exported.


def flipped(model):
    weights = model.weights["norm.bias"].clone()
    weights[3] = -weights[3]
    return with_weights(model, norm__bias=weights)


@pytest.mark.parametrize("format_", FORMATS)
def test_a_format_that_writes_one_value_otherwise_is_found_out(tmp_path, monkeypatch, format_):
    model, write = random_portable(), type(FORMATS[format_]).write
    monkeypatch.setattr(
        type(FORMATS[format_]),
        "write",
        lambda self, model, folder, precision: write(self, flipped(model), folder, precision),
    )
    change = 2 * abs(model.weights["norm.bias"][3].item())
    said = rf"\.tmp-out: norm\.bias came back changed by up to {change:.3g}: the export was not kept$"
    raises_and_leaves_nothing(tmp_path, model, ExportOptions(format=format_), said)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("format_", ["vitscale", "timm", "hf"])
def test_the_smallest_change_of_one_value_is_found_out(tmp_path, monkeypatch, format_, precision):
    model, write = random_portable(), type(FORMATS[format_]).write
    value = model.weights["norm.weight"].to(DTYPES[precision])
    nudged = value.view({2: torch.int16, 4: torch.int32}[value.element_size()]).clone()
    nudged[3] += 1
    other = with_weights(model, norm__weight=nudged.view(value.dtype).float())
    monkeypatch.setattr(
        type(FORMATS[format_]), "write", lambda self, _, folder, precision: write(self, other, folder, precision)
    )
    options = ExportOptions(format=format_, precision=precision)
    raises_and_leaves_nothing(tmp_path, model, options, r"norm\.weight came back changed by up to ")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(path, change):
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def reconfigure(path, *keys, value):
    """Change one value of a JSON file."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    at = tree
    for key in keys[:-1]:
        at = at[key]
    assert at[keys[-1]] != value
    at[keys[-1]] = value
    path.write_text(json.dumps(tree), encoding="utf-8")


WEIGHTS, CONFIG = "model.safetensors", "config.json"
TAMPERED = {
    "vitscale: a bit": ("vitscale", lambda f: flip_a_bit(f / WEIGHTS), "its SHA-256 is not the recorded one"),
    "vitscale: the activation": (
        "vitscale", lambda f: reconfigure(f / "card.json", "model", "act", value="gelu_tanh"),
        "the export came back with act gelu_tanh instead of gelu: it was not kept",
    ),
    "timm: a value": (
        "timm", lambda f: rewrite(f / WEIGHTS, lambda t: t["norm.bias"].neg_()), r"norm\.bias came back changed by up"
    ),
    "timm: a bit": ("timm", lambda f: flip_a_bit(f / WEIGHTS), "came back changed by up to "),
    "timm: the labels": (
        "timm", lambda f: reconfigure(f / CONFIG, "label_names", value=["n1", "n2", "n3", "n4", "n5"]),
        "the labels came back changed: the export was not kept",
    ),
    "timm: the pixels": (
        "timm", lambda f: reconfigure(f / CONFIG, "pretrained_cfg", "mean", value=[0.5, 0.5, 0.5]),
        "the pixels came back changed: the export was not kept",
    ),
    "hf: the pixels": (
        "hf", lambda f: reconfigure(f / "preprocessor_config.json", "size", "shortest_edge", value=41),
        "the pixels came back changed: the export was not kept",
    ),
    "timm: a tensor less": (
        "timm", lambda f: rewrite(f / WEIGHTS, lambda t: t.pop("norm.bias")), r"norm\.bias \[24\] is missing"
    ),
    "timm: a tensor more": (
        "timm", lambda f: rewrite(f / WEIGHTS, lambda t: t.update(more=torch.ones(2))),
        r"more \[2\] has no place in this model",
    ),
    "timm: a shape": (
        "timm", lambda f: rewrite(f / WEIGHTS, lambda t: t.update({"norm.bias": torch.ones(23)})),
        r"norm\.bias has shape \[23\], the model wants \[24\]",
    ),
    "timm: the heads": (
        "timm", lambda f: reconfigure(f / CONFIG, "model_args", "num_heads", value=4),
        "the export came back with num_heads 4 instead of 2: it was not kept",
    ),
    "timm: the activation": (
        "timm", lambda f: reconfigure(f / CONFIG, "model_args", "act_layer", value="gelu_tanh"),
        "the export came back with act gelu_tanh instead of gelu: it was not kept",
    ),
    "hf: a value": (
        "hf", lambda f: rewrite(f / WEIGHTS, lambda t: t["classifier.bias"].neg_()), r"head\.bias came back changed by"
    ),
    "hf: a tensor less": (
        "hf", lambda f: rewrite(f / WEIGHTS, lambda t: t.pop("vit.embeddings.cls_token")),
        r"vit\.embeddings\.cls_token \[1, 1, 24\] is missing",
    ),
    "hf: the heads": (
        "hf", lambda f: reconfigure(f / CONFIG, "num_attention_heads", value=4),
        "the export came back with num_heads 4 instead of 2: it was not kept",
    ),
    "hf: the epsilon": (
        "hf", lambda f: reconfigure(f / CONFIG, "layer_norm_eps", value=1e-12),
        "the export came back with norm_eps 1e-12 instead of 1e-06: it was not kept",
    ),
    "npz: the epsilon": (
        "npz", lambda f: reconfigure(f / "card.json", "model", "norm_eps", value=1e-12),
        "the export came back with norm_eps 1e-12 instead of 1e-06: it was not kept",
    ),
    "npz: a bit": ("npz", lambda f: flip_a_bit(f / "model.npz"), "its SHA-256 is not the recorded one"),
    "big_vision: the arrays gone": ("big_vision", lambda f: (f / "model.npz").unlink(), r"model\.npz: no such file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TAMPERED)
def test_what_is_changed_between_writing_and_reading_back_is_found_out(tmp_path, monkeypatch, kind):
    format_, tamper, said = TAMPERED[kind]
    write = type(FORMATS[format_]).write

    def write_and_tamper(self, model, folder, precision):
        write(self, model, folder, precision)
        tamper(folder)

    monkeypatch.setattr(type(FORMATS[format_]), "write", write_and_tamper)
    raises_and_leaves_nothing(tmp_path, random_portable(), ExportOptions(format=format_), said)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("format_", FORMATS)
def test_weights_that_are_no_numbers_are_not_exported(tmp_path, format_, value):
    model = random_portable()
    weight = model.weights["blocks.1.attn.qkv.weight"].clone()
    weight[3, 4] = weight[5, 6] = value
    said = (
        r"run/step-00000001: blocks\.1\.attn\.qkv\.weight: 2 of 1728 values are NaN or infinite: "
        "these weights are damaged or of a run that diverged"
    )
    damaged = with_weights(model, blocks__1__attn__qkv__weight=weight)
    raises_and_leaves_nothing(tmp_path, damaged, ExportOptions(format=format_), said)


def test_a_tensor_of_another_shape_than_the_architectures_is_not_exported(tmp_path):
    said = r"run/step-00000001: norm\.bias has shape \[2\], the model wants \[24\]"
    damaged = with_weights(random_portable(), norm__bias=torch.ones(2))
    raises_and_leaves_nothing(tmp_path, damaged, ExportOptions(), said)


def test_labels_for_another_number_of_classes_make_no_model():
    with pytest.raises(CheckpointError, match="run/step-00000001: 1 labels for a head of 5 classes"):
        replace(random_portable(), labels=("one",))


# The destination.


@pytest.mark.parametrize("occupied", ["folder", "file"])
def test_what_exists_is_not_written_over(tmp_path, run, occupied):
    out = tmp_path / "out"
    out.mkdir() if occupied == "folder" else out.write_text("mine")
    said = r"out: exists already: choose another --out, or remove it"
    with pytest.raises(CheckpointError, match=said):
        write_portable(random_portable(), out, ExportOptions())
    with pytest.raises(CheckpointError, match=said):
        export_model(run[0], out)
    assert list(out.iterdir()) == [] if occupied == "folder" else out.read_text() == "mine"


def test_missing_folders_above_the_destination_are_made(tmp_path):
    write_portable(random_portable(), tmp_path / "a" / "b" / "out", ExportOptions())
    assert (tmp_path / "a" / "b" / "out" / CERTIFICATE_NAME).is_file()


def test_what_an_export_that_was_killed_left_is_taken_away(tmp_path):
    (tmp_path / ".tmp-out").mkdir()
    (tmp_path / ".tmp-out" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-out" / "left-over").write_bytes(b"")
    write_portable(random_portable(), tmp_path / "out", ExportOptions())
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not (tmp_path / "out" / "left-over").exists()


@pytest.mark.parametrize("format_", FORMATS)
def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, format_):
    def write(self, model, folder, precision):
        (folder / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(FORMATS[format_]), "write", write)
    said = r"out: No space left on device: nothing was exported$"
    raises_and_leaves_nothing(tmp_path, random_portable(), ExportOptions(format=format_), said)


def test_a_destination_below_a_file_ends_in_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file/\.tmp-out: Not a directory: nothing was exported$"):
        write_portable(random_portable(), tmp_path / "file" / "out", ExportOptions())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_destination_that_someone_else_filled_meanwhile_stays_theirs(tmp_path, monkeypatch):
    write = type(FORMATS["vitscale"]).write

    def write_while_another_does(self, model, folder, precision):
        write(self, model, folder, precision)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")

    monkeypatch.setattr(type(FORMATS["vitscale"]), "write", write_while_another_does)
    with pytest.raises(CheckpointError, match=r"out: exists already: choose another --out"):
        write_portable(random_portable(), tmp_path / "out", ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_an_export_under_way_is_not_disturbed(tmp_path):
    staging = tmp_path / ".tmp-out"
    staging.mkdir()
    (staging / "half").write_bytes(b"half")
    with (staging / _LOCK_NAME).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"out: another export is writing it: wait for it, or choose another"):
            write_portable(random_portable(), tmp_path / "out", ExportOptions())
        assert (staging / "half").read_bytes() == b"half"
    write_portable(random_portable(), tmp_path / "out", ExportOptions())
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def write(self, model, folder, precision):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(FORMATS["timm"]), "write", write)
    with pytest.raises(KeyboardInterrupt):
        write_portable(random_portable(), tmp_path / "out", ExportOptions(format="timm"))
    assert list(tmp_path.iterdir()) == []


# The verification.


@pytest.mark.parametrize("format_", ["timm", "hf", "npz", "big_vision"])
def test_a_verification_gives_its_numbers(tmp_path, format_):
    model = random_portable(depth=3)
    certificate = write_portable(model, tmp_path / "out", ExportOptions(format=format_, verify=True))
    found = certificate.verification
    assert len(found.blocks) == 3
    assert all(0 <= value <= TOLERANCE for value in [*found.blocks, found.features, found.output])
    assert (found.images, found.seed, found.output_is) == (2, 0, "logits")
    assert found.seconds > 0
    assert found.peak_rss_bytes >= 0
    library = "transformers" if format_ == "hf" else "timm"
    assert found.library.startswith(f"{library} {version(library)}")
    saved = Certificate.model_validate_json((tmp_path / "out" / CERTIFICATE_NAME).read_text(encoding="utf-8"))
    assert saved.verification == found


def test_a_verification_measures_the_memory_of_the_two_models_in_float64(tmp_path):
    model = random_portable(embed_dim=512)
    certificate = write_portable(model, tmp_path / "out", ExportOptions(format="timm", verify=True))
    model_bytes = 8 * certificate.round_trip.elements
    # In part it is memory that the process had used and freed before.
    assert model_bytes / 4 < certificate.verification.peak_rss_bytes < 6 * model_bytes


def spoilt_timm(monkeypatch, spoil):
    """timm as it would be if its models computed something else."""
    create_model = timm.create_model

    def create_spoilt(*args, **kwargs):
        model = create_model(*args, **kwargs)
        spoil(model)
        return model

    monkeypatch.setattr(timm, "create_model", create_spoilt)


def other_gelu(model):
    model.blocks[1].mlp.act = nn.GELU(approximate="tanh")


def other_heads(model):
    attention = model.blocks[1].attn
    attention.num_heads, attention.head_dim, attention.scale = 4, 6, 6**-0.5


def other_epsilon(model):
    model.blocks[2].norm1.eps = 1e-5


def other_final_epsilon(model):
    model.norm.eps = 1e-5


def other_head(model):
    model.head.register_forward_hook(lambda module, inputs, output: output + 1e-8)


def no_number(model):
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output * float("nan"))


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (other_gelu, "block 1"),
        (other_heads, "block 1"),
        (other_epsilon, "block 2"),
        (other_final_epsilon, "the features"),
        (other_head, "the logits"),
        (no_number, "block 0"),
    ],
)
@pytest.mark.parametrize("format_", ["timm", "npz", "big_vision"])
def test_a_library_that_computes_something_else_is_named_with_the_first_place(
    tmp_path, monkeypatch, format_, spoil, where
):
    spoilt_timm(monkeypatch, spoil)
    said = (
        rf"\.tmp-out: timm {version('timm')}.* computes something else from these files: {where} differ by "
        r".*\(equal would be below .*\): nothing was exported$"
    )
    raises_and_leaves_nothing(tmp_path, random_portable(depth=3), ExportOptions(format=format_, verify=True), said)


def test_transformers_computing_something_else_is_named_with_the_first_place(tmp_path, monkeypatch):
    transformers = importlib.import_module("transformers")
    from_pretrained = transformers.ViTForImageClassification.from_pretrained

    def spoilt(folder):
        model = from_pretrained(folder)
        next(m for m in model.modules() if isinstance(m, nn.ModuleList))[1].layernorm_after.eps = 1e-5
        return model

    monkeypatch.setattr(transformers.ViTForImageClassification, "from_pretrained", spoilt)
    said = rf"transformers {version('transformers')} computes something else from these files: block 1 differ by "
    raises_and_leaves_nothing(tmp_path, random_portable(depth=3), ExportOptions(format="hf", verify=True), said)


@pytest.mark.parametrize(
    ("format_", "library"), [("timm", "timm"), ("npz", "timm"), ("big_vision", "timm"), ("hf", "transformers")]
)
def test_a_missing_library_is_named_with_what_installs_it(tmp_path, monkeypatch, format_, library):
    import_module = importlib.import_module

    def without(name, *args):
        if name == library:
            raise ImportError("no such\nmodule")
        return import_module(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    said = rf"^--verify needs {library}: pip install 'vitscale\[verify\]' \(no such module\)$"
    raises_and_leaves_nothing(tmp_path, random_portable(), ExportOptions(format=format_, verify=True), said)


def test_our_own_format_has_no_other_library_to_compare_with():
    said = "--verify compares with another library's model: vitscale's own format has none"
    with pytest.raises(CheckpointError, match=said):
        ExportOptions(format="vitscale", verify=True)
