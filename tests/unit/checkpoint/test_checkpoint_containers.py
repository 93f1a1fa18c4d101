"""Files of tensors: what other readers find in them, and that one tensor at a time is enough memory."""

import json
import os
import struct
import subprocess
import sys
import weakref
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vitscale.checkpoint.containers import (
    DTYPES,
    TensorFile,
    open_tensors,
    safetensors_header,
    write_npz,
    write_safetensors,
)
from vitscale.errors import CheckpointError


def some_tensors():
    """Tensors of every layout in memory; the keys are what Google's files have in theirs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "params/a/kernel": normal(3, 4),
        "a scalar": torch.tensor(2.7182818),
        "empty": torch.empty(0, 3),
        "one": normal(1),
        "transposed": normal(5, 3).T,
        "strided": normal(6, 6)[::2, 1::3],
        "broadcast": normal(4, 1).expand(4, 3),
        "channels last": normal(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "half": normal(7).half(),
        "double": normal(7).double(),
        "inexact in bf16": torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1e-38, 3.4e38, 0.1]),
    }


def triples(tensors):
    return [(key, tuple(tensor.shape), lambda tensor=tensor: tensor) for key, tensor in tensors.items()]


def pairs(tensors):
    return [(key, lambda tensor=tensor: tensor) for key, tensor in tensors.items()]


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_safetensors_own_reader_finds_equal_bits(tmp_path, precision):
    path, tensors = tmp_path / "x.safetensors", some_tensors()
    write_safetensors(path, triples(tensors), precision)
    found = load_file(path)
    assert set(found) == set(tensors)
    for key, tensor in tensors.items():
        expected = tensor.to(DTYPES[precision])
        assert (found[key].dtype, found[key].shape) == (expected.dtype, expected.shape)
        assert torch.equal(bits(found[key]), bits(expected)), key


def test_a_safetensors_header_is_aligned_and_says_torchs_layout(tmp_path):
    path = tmp_path / "x.safetensors"
    for length in range(1, 9):  # the header's own length takes every remainder
        write_safetensors(path, triples({"k" * length: torch.ones(2)}), "fp32")
        (size,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert size % 8 == 0
        assert json.loads(path.read_bytes()[8 : 8 + size])["k" * length]["data_offsets"] == [0, 8]
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_safetensors_header_is_aligned_whatever_is_in_the_table():
    for length in range(1, 17):
        table = {"k" * length: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        header = safetensors_header(table)
        assert len(header) % 8 == 0
        assert struct.unpack("<Q", header[:8]) == (len(header) - 8,)
        assert json.loads(header[8:]) == table


def test_a_safetensors_file_is_the_one_that_safetensors_would_write(tmp_path):
    """Bit for bit, if the tensors come in its order: the keys by name."""
    tensors = {key: torch.randn(3, 5) for key in "abc"}
    write_safetensors(tmp_path / "ours.safetensors", triples(tensors), "fp32")
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_numpy_finds_equal_bits_in_an_npz_without_unpickling(tmp_path):
    path, tensors = tmp_path / "x.npz", some_tensors()
    write_npz(path, pairs(tensors))
    with np.load(path, allow_pickle=False) as found:
        assert list(found) == list(tensors)
        for key, tensor in tensors.items():
            array = found[key]
            assert (array.dtype, array.shape) == (np.float32, tuple(tensor.shape))
            assert array.tobytes() == tensor.float().contiguous().numpy().tobytes(), key


def test_equal_weights_are_equal_files_whenever_they_are_written(tmp_path):
    for name in ("first", "second"):
        write_safetensors(tmp_path / f"{name}.safetensors", triples(some_tensors()), "bf16")
        write_npz(tmp_path / f"{name}.npz", pairs(some_tensors()))
    for suffix in ("safetensors", "npz"):
        assert (tmp_path / f"first.{suffix}").read_bytes() == (tmp_path / f"second.{suffix}").read_bytes()
    with zipfile.ZipFile(tmp_path / "first.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth", ".pt", ".bin"])
def test_the_ending_says_how_a_file_is_read(tmp_path, suffix):
    path, tensors = tmp_path / f"x{suffix}", some_tensors()
    if suffix == ".safetensors":
        write_safetensors(path, triples(tensors), "fp32")
    elif suffix == ".npz":
        write_npz(path, pairs(tensors))
    else:
        torch.save(tensors, path)
    file = open_tensors(path)
    assert (file.path, len(file), set(file)) == (path, len(tensors), set(tensors))
    assert file.shapes == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        assert torch.equal(file[key].double(), tensor.to(file[key].dtype).double()), key


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.h5", r"x\.h5: weights are read from \.safetensors, \.npz, \.pth, \.pt and \.bin, not '\.h5'"),
        ("absent.npz", r"absent\.npz: no such file"),
    ],
)
def test_a_file_of_no_known_ending_or_none_at_all_is_refused(tmp_path, name, said):
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(CheckpointError, match=said):
        open_tensors(tmp_path / name)


def test_bf16_comes_back_from_safetensors_and_torch_in_its_own_dtype(tmp_path):
    tensor = torch.randn(5).bfloat16()
    write_safetensors(tmp_path / "x.safetensors", triples({"w": tensor}), "bf16")
    torch.save({"w": tensor}, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        found = open_tensors(tmp_path / name)["w"]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, tensor)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_jaxs_bf16_arrays_are_read_as_what_they_are(tmp_path, shape, order):
    """NumPy has no bf16 and writes JAX's as two bytes without meaning."""
    tensor = torch.randn(shape).bfloat16()
    array = np.asarray(tensor.view(torch.int16).numpy(), order=order).view("V2")
    np.savez(tmp_path / "x.npz", w=array)
    found = open_tensors(tmp_path / "x.npz")["w"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("compressed", [False, True])
def test_numpys_own_files_are_read_in_their_own_dtypes(tmp_path, compressed):
    arrays = {
        "f2": np.float16([1.5]), "f4": np.float32([[1, 2]]), "f8": np.float64(0.1),
        "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }  # fmt: skip
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", **arrays)
    file = open_tensors(tmp_path / "x.npz")
    for key, array in arrays.items():
        assert file[key].numpy().dtype == array.dtype
        assert np.array_equal(file[key].numpy(), array)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "teacher"])
def test_a_torch_checkpoints_state_dict_is_found_where_others_put_it(tmp_path, wrapper):
    torch.save({wrapper: {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "x.pth")
    assert open_tensors(tmp_path / "x.pth").shapes == {"w": (2,)}


def test_what_is_no_float_is_no_weight(tmp_path):
    np.savez(tmp_path / "x.npz", w=np.arange(3))
    torch.save({"w": torch.arange(3)}, tmp_path / "x.pth")
    for name in ("x.npz", "x.pth"):
        with pytest.raises(CheckpointError, match=rf"{name}: w cannot be read: it is torch\.int64"):
            open_tensors(tmp_path / name)["w"]


def test_a_tensor_is_read_when_it_is_asked_for_and_not_before(tmp_path):
    read = []
    file = TensorFile(tmp_path, {"a": (1,), "b": (2,)}, lambda key: read.append(key) or torch.ones(1))
    assert (list(file), len(file), "a" in file.shapes) == (["a", "b"], 2, True)
    assert read == []
    file["b"], file["b"]
    assert read == ["b", "b"]  # nothing is kept either


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_opening_a_file_reads_no_tensor_of_it(tmp_path, suffix):
    """Bytes that change after the opening are seen by the reading."""
    path, count = tmp_path / f"x.{suffix}", 1 << 20
    ones = {"w": torch.ones(count)}
    write_safetensors(path, triples(ones), "fp32") if suffix == "safetensors" else write_npz(path, pairs(ones))
    file = open_tensors(path)
    content = path.read_bytes()
    end = content.rindex(torch.ones(1).numpy().tobytes()) + 4
    with path.open("r+b") as opened:
        opened.seek(end - 4)
        opened.write(torch.full((1,), 2.0).numpy().tobytes())
    if suffix == "safetensors":
        assert file["w"].sum() == count + 1
    else:  # the zip's own checksum sees it
        with pytest.raises(CheckpointError, match=r"w cannot be read: Bad CRC-32"):
            file["w"]


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_a_writer_lets_go_of_each_tensor_before_the_one_after_the_next(tmp_path, suffix):
    made, alive = [], []

    def make(value):
        alive.append(sum(reference() is not None for reference in made))
        tensor = torch.full((1000,), float(value))
        made.append(weakref.ref(tensor))
        return tensor

    makers = {f"w{index}": lambda index=index: make(index) for index in range(10)}
    path = tmp_path / f"x.{suffix}"
    if suffix == "safetensors":
        write_safetensors(path, [(key, (1000,), maker) for key, maker in makers.items()], "fp32")
    else:
        write_npz(path, makers.items())
    assert max(alive) <= 1


_MEASURE = """
import sys
from pathlib import Path
import torch
from vitscale.checkpoint.containers import open_tensors, write_npz, write_safetensors
from vitscale.telemetry import peak_rss_bytes, reset_peak_rss

def risen_bytes(name, count, precision="fp32", keep=False):
    kept, path = [], Path(sys.argv[1]) / name
    def make(index):
        tensor = torch.full((1250, 2000), float(index)).T if index % 2 else torch.full((2000, 1250), float(index))
        kept.append(tensor if keep else None)
        return tensor
    makers = [(f"w{i}", lambda i=i: make(i)) for i in range(count)]
    before = reset_peak_rss()
    if path.suffix == ".npz":
        write_npz(path, makers)
    else:
        write_safetensors(path, [(key, (2000, 1250), maker) for key, maker in makers], precision)
    written = peak_rss_bytes() - before
    assert path.stat().st_size > count * 2000 * 1250 * (2 if precision == "bf16" else 4)
    kept.clear()
    before = reset_peak_rss()
    for key, tensor in open_tensors(path).items():
        assert tensor.shape == (2000, 1250) and tensor.min() == tensor.max() == int(key[1:])
        kept.append(tensor if keep else None)
    path.unlink()
    return written, peak_rss_bytes() - before

risen_bytes("warm.safetensors", 1, "bf16")
print(*risen_bytes("x.safetensors", 40), *risen_bytes("x.safetensors", 10, "bf16"), *risen_bytes("x.npz", 10))
print(*risen_bytes("x.safetensors", 10, keep=True), *risen_bytes("x.npz", 10, keep=True))
"""


def test_writing_and_reading_400_mb_takes_the_memory_of_a_few_tensors(tmp_path):
    tensor_bytes = 2000 * 1250 * 4
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}  # what is freed goes back to the system at once
    command = [sys.executable, "-c", _MEASURE, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    streamed, kept = ([int(number) for number in line.split()] for line in done.stdout.splitlines())
    assert max(streamed) < 4 * tensor_bytes, done.stdout
    assert min(kept) > 8 * tensor_bytes, "the measurement would see a writer or reader that holds everything"
