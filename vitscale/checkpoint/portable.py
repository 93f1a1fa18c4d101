"""A model apart from any file format: its architecture, its weights by our names, labels, pixels, provenance.

Every format is a list of links between our tensors and its own. Reading and writing go link by link, so that
neither needs more memory than the largest tensor, and every file is checked against the shapes that the links
give for the architecture.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vitscale.checkpoint.containers import TensorFile, printable
from vitscale.errors import CheckpointError
from vitscale.model import Preprocessing, Variant, VisionTransformer

Weights = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Convert = Callable[..., tuple[Tensor, ...]]


class LazyWeights(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for and not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        """`makers` has a function for each name."""
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        """Make one tensor."""
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._makers)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._makers)


@dataclass(frozen=True)
class Origin:
    """Where weights came from."""

    path: str
    """A tag, a folder or a file, without the machine's own path."""
    sha256: str
    """Of the tag's manifest (which holds the digests of all its files), or of the file of weights."""
    weights: str = "raw"
    """`raw`, or `ema` for an exponential moving average."""


@dataclass(frozen=True)
class Hints:
    """What a user says about a file that does not say it itself."""

    name: str | None = None
    """A variant of the table."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the variant: fields of `Variant`."""
    labels: tuple[str, ...] = ()
    """Class names in label order."""
    unsafe_pickle: bool = False
    """Whether to execute pickles of DeepSpeed's that cannot be read otherwise."""


@dataclass(frozen=True)
class PortableModel:
    """A model that any format can write.

    Raises:
        CheckpointError: there are labels, but not one for each output of the head.
    """

    name: str
    """Name in the table that the architecture was derived from."""
    variant: Variant
    weights: Weights
    """fp32 tensors by our names, all of the architecture's and no others."""
    preprocessing: Preprocessing
    origin: Origin
    labels: tuple[str, ...] = ()
    """Class names in label order; empty where they are not known."""
    trained: Mapping[str, Any] = field(default_factory=dict)
    """How the weights were trained, as far as it is known."""

    def __post_init__(self) -> None:
        if self.labels and len(self.labels) != self.variant.num_classes:
            raise CheckpointError(
                f"{self.origin.path}: {len(self.labels)} labels for a head of {self.variant.num_classes} classes"
            )

    @cached_property
    def shapes(self) -> Shapes:
        """Every parameter of the architecture with its shape."""
        return parameter_shapes(self.variant)

    def checked(self, name: str) -> Tensor:
        """One tensor in fp32.

        Raises:
            CheckpointError: it has another shape than the architecture's, or values that are no numbers.
        """
        tensor = self.weights[name].float()
        if tuple(tensor.shape) != self.shapes[name]:
            raise CheckpointError(wrong_shape(self.origin.path, name, tuple(tensor.shape), self.shapes[name]))
        # One odd value makes the sum odd. A sum may overflow too, so only then is each value looked at.
        if not torch.isfinite(tensor.sum()) and not (finite := torch.isfinite(tensor)).all():
            odd = tensor.numel() - int(finite.sum())
            raise CheckpointError(
                f"{self.origin.path}: {name}: {odd} of {tensor.numel()} values are NaN or infinite: "
                "these weights are damaged or of a run that diverged"
            )
        return tensor

    def build(self, dtype: torch.dtype = torch.float32) -> VisionTransformer:
        """The model itself, in evaluation mode; its weights are a copy of its own."""
        with torch.device("meta"):
            model = VisionTransformer(self.variant)
        # Copied, for what a file gives is the file itself in memory: a model must outlive whatever becomes of that.
        state = {name: self.checked(name).to(dtype, copy=True) for name in self.shapes}
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()


@dataclass(frozen=True)
class Link:
    """Some of our tensors and the foreign tensors that say the same."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    export: Convert
    """Our tensors -> theirs; what it gives beyond `theirs` is left out."""
    restore: Convert
    """Their tensors -> ours."""


def same(ours: str, theirs: str | None = None) -> Link:
    """A tensor that only has another name, or not even that."""
    return Link((ours,), (theirs or ours,), lambda tensor: (tensor,), lambda tensor: (tensor,))


def own_names(variant: Variant) -> list[Link]:
    """Every tensor of an architecture under its own name, which is timm's too."""
    return [same(name) for name in parameter_shapes(variant)]


def parameter_shapes(variant: Variant) -> Shapes:
    """Every parameter of an architecture with its shape, in the model's order."""
    with torch.device("meta"):
        model = VisionTransformer(variant)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def foreign_shapes(links: Sequence[Link], shapes: Shapes) -> Shapes:
    """The shape of each foreign tensor, found by converting tensors without memory."""
    found: dict[str, tuple[int, ...]] = {}
    for link in links:
        made = link.export(*(torch.empty(shapes[name], device="meta") for name in link.ours))
        found |= {key: tuple(tensor.shape) for key, tensor in zip(link.theirs, made, strict=False)}
    return found


def foreign_makers(links: Sequence[Link], model: PortableModel) -> dict[str, Callable[[], Tensor]]:
    """A maker for each foreign tensor of a model; those of one link, asked for in turn, are made once."""
    newest: dict[tuple[str, ...], tuple[Tensor, ...]] = {}

    def make(link: Link, place: int) -> Tensor:
        if link.ours not in newest:
            newest.clear()
            newest[link.ours] = link.export(*(model.checked(name) for name in link.ours))
        return newest[link.ours][place]

    return {
        key: functools.partial(make, link, place) for link in links for place, key in enumerate(link.theirs)
    }  # fmt: skip


def read_linked(
    file: Mapping[str, Tensor], found: Shapes, where: str, links: Sequence[Link], shapes: Shapes, mend: str = ""
) -> LazyWeights:
    """Our weights out of a file's tensors.

    Args:
        file: the tensors by foreign key.
        found: their shapes.
        where: the file, for messages.
        links: of the architecture that the file is taken to be of.
        shapes: our parameters of that architecture.
        mend: what the user can do about a file of another architecture.

    Raises:
        CheckpointError: a tensor is missing, is not known, or has another shape; the line names it.
    """
    tail = f": {mend}" if mend else ""
    if unlinked := set(shapes).symmetric_difference(name for link in links for name in link.ours):
        name = min(unlinked)
        why = "has no place in it" if name in shapes else "is in every one"
        raise CheckpointError(f"{where}: no file of this format is of the model that was asked for: {name} {why}{tail}")
    expected = foreign_shapes(links, shapes)
    for key, shape in expected.items():
        if key not in found:
            raise CheckpointError(f"{where}: {key} {list(shape)} is missing{tail}")
        if found[key] != shape:
            raise CheckpointError(wrong_shape(where, key, found[key], shape) + tail)
    if extra := [key for key in found if key not in expected]:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        what = f"{printable(extra[0])} {list(found[extra[0]])}"
        raise CheckpointError(f"{where}: {what} has no place in this model{more}{tail}")
    return LazyWeights(
        {name: _restore_maker(link, place, file) for link in links for place, name in enumerate(link.ours)}
    )


def read_tensor_file(file: TensorFile, links: Sequence[Link], shapes: Shapes, mend: str = "") -> LazyWeights:
    """`read_linked` for a file as it is."""
    return read_linked(file, file.shapes, str(file.path), links, shapes, mend)


def wrong_shape(where: str, key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The line about a tensor of another shape."""
    return f"{where}: {key} has shape {list(found)}, the model wants {list(expected)}"


def _restore_maker(link: Link, place: int, file: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    return lambda: link.restore(*(file[key].float() for key in link.theirs))[place]
