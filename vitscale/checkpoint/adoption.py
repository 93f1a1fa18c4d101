"""A training checkpoint of DeepSpeed's own as a tag of ours, from which a run goes on."""

import functools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from vitscale.checkpoint.containers import TensorFile, write_safetensors
from vitscale.checkpoint.deepspeed_files import Contents, Maker
from vitscale.checkpoint.export import check_free
from vitscale.checkpoint.formats.state_dict import Renamed
from vitscale.checkpoint.index import rank_file_name, write_index
from vitscale.checkpoint.integrity import record_file
from vitscale.checkpoint.manifest import Manifest
from vitscale.checkpoint.portable import Shapes, Weights, read_linked, same
from vitscale.checkpoint.store import CheckpointStore
from vitscale.engine import MASTER
from vitscale.errors import CheckpointError


def adopt(contents: Contents, out: Path, manifest: Manifest) -> str:
    """Write fp32 weights and Adam's moments as the one tag of a new run directory; returns the tag.

    Memory is needed for one parameter.

    Args:
        contents: what DeepSpeed saved.
        out: the folder to create.
        manifest: of the tag, but for its files.

    Raises:
        CheckpointError: `out` exists or cannot be written, there are no moments, or the state is of another model
            than the manifest's.
    """
    check_free(out)
    if not contents.moments:
        raise CheckpointError(
            f"{contents.tag}: says nothing of Adam's moments by the parameter's name (no step was made, the optimizer "
            "is another, or there was no ZeRO): import the weights alone, without --training"
        )
    shapes = {name: tuple(shape) for name, shape in manifest.shapes.items()}
    values = {MASTER: contents.weights, **contents.moments}
    found = {value: _by_our_names(contents, makers, shapes) for value, makers in values.items()}
    store = CheckpointStore(out)
    try:
        staging = store.staging(manifest.step, manifest.generation)
        path = staging / rank_file_name(0)
        write_safetensors(path, _runs(found, shapes), "fp32")
        files = [record_file(path), record_file(write_index(staging, 1))]
        return store.commit(staging, manifest.model_copy(update={"files": files}))
    except OSError as error:
        raise CheckpointError(f"{error.filename or out}: {error.strerror or error}: nothing was imported") from None
    finally:
        if not store.tags():
            shutil.rmtree(out, ignore_errors=True)


def _runs(found: Mapping[str, Weights], shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """Every value of every parameter as one run of the file."""
    for name, shape in shapes.items():
        for value, tensors in found.items():
            yield f"{name}|0|{value}", (math.prod(shape),), functools.partial(_flat, tensors, name)


def _flat(tensors: Weights, name: str) -> Tensor:
    return tensors[name].flatten()


def _by_our_names(contents: Contents, makers: Mapping[str, Maker], shapes: Shapes) -> Weights:
    held = {name: contents.shapes[name] for name in makers}
    file = Renamed(TensorFile(contents.tag, held, lambda name: makers[name]()))
    mend = "the config is of another model, or the optimizer did not train all of this one"
    return read_linked(file, file.shapes, str(contents.tag), [same(name) for name in shapes], shapes, mend)
