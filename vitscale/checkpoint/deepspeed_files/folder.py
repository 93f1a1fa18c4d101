"""Where DeepSpeed puts what: tags, and the names of the files in them.

DIR/latest                                                     name of the newest tag; latest_universal alike
    TAG/mp_rank_00_model_states.pt                             ZeRO 0 to 2: weights, names, shapes
        zero_pp_rank_N_mp_rank_00_model_states.pt              ZeRO 3: the same of each rank
        [bf16_]zero_pp_rank_N_mp_rank_00_optim_states.pt       ZeRO 1 to 3: each rank's fp32 weights and moments
        zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt                 a universal checkpoint: each parameter whole
"""

import re
from pathlib import Path

from vitscale.checkpoint.containers import printable
from vitscale.errors import CheckpointError

_POINTERS = ("latest", "latest_universal")
_STATES = "*_states.pt"
_MODEL, _MODEL_3 = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"
_OPTIM = "{}zero_pp_rank_{}_mp_rank_00_optim_states.pt"
_PREFIXES = ("", "bf16_")
_FOREIGN_PARTS = {
    "tensor parallelism": re.compile(r"mp_rank_(?!00_)\d+"),
    "pipeline parallelism": re.compile(r"layer_\d+-"),
    "experts": re.compile(r"expert|expp_rank"),
}


def is_deepspeed(path: Path) -> bool:
    """Whether a folder looks like one that DeepSpeed saves to, or like one of its tags."""
    return path.is_dir() and (bool(_tags(path)) or _is_tag(path) or any((path / name).is_file() for name in _POINTERS))


def locate_tag(path: Path) -> Path:
    """The tag that a folder of DeepSpeed's stands for: itself, the one its `latest` names, or its only one.

    Raises:
        CheckpointError: there is none, `latest` names none, or nothing says which of several it is; or parts of the
            model are spread over ranks in a way that is not read here; or the folder may not be read.
    """
    try:
        if not path.is_dir():
            raise CheckpointError(f"{path}: {'is a file' if path.exists() else 'no such folder'}{_choice(path, [])}")
        tag = path if _is_tag(path) else _pointed(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from None
    for name in sorted(entry.name for entry in tag.glob(_STATES)):
        for what, pattern in _FOREIGN_PARTS.items():
            if pattern.search(name):
                raise CheckpointError(
                    f"{tag}: {printable(name)} is of a model under {what}, which is not read here: only ZeRO's "
                    "partitions are: save the whole model as a state dict, and import that"
                )
    return tag


def model_file(tag: Path) -> tuple[Path, bool]:
    """The file with names and shapes, and whether it is of ZeRO 3.

    Raises:
        CheckpointError: there is none, or one of each kind.
    """
    found = [(path, stage_3) for path, stage_3 in ((tag / _MODEL, False), (rank_model_file(tag, 0), True))
             if path.is_file()]  # fmt: skip
    if not found:
        raise CheckpointError(
            f"{tag}: neither {_MODEL} nor {_MODEL_3.format(0)} is here: the save was cut off, or not all files were "
            f"copied{_others(tag)}"
        )
    if len(found) == 2:
        raise CheckpointError(
            f"{tag}: {found[0][0].name} and {found[1][0].name} are of two saves, at ZeRO 3 and at another stage: "
            "move the files of one away"
        )
    return found[0]


def rank_model_file(tag: Path, rank: int) -> Path:
    """The file of weights that a rank wrote under ZeRO 3."""
    return tag / _MODEL_3.format(rank)


def partition_files(tag: Path, world_size: int) -> list[Path]:
    """The files of fp32 weights and optimizer state, one a rank.

    Raises:
        CheckpointError: one is missing, or there are those of two saves.
    """
    used = [prefix for prefix in _PREFIXES if any(tag.glob(_OPTIM.format(prefix, "*")))]
    if len(used) > 1:
        names = " and ".join(_OPTIM.format(prefix, "N") for prefix in used)
        raise CheckpointError(f"{tag}: {names} are of two saves in different precisions: move the files of one away")
    prefix = used[0] if used else ""
    paths = []
    for rank in range(world_size):
        paths.append(tag / _OPTIM.format(prefix, rank))
        if not paths[-1].is_file():
            here = len(list(tag.glob(_OPTIM.format(prefix, "*"))))
            raise CheckpointError(
                f"{tag}: {paths[-1].name} is missing: {world_size} ranks wrote this checkpoint and the files of {here} "
                f"are here: copy what is missing{_others(tag)}"
            )
    return paths


def _pointed(path: Path) -> Path:
    tags = _tags(path)
    for pointer in _POINTERS:
        if (path / pointer).is_file():
            name = (path / pointer).read_text(encoding="utf-8", errors="replace").strip()
            if name not in tags:
                said = f"{name!r}, which is no tag with files in it" if name else "nothing"
                raise CheckpointError(f"{path / pointer}: names {said}{_choice(path, tags)}")
            return path / name
    if len(tags) != 1:
        what = "nothing says which tag is meant" if tags else "no `latest` and no tag of DeepSpeed's here"
        raise CheckpointError(f"{path}: {what}{_choice(path, tags)}")
    return path / tags[0]


def _choice(path: Path, tags: list[str]) -> str:
    if not tags:
        return ": give the folder that DeepSpeed's save_checkpoint was given, or one of its tags"
    return f": give one of its tags itself, such as {path / tags[-1]} (there are {printable(', '.join(tags))})"


def _others(tag: Path) -> str:
    others = [name for name in _tags(tag.parent) if name != tag.name]
    return f", or import another tag ({printable(', '.join(others))})" if others else ", from where it was saved"


def _is_tag(path: Path) -> bool:
    return any(path.glob(_STATES))


def _tags(path: Path) -> list[str]:
    """Names of the tags in a folder, the oldest first as far as their names tell."""
    found = [entry.name for entry in path.iterdir() if entry.is_dir() and _is_tag(entry)]
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
