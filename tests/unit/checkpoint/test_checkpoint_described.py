"""What a card or config says of weights counts; what a user says beside it is heard or refused, never dropped."""

import threading

import pytest
import torch
from portable_models import random_portable

from vitscale.checkpoint import ExportOptions, Hints, read_portable, write_portable
from vitscale.errors import CheckpointError
from vitscale.model import Preprocessing

CARDS = ["vitscale", "npz", "big_vision"]


def written(folder, format_, **changes):
    model = random_portable(**changes)
    write_portable(model, folder / "out", ExportOptions(format=format_))
    return model, folder / "out"


@pytest.mark.parametrize("format_", CARDS)
def test_labels_that_are_given_take_the_place_of_the_cards(tmp_path, format_):
    model, out = written(tmp_path, format_)
    names = tuple(f"class {index}" for index in range(model.variant.num_classes))
    assert read_portable(out, hints=Hints(labels=names)).labels == names


@pytest.mark.parametrize("format_", CARDS)
@pytest.mark.parametrize(
    ("hints", "said"),
    [({"name": "vit_tiny_patch16_224"}, "leave --model out"), ({"changes": {"act": "gelu"}}, "leave model.act out")],
)
def test_an_architecture_is_not_told_twice(tmp_path, format_, hints, said):
    _, out = written(tmp_path, format_)
    with pytest.raises(CheckpointError, match=f"card.json says what this is .*: {said}"):
        read_portable(out, hints=Hints(**hints))


@pytest.mark.parametrize(
    ("format_", "file"),
    [
        ("vitscale", "model.safetensors"),
        ("timm", "model.safetensors"),
        ("hf", "model.safetensors"),
        ("npz", "model.npz"),
    ],
)
def test_the_file_in_a_described_folder_stands_for_the_folder(tmp_path, format_, file):
    model, out = written(tmp_path, format_)
    found = read_portable(out / file)
    assert (found.variant, found.labels, found.preprocessing) == (model.variant, model.labels, model.preprocessing)


def test_where_weights_came_from_is_kept_over_conversions(tmp_path):
    model, out = written(tmp_path, "vitscale")
    for name in ("second", "third"):
        write_portable(read_portable(out), tmp_path / name, ExportOptions(format="npz"))
        out = tmp_path / name
    assert [origin["path"] for origin in read_portable(out).trained["origins"]] == [model.origin.path, "out", "second"]


def test_two_exports_to_one_place_do_not_mix(tmp_path):
    """The second comes while the first is writing; it ends with one line, and the first is whole."""
    first, second = random_portable(), random_portable()
    begun, go_on = threading.Event(), threading.Event()

    class Slow(dict):
        def __getitem__(self, name):
            begun.set()
            assert go_on.wait(30)
            return super().__getitem__(name)

    object.__setattr__(first, "weights", Slow(first.weights))
    exporting = threading.Thread(target=write_portable, args=(first, tmp_path / "out", ExportOptions()))
    exporting.start()
    assert begun.wait(30)
    with pytest.raises(CheckpointError, match="out: another export is writing it: wait"):
        write_portable(second, tmp_path / "out", ExportOptions())
    go_on.set()
    exporting.join()
    found = read_portable(tmp_path / "out")
    assert all(torch.equal(found.weights[name], first.weights[name]) for name in first.shapes)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_keys_for_one_tensor_are_refused_with_both(tmp_path):
    state = dict(random_portable().weights)
    torch.save({**state, "module.norm.weight": state["norm.weight"]}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"norm\.weight and module\.norm\.weight would both be norm\.weight"):
        read_portable(tmp_path / "x.pth", hints=Hints(name="vit_tiny_patch16_224"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_numbers_that_are_no_floats_are_no_weights(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in random_portable(num_heads=3).weights.items()}
    torch.save(state, tmp_path / "x.pth")
    changes = {key: random_portable(num_heads=3).variant.arguments()[key] for key in ("patch_size", "img_size", "depth",
               "embed_dim", "num_heads", "mlp_ratio")}  # fmt: skip
    found = read_portable(tmp_path / "x.pth", hints=Hints(name="vit_tiny_patch16_224", changes=changes))
    with pytest.raises(
        CheckpointError, match=r"cannot be read: it is torch\.\w+, torch\.strided: weights are dense floats"
    ):
        found.build()


def test_a_hugging_face_folder_without_processor_says_what_it_is_taken_for(tmp_path, caplog):
    _, out = written(tmp_path, "hf")
    (out / "preprocessor_config.json").unlink()
    assert read_portable(out).preprocessing == Preprocessing(crop=1.0)
    assert f"{out}: no preprocessor_config.json: taken for pixels from -1 to 1 of the whole image" in caplog.text
