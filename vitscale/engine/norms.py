"""Norms of gradient, update and weights by part of the model, from the pieces that each rank holds."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vitscale.optim import Flat, Segment

Kind = Literal["grad_norm", "update_norm", "weight_norm"]
KINDS: tuple[Kind, ...] = ("grad_norm", "update_norm", "weight_norm")
PARTS = (
    "patch_embed",
    "tokens",
    "blocks.attn",
    "blocks.mlp",
    "blocks.norm",
    "blocks.ls",
    "norm",
    "attn_pool",
    "pre_logits",
    "head",
)
_TOKENS = {"cls_token", "dist_token", "reg_token", "pos_embed"}
_OTHERS = {part: part for part in PARTS if "." not in part} | {"head_dist": "head"}


def model_part(name: str) -> str:
    """The one of `PARTS` that a parameter belongs to, by its name in the state dict.

    Blocks are told apart by what a parameter does in them, not by their number; the normalisation of queries and keys
    is the attention's.
    """
    first, *rest = name.split(".")
    if first in _TOKENS:
        return "tokens"
    if first == "blocks":
        return "blocks." + rest[1].rstrip("0123456789")
    return _OTHERS[first]


class PartNorms:
    """Measures one update, tensor by tensor as the optimizer comes to them.

    For the update's norm it keeps the old weights: 4 bytes an element of the tensors given to one `before`.
    """

    def __init__(self, flats: Sequence[Flat], group: ProcessGroup | None, device: torch.device) -> None:
        """Measure tensors with these segments.

        Args:
            flats: the tensors that the optimizer updates.
            group: the ranks among which they are partitioned; None where each has them whole.
            device: where the sums are made.
        """
        self._segments: dict[Tensor, list[Segment]] = {}
        self._columns: dict[Tensor, Tensor] = {}
        found = set()
        for flat in flats:
            held = [segment for segment in flat.segments if segment.numel]
            self._segments[flat.tensor] = held
            self._columns[flat.tensor] = torch.tensor([PARTS.index(model_part(s.name)) for s in held], device=device)
            found |= {model_part(segment.name) for segment in flat.segments}
        # Every rank lists the same parameters, whatever it holds of them.
        self._parts = [part for part in PARTS if part in found]
        self._group = group
        self._squares = torch.zeros(len(KINDS), len(PARTS), dtype=torch.float64, device=device)
        self._old: list[Tensor] = []

    @torch.no_grad()
    def before(self, tensors: Iterable[Tensor], unclip: Tensor) -> None:
        """Take the gradients, which clipping has divided by `unclip`, and remember the weights."""
        for tensor in tensors:
            assert tensor.grad is not None
            self._add("grad_norm", tensor, tensor.grad, unclip)
            self._old.append(tensor.detach().clone())

    @torch.no_grad()
    def after(self, tensors: Iterable[Tensor]) -> None:
        """Take what became of the same tensors."""
        for tensor, old in zip(tensors, self._old, strict=True):
            self._add("update_norm", tensor, old.sub_(tensor))
            self._add("weight_norm", tensor, tensor.detach())
        self._old.clear()

    def read(self) -> dict[str, Tensor]:
        """Norms by "<kind>/<part>", of the parts that the model has; the next update is measured anew.

        Collective where the tensors are partitioned.
        """
        if self._group is not None:
            torch.distributed.all_reduce(self._squares, group=self._group)
        norms = self._squares.sqrt().float()
        self._squares.zero_()
        return {
            f"{kind}/{part}": norms[row, PARTS.index(part)] for row, kind in enumerate(KINDS) for part in self._parts
        }

    def _add(self, kind: Kind, tensor: Tensor, values: Tensor, factor: Tensor | None = None) -> None:
        segments = self._segments[tensor]
        if not segments:
            return
        norms = torch.stack(torch._foreach_norm([segment.of(values) for segment in segments])).to(self._squares)
        if factor is not None:
            norms *= factor.to(norms)
        self._squares[KINDS.index(kind)].index_add_(0, self._columns[tensor], norms.square())
