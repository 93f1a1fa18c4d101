"""Google's `.npz`: the original vision_transformer's layout, and big_vision's under `params/`."""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vitscale.checkpoint.card import CARD_NAME, card_of, described_by, read_card, write_card
from vitscale.checkpoint.containers import Precision, TensorFile, open_tensors, write_npz
from vitscale.checkpoint.formats.inference import at_tokens, check_dimensions, nearest_name
from vitscale.checkpoint.formats.npz_links import (
    BIG_VISION,
    CLASS_TOKEN,
    COUNTED_APART,
    COUNTED_TOGETHER,
    ORIGINAL,
    OUTSIDE,
    Layout,
    join_class_token,
    links,
)
from vitscale.checkpoint.integrity import check_file, record_file, sha256_of
from vitscale.checkpoint.portable import (
    Hints,
    LazyWeights,
    Origin,
    PortableModel,
    Shapes,
    foreign_makers,
    parameter_shapes,
    read_linked,
)
from vitscale.errors import CheckpointError, ConfigError
from vitscale.model import TABLE, Variant, resolve_variant

ARRAYS_NAME = "model.npz"
_NORM_EPS = 1e-6
# Rows and columns that every stem's stride divides; the true ones follow from the position embedding.
_ANY_GRID = 1024
# Where the position embedding lay in big_vision for a while before 2022.
_BETWEEN = "Transformer/pos_embedding"
_PREFIXES = ("params/img/", "params/", "opt/target/", "")


class NpzFormat:
    """See `Format`."""

    bf16 = False

    def __init__(self, name: str, layout: Layout) -> None:
        self.name = name
        self.layout = layout

    def recognises(self, path: Path) -> bool:
        """A file of this layout, or a folder with one."""
        arrays = path / ARRAYS_NAME if path.is_dir() else path
        return (
            arrays.suffix == ".npz"
            and arrays.is_file()
            and _is_big_vision(open_tensors(arrays)) == (self.layout is BIG_VISION)
        )

    def refusal(self, model: PortableModel) -> str:
        """See `Format`."""
        variant = model.variant
        big_vision = self.layout is BIG_VISION
        unknown = {
            "distillation token": variant.distilled, "register tokens": variant.reg_tokens > 0,
            "LayerScale": variant.layer_scale > 0, "normalised queries and keys": variant.qk_norm,
            "parallel blocks": variant.parallel, "SwiGLU": variant.act == "swiglu",
            "LayerNorm without bias": not variant.norm_bias, "attention without bias": not variant.qkv_bias,
            "ResNet stem": big_vision and variant.stem is not None,
            "attention pooling": not big_vision and variant.pool == "map",
            f"LayerNorm with an epsilon of {variant.norm_eps:g}": variant.norm_eps != _NORM_EPS,
        }  # fmt: skip
        names = [what for what, present in unknown.items() if present]
        return f"Google's {self.name} layout has no {' and no '.join(names)}" if names else ""

    def notes(self, model: PortableModel) -> list[str]:
        """See `Format`."""
        notes = []
        if model.variant.act == "gelu":
            notes.append(
                "Google's code computes GELU in its tanh form, this model was trained with the exact one: its logits "
                "there differ slightly (train with model.act=gelu_tanh for equal ones)"
            )
        if model.variant.num_classes == 0 and self.layout is ORIGINAL:
            notes.append(
                "no head: vision_transformer's load_pretrained stops without one (KeyError 'head'), its load does not"
            )
        if model.variant.stem is not None:
            notes.append(
                "Google's StdConv divides by std + 1e-5 and its GroupNorm has an epsilon of 1e-6; ours are timm's: "
                "outputs differ by 1e-5 to 1e-3"
            )
        return notes

    def as_target(self, model: PortableModel) -> PortableModel:
        """The model that Google's code makes of the arrays: in big_vision the class token has no position.

        The sum is rounded to fp32 in the file, as the model itself rounds it in fp32.
        """
        if model.variant.pool != "token" or self.layout.joins_class_token:
            return model

        def joined() -> Tensor:
            return join_class_token(model.checked("cls_token"), model.checked("pos_embed"))[0]

        def patches_only() -> Tensor:
            pos_embed = model.checked("pos_embed").clone()
            pos_embed[:, :1] = 0
            return pos_embed

        makers = {name: functools.partial(model.checked, name) for name in model.shapes}
        return replace(model, weights=LazyWeights({**makers, "cls_token": joined, "pos_embed": patches_only}))

    def write(self, model: PortableModel, folder: Path, precision: Precision) -> None:
        """See `Format`. The card beside it says what arrays cannot: labels, pixels, images that are not square."""
        makers = foreign_makers(links(model.variant, self.layout, with_parts=True), model)
        named = ((key if key.startswith(OUTSIDE) else self.layout.prefix + key, make) for key, make in makers.items())
        write_npz(folder / ARRAYS_NAME, named)
        write_card(card_of(model, record_file(folder / ARRAYS_NAME)), folder)

    def read(self, path: Path, hints: Hints) -> PortableModel:
        """See `Format`. A file without a card is taken to be Google's: GELU in its tanh form, pixels from -1 to 1."""
        arrays_path = path / ARRAYS_NAME if path.is_dir() else path
        file = open_tensors(arrays_path)
        layout = _layout_of(file)
        if layout is None:
            raise CheckpointError(f"{arrays_path}: embedding/kernel is missing: no Vision Transformer of Google's")
        arrays = _Arrays(file, layout.prefix)
        card = None
        if path.is_dir() and (path / CARD_NAME).is_file():
            card = read_card(path)
            check_file(arrays_path, card.weights)
        variant = card.variant if card else _infer(arrays.shapes, layout, str(arrays_path), hints)
        shapes = parameter_shapes(variant)
        linked = links(variant, layout, with_parts=CLASS_TOKEN in arrays.shapes)
        mend = f"it was taken for {hints.name}: leave --model out, or say what it is" if hints.name else ""
        weights = read_linked(arrays, arrays.shapes, str(arrays_path), linked, shapes, mend)
        if card:
            return described_by(card, weights, path, hints)
        name = hints.name or nearest_name(variant)
        origin = Origin(path.name, sha256_of(arrays_path))
        return PortableModel(name, variant, weights, TABLE[name].preprocessing, origin, hints.labels)


def _layout_of(file: TensorFile) -> Layout | None:
    """Layout of a file, found by its keys; None where there is no Vision Transformer in it."""
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}embedding/kernel" in file.shapes), None)
    if prefix is None:
        return None
    keys = (BIG_VISION.pos_embed, _BETWEEN, ORIGINAL.pos_embed)
    pos_embed = next((key for key in keys if prefix + key in file.shapes), ORIGINAL.pos_embed)
    together = any(f"/{COUNTED_TOGETHER.attention}/" in key for key in file.shapes)
    joins = f"{prefix}cls" in file.shapes and (
        pos_embed == ORIGINAL.pos_embed or _has_class_row(file.shapes.get(prefix + pos_embed, ()), file.shapes)
    )
    return Layout(prefix, COUNTED_TOGETHER if together else COUNTED_APART, pos_embed, joins)


def _has_class_row(pos_embed: tuple[int, ...], shapes: Shapes) -> bool:
    """Whether a big_vision file has a row for the class token, as those before 2022 do: one more than a square."""
    patches = pos_embed[1] - 1 if len(pos_embed) == 3 else 0
    return CLASS_TOKEN not in shapes and math.isqrt(patches) ** 2 == patches


class _Arrays(Mapping[str, Tensor]):
    """A file's arrays without the prefix; what lies outside it (an optimizer's state, a text tower) is left out."""

    def __init__(self, file: TensorFile, prefix: str) -> None:
        self._file = file
        self._prefix = prefix
        keys = (key.removeprefix(prefix) for key in file if key.startswith((prefix, OUTSIDE)))
        self.shapes: Shapes = {key: _squeezed(key, file.shapes[self._in_file(key)]) for key in keys}

    def __getitem__(self, key: str) -> Tensor:
        return self._file[self._in_file(key)].reshape(self.shapes[key])

    def _in_file(self, key: str) -> str:
        return key if key.startswith(OUTSIDE) else self._prefix + key

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _squeezed(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """GroupNorm's scale and bias, which early Flax kept as (1, 1, 1, channels), in one dimension."""
    return shape[-1:] if re.search(r"(?:^|/)gn\w+/(?:scale|bias)$", key) else shape


def _infer(shapes: Shapes, layout: Layout, where: str, hints: Hints) -> Variant:
    """Architecture of a file without a card: the shapes tell all but the activation, which is Google's."""
    query = f"Transformer/encoderblock_0/{layout.block.attention}/query/kernel"
    hidden = f"Transformer/encoderblock_0/{layout.block.mlp}/Dense_0/kernel"
    for key in (query, hidden, layout.pos_embed):
        if key not in shapes:
            more = " (a scanned checkpoint: unstack it with big_vision first)" if _is_scanned(shapes) else ""
            raise CheckpointError(f"{where}: {key} is missing{more}")
    dimensions = {"embedding/kernel": 4, query: 3, hidden: 2, layout.pos_embed: 3, "conv_root/kernel": 4}
    check_dimensions(shapes, where, {**dimensions, "pre_logits/kernel": 2, "head/kernel": 2})
    height, width, in_chans, embed_dim = shapes["embedding/kernel"]
    stem = _stages(shapes)
    if stem is not None:
        in_chans = shapes["conv_root/kernel"][2]
    pool = "token" if "cls" in shapes else "map" if "MAPHead_0/probe" in shapes else "avg"
    found: dict[str, Any] = {
        "patch_size": (height, width),
        "embed_dim": embed_dim,
        "depth": 1 + max(int(m[1]) for key in shapes if (m := re.match(r"Transformer/encoderblock_(\d+)/", key))),
        "num_heads": shapes[query][1],
        "mlp_ratio": shapes[hidden][1] / embed_dim,
        "representation_size": shapes["pre_logits/kernel"][1] if "pre_logits/kernel" in shapes else 0,
        "num_classes": shapes["head/kernel"][1] if "head/kernel" in shapes else 0,
        "in_chans": in_chans,
        "pool": pool,
        "act": "gelu_tanh",
        "stem": stem,
    }
    try:
        if hints.name:
            own = ("num_classes", "in_chans", "representation_size", "pool", "act")
            variant = resolve_variant(hints.name, **{**{key: found[key] for key in own}, **hints.changes})
        else:
            any_size = (height * _ANY_GRID, width * _ANY_GRID)
            variant = Variant(**{**found, "img_size": any_size, **hints.changes})
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    rows = shapes[layout.pos_embed][1] + (0 if layout.joins_class_token else variant.prefix_tokens)
    return at_tokens(variant, rows, where, "img_size" in hints.changes)


def _stages(shapes: Shapes) -> tuple[int, ...] | None:
    if "conv_root/kernel" not in shapes:
        return None
    units: dict[int, int] = {}
    for key in shapes:
        if match := re.match(r"block(\d+)/unit(\d+)/", key):
            stage = int(match[1])
            units[stage] = max(units.get(stage, 0), int(match[2]))
    return tuple(units[stage] for stage in sorted(units))


def _is_big_vision(file: TensorFile) -> bool:
    layout = _layout_of(file)
    return layout is not None and layout.pos_embed == BIG_VISION.pos_embed


def _is_scanned(shapes: Shapes) -> bool:
    return any(key.startswith("Transformer/encoderblock/") for key in shapes)
