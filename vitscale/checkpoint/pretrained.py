"""`load_pretrained`: a model with weights, from a name of the table, a file or folder of any format, or an address."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitscale.checkpoint.adaptation import adapt_to
from vitscale.checkpoint.download import fetch
from vitscale.checkpoint.formats import Hints, read_portable
from vitscale.checkpoint.portable import PortableModel
from vitscale.errors import CheckpointError
from vitscale.model import TABLE, Resampling, Size, VisionTransformer

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def load_pretrained(
    source: str | Path,
    *,
    num_classes: int | None = None,
    img_size: Size | None = None,
    in_chans: int | None = None,
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
    return _fitted(found, num_classes, img_size, in_chans, pos_embed or ("google" if path.suffix == ".npz" else "timm"))


def _fitted(
    found: PortableModel, num_classes: int | None, img_size: Size | None, in_chans: int | None, method: Resampling
) -> VisionTransformer:
    own = found.variant
    target = replace(
        own,
        num_classes=own.num_classes if num_classes is None else num_classes,
        img_size=own.img_size if img_size is None else img_size,
        in_chans=own.in_chans if in_chans is None else in_chans,
    )
    built = adapt_to(found, target, method).build()
    if built.variant.num_classes != target.num_classes:
        built.reset_classifier(target.num_classes)
    return built.eval()  # the fresh head too


def _published(name: str) -> str:
    url = TABLE[name].weights_url
    if url is None:
        raise CheckpointError(
            f"{name}: no weights of this name are published; `vitscale models` marks the names that have some"
        )
    return url
