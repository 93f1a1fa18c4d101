"""`load_pretrained`: a model with weights, from a name of the table, a file or folder of any format, or an address."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitscale.checkpoint.adaptation import adapt_to
from vitscale.checkpoint.download import fetch
from vitscale.checkpoint.formats import read_portable
from vitscale.checkpoint.formats.npz import ARRAYS_NAME
from vitscale.checkpoint.portable import Hints
from vitscale.errors import CheckpointError
from vitscale.model import TABLE, Pool, Resampling, Size, VisionTransformer

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def load_pretrained(
    source: str | Path,
    *,
    num_classes: int | None = None,
    img_size: Size | None = None,
    in_chans: int | None = None,
    pool: Pool | None = None,
    reg_tokens: int | None = None,
    model: str | None = None,
    changes: Mapping[str, Any] | None = None,
    pos_embed: Resampling | None = None,
    cache_dir: Path | None = None,
    offline: bool | None = None,
) -> VisionTransformer:
    """Build a model with pretrained weights, in evaluation mode.

    Args:
        source: a name of the table (its published weights are fetched into the user's cache), a file or folder
            of any format, or an http(s) address of a file.
        num_classes: outputs of the head: None or the same number keep the head, 0 leaves it out, another number
            puts a fresh zero head in its place.
        img_size: input in pixels; the position embedding is resized. None keeps the weights' own.
        in_chans: channels of the input; the first convolution is adapted. None keeps the weights' own.
        pool: None keeps the weights' own; "avg" drops the class token, or attention pooling, and takes the mean.
        reg_tokens: registers; new ones start from zero. None keeps the weights' own number.
        model: for files that do not say what they are (.pth): the name of the variant.
        changes: in what the file's model differs from that variant, by field of `Variant`.
        pos_embed: how the position embedding is resized; None is as Google does for .npz, else as timm does.
        cache_dir: where downloads are kept; None is $VITSCALE_CACHE or the user's cache.
        offline: use the cache only; None is as $VITSCALE_OFFLINE says.

    Raises:
        CheckpointError: there are no such weights, they cannot be fetched, are damaged, or are of another
            architecture.
        ConfigError: the image does not divide into patches.
    """
    name, path = model, Path(source)
    if str(source) in TABLE and not path.exists():
        name = model or str(source)
        path = fetch(_published(str(source)), cache_dir=cache_dir, offline=offline)
    elif _ADDRESS.match(str(source)):
        path = fetch(str(source), cache_dir=cache_dir, offline=offline)
    elif not path.exists():
        raise CheckpointError(f"{source}: no such file or folder, and no name that `vitscale models` lists")
    found = read_portable(path, hints=Hints(name=name, changes=changes or {}))
    wanted: dict[str, Any] = {
        "num_classes": num_classes,
        "img_size": img_size,
        "in_chans": in_chans,
        "pool": pool,
        "reg_tokens": reg_tokens,
    }
    target = replace(found.variant, **{key: value for key, value in wanted.items() if value is not None})
    built = adapt_to(found, target, pos_embed or _resampling(path)).build()
    if built.variant.num_classes != target.num_classes:
        built.reset_classifier(target.num_classes)
    return built.eval()  # the fresh head too


def _resampling(path: Path) -> Resampling:
    """How the ecosystem that weights come from resizes their position embedding."""
    return "google" if path.suffix == ".npz" or (path / ARRAYS_NAME).is_file() else "timm"


def _published(name: str) -> str:
    url = TABLE[name].weights_url
    if url is None:
        raise CheckpointError(
            f"{name}: no weights of this name are published; `vitscale models` marks the names that have some"
        )
    return url
