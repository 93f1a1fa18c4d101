"""What a tag of DeepSpeed's holds of each parameter: the fp32 weights and Adam's moments, put together when asked for.

Each kind of tag says differently where a parameter lies:

    stage 0     fp32: the module's state itself. bf16 and fp16: the module's state is rounded, and the fp32 weights
                beside it have no names: they are found again by their rounded values
    stage 1, 2  a flat tensor a parameter group and rank; `param_slice_mappings` has the run of each parameter
    stage 3     a flat tensor a sub-group and rank, in which every parameter of `param_shapes` has
                ceil(numel / world_size) elements in turn
    universal   a file a parameter and value
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitscale.checkpoint.containers import one_line
from vitscale.checkpoint.deepspeed_files import folder
from vitscale.checkpoint.deepspeed_files.pickles import StoredTensor, read_pickle
from vitscale.engine import MASTER
from vitscale.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's, by their keys in DeepSpeed's files and in ours."""
_UNIVERSAL_NAMES = {MASTER: "fp32", **{key: key for key in MOMENTS}}

Maker = Callable[[], Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Pieces = Mapping[str, Sequence["_Piece"]]
Flats = Sequence[Mapping[int, StoredTensor]]
"""[rank][parameter group]."""
_Found = tuple[dict[str, Maker], dict[str, dict[str, Maker]]]
"""Weights, and moments by their keys, of the parameters that the optimizer updates."""


@dataclass(frozen=True)
class Contents:
    """A tag's parameters."""

    tag: Path
    files: tuple[Path, ...]
    """All that were read."""
    shapes: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, Maker]
    """The fp32 weights, of the parameter's shape; rounded ones where the tag has no others."""
    moments: Mapping[str, Mapping[str, Maker]]
    """By the moment's key, of each parameter that the optimizer updates; empty where it keeps others, or none yet."""
    step: int
    """Steps, those included that were skipped."""
    optimizer_steps: int
    """Updates that Adam's bias correction counts."""


class _Piece(NamedTuple):
    """A run of a flat tensor that holds the next elements of a parameter."""

    rank: int
    group: int
    start: int
    numel: int


def read_deepspeed(path: Path, unsafe: bool = False) -> Contents:
    """Index a tag; tensors are read when they are asked for, and memory is needed for one of them.

    Args:
        path: the folder that save_checkpoint was given, or one of its tags, which may be universal.
        unsafe: whether to execute pickles that cannot be read otherwise.

    Raises:
        CheckpointError: there is no tag, or nothing says which; a file is missing, damaged, or laid out in another
            way than DeepSpeed does it.
    """
    tag = folder.locate_tag(path)
    try:
        return _Reader(tag, unsafe).read()
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{tag}: not laid out as DeepSpeed 0.19 does it ({type(error).__name__}: {one_line(error)}): "
            "it is damaged, or of another release"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{error.filename or tag}: cannot be read: {error.strerror or error}") from None


class _Reader:
    def __init__(self, tag: Path, unsafe: bool) -> None:
        self._tag = tag
        self._unsafe = unsafe
        self._files: list[Path] = []
        self._updates: set[int] = set()

    def read(self) -> Contents:
        path, stage_3 = folder.model_file(self._tag)
        model = self._open(path)
        if (ranks := model["mp_world_size"]) != 1:
            raise CheckpointError(f"{path}: the model is spread over {ranks} ranks, which is not read here")
        groups = model["param_shapes"] or []
        shapes = {name: tuple(map(int, shape)) for group in groups for name, shape in group.items()}
        _check_names(shapes)
        if (self._tag / "zero").is_dir():
            trained, moments = self._universal(shapes)
        elif stage_3:
            trained, moments = self._stage_3(model, shapes)
        elif shapes:
            trained, moments = self._stages_1_and_2(model["dp_world_size"], shapes)
        else:
            trained, moments = _stage_0(model), {}
        rest = self._beside(model) if stage_3 else _whole(model["module"])
        weights = {name: maker for name, (maker, _) in rest.items()} | trained
        shapes = {name: shape for name, (_, shape) in rest.items()} | shapes
        for alias, name in (model["shared_params"] or {}).items():
            weights[alias], shapes[alias] = weights[name], shapes[name]
        _check_names(shapes)
        step, skipped = int(model["global_steps"]), int(model["skipped_steps"])
        updates = max(self._updates, default=step - skipped)  # fused kernels count for themselves
        return Contents(self._tag, tuple(self._files), shapes, weights, moments, step, updates)

    def _open(self, path: Path) -> Any:
        self._files.append(path)
        return read_pickle(path, self._unsafe)

    def _stages_1_and_2(self, world_size: int, shapes: Shapes) -> _Found:
        states = self._partitions(world_size)
        pieces: dict[str, list[_Piece]] = {name: [] for name in shapes}
        for rank, state in enumerate(states):
            for group, addresses in enumerate(state["param_slice_mappings"]):
                for name, address in addresses.items():
                    pieces[name].append(_Piece(rank, group, address.start, address.numel))
        for name, shape in shapes.items():
            if (found := sum(piece.numel for piece in pieces[name])) != math.prod(shape):
                raise CheckpointError(
                    f"{self._tag}: its partitions hold {found} of the {math.prod(shape)} elements of {name}: "
                    "its files are of several saves"
                )
        flats = [dict(enumerate(state["single_partition_of_fp32_groups"])) for state in states]
        base = [state["base_optimizer_state"] for state in states]
        # A list of states where the checkpoint was to be elastic.
        adam = [state["state"] if isinstance(state, dict) else dict(enumerate(state)) for state in base]
        self._check_updates(adam)
        return _joined(pieces, flats, shapes), _joined_moments(pieces, adam, shapes)

    def _stage_3(self, model: Any, shapes: Shapes) -> _Found:
        world_size = model["dp_world_size"]
        states = self._partitions(world_size)
        flats = [dict(enumerate(state["fp32_flat_groups"])) for state in states]
        pieces: dict[str, list[_Piece]] = {}
        for group, sub_group in enumerate(model["param_shapes"]):
            start = 0
            for name in sub_group:
                numel = math.prod(shapes[name])
                padded = -(-numel // world_size)
                pieces[name] = [
                    _Piece(rank, group, start, max(0, min(padded, numel - rank * padded))) for rank in range(world_size)
                ]
                start += padded
            for rank, rank_flats in enumerate(flats):
                if (found := math.prod(rank_flats[group].shape)) != start:
                    raise CheckpointError(
                        f"{self._files[1 + rank]}: has {found} elements of group {group}, where {start} were expected: "
                        "the rest is elsewhere (MiCS, NVMe), or the file is of another save"
                    )
        adam = [state["optimizer_state_dict"]["state"] for state in states]
        self._check_updates(adam)
        return _joined(pieces, flats, shapes), _joined_moments(pieces, adam, shapes)

    def _partitions(self, world_size: int) -> list[Any]:
        states = []
        for path in folder.partition_files(self._tag, world_size):
            state = self._open(path)["optimizer_state_dict"]
            count = state["partition_count"]  # of each group, at stages 1 and 2
            if (found := max(count) if isinstance(count, list) else count) != world_size:
                raise CheckpointError(
                    f"{path}: one of {found} partitions, where {world_size} ranks saved: it is of another save"
                )
            states.append(state)
        return states

    def _check_updates(self, adam: Sequence[Mapping[int, Any]]) -> None:
        """See that the partitions are of one save: a save over an older one of the same tag may have been cut off."""
        for rank, groups in enumerate(adam):
            counts = [state["step"] for state in groups.values() if "step" in state]
            updates = {int(count.read() if isinstance(count, StoredTensor) else count) for count in counts}
            if rank and updates != self._updates:
                raise CheckpointError(
                    f"{self._files[1 + rank]}: after {_listed(updates)} updates, where {self._files[1].name} is after "
                    f"{_listed(self._updates)}: a save over an older one was cut off: import another tag"
                )
            self._updates = updates

    def _universal(self, shapes: Shapes) -> _Found:
        found: dict[str, dict[str, Maker]] = {value: {} for value in _UNIVERSAL_NAMES}
        for name, shape in shapes.items():
            for value, file_name in _UNIVERSAL_NAMES.items():
                path = self._tag / "zero" / name / f"{file_name}.pt"
                if value != MASTER and not path.is_file():
                    continue
                tree = self._open(path)
                tensor = tree["param"] if isinstance(tree, dict) else tree
                if math.prod(tensor.shape) != math.prod(shape):
                    raise CheckpointError(f"{path}: has shape {list(tensor.shape)}, where {list(shape)} was expected")
                found[value][name] = functools.partial(_reshaped, tensor, shape)
        trained = found.pop(MASTER)
        return trained, {key: makers for key, makers in found.items() if len(makers) == len(shapes)}

    def _beside(self, model: Any) -> dict[str, tuple[Maker, tuple[int, ...]]]:
        """What ZeRO 3 keeps beside the optimizer's partitions: parameters that are not trained, and buffers."""
        found = _whole({name: model["module"][name] for name in model["buffer_names"]})
        if frozen := model["frozen_param_shapes"]:
            others = [folder.rank_model_file(self._tag, rank) for rank in range(1, model["dp_world_size"])]
            ranks = [state["frozen_param_fragments"] for state in (model, *map(self._open, others))]
            for name, size in frozen.items():
                found[name] = functools.partial(_unpadded, [rank[name] for rank in ranks], tuple(size)), tuple(size)
        return found


def _listed(updates: set[int]) -> str:
    return ", ".join(map(str, sorted(updates))) or "no"


def _check_names(names: Iterable[Any]) -> None:
    for name in names:  # a universal checkpoint has a folder of each name
        if not isinstance(name, str) or not name.isprintable() or "/" in name or name in {".", ".."}:
            raise ValueError(f"{name!r} is no name of a parameter")


def _stage_0(model: Any) -> dict[str, Maker]:
    """The fp32 weights behind rounded ones; none where the weights are not rounded, or have none behind them.

    They have no names: each is that of the first parameter left which it rounds to, since optimizers are given
    parameters in the module's order.
    """
    optimizer = model["optimizer"] or {}
    # A fused optimizer has a flat tensor a group, any other a list of tensors a group.
    masters = optimizer.get("fp32_groups_flat") or itertools.chain(*optimizer.get("fp32_groups", []))
    left = {name: tensor for name, tensor in model["module"].items() if name not in model["buffer_names"]}
    found: dict[str, Maker] = {}
    for master in masters:
        start = 0
        while start < math.prod(master.shape):
            fitting = (name for name, low in left.items() if _rounds_to(master, start, low))
            if (name := next(fitting, None)) is None:
                raise ValueError("an fp32 weight rounds to no weight of the module")
            low = left.pop(name)
            found[name] = functools.partial(_part, master, start, low.shape)
            start += math.prod(low.shape)
    return found


def _rounds_to(master: StoredTensor, start: int, low: StoredTensor) -> bool:
    """Whether an unnamed tensor goes on with the weights behind rounded ones."""
    flat = len(master.shape) == 1 and start + math.prod(low.shape) <= master.shape[0]
    if not flat and master.shape != low.shape:
        return False
    return torch.equal(_part(master, start, low.shape).to(low.dtype), low.read())


def _part(master: StoredTensor, start: int, shape: tuple[int, ...]) -> Tensor:
    if master.shape == shape:
        return master.read()
    return master.run(start, math.prod(shape)).view(shape)


def _whole(held: Mapping[str, Any]) -> dict[str, tuple[Maker, tuple[int, ...]]]:
    return {name: (tensor.read, tensor.shape) for name, tensor in held.items() if isinstance(tensor, StoredTensor)}


def _joined(pieces: Pieces, flats: Flats, shapes: Shapes) -> dict[str, Maker]:
    return {name: functools.partial(_join, pieces[name], flats, shape) for name, shape in shapes.items()}


def _joined_moments(pieces: Pieces, adam: Sequence[Mapping[int, Any]], shapes: Shapes) -> dict[str, dict[str, Maker]]:
    if not all(adam) or not all(key in state for rank in adam for state in rank.values() for key in MOMENTS):
        return {}
    return {
        key: _joined(pieces, [{group: state[key] for group, state in rank.items()} for rank in adam], shapes)
        for key in MOMENTS
    }


def _join(pieces: Sequence[_Piece], flats: Flats, shape: tuple[int, ...]) -> Tensor:
    if gaps := [(rank, group) for rank, group, *_ in pieces if group not in flats[rank]]:
        raise ValueError(f"rank {gaps[0][0]} saved nothing of parameter group {gaps[0][1]}")
    runs = [flats[rank][group].run(start, numel) for rank, group, start, numel in pieces]
    return torch.cat(runs).float().view(shape)


def _reshaped(tensor: StoredTensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.read().float().reshape(shape)


def _unpadded(fragments: Sequence[StoredTensor], shape: tuple[int, ...]) -> Tensor:
    return torch.cat([fragment.read() for fragment in fragments])[: math.prod(shape)].float().view(shape)
