"""Where each ZeRO stage keeps a parameter's fp32 weights and moments: the one adapter to DeepSpeed's insides.

DeepSpeed has no public way to the local state at every stage, so this module reads attributes that its
releases may rename. tests/distributed/test_engine_state.py holds it to the installed version.

    stage 0     the parameter itself; replicated (fp32 only: see `render_deepspeed_config`)
    stage 1, 2  one flat fp32 tensor a parameter group and rank; a parameter may straddle two ranks
    stage 3     one flat fp32 tensor a sub-group and rank; every parameter is cut into world_size equal
                pieces, the last one padded
"""

from typing import Any

from deepspeed import comm
from torch import Tensor

from vitscale.engine.adam_state import ensure_adam_state
from vitscale.engine.protocol import MASTER, Fragment


def zero_fragments(engine: Any) -> list[Fragment]:
    """The fragments that this rank holds of a DeepSpeed engine's state, in parameter order."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _replicated(engine)
    return _stage_3(engine) if stage == 3 else _stages_1_and_2(engine)


def refresh_weights(engine: Any) -> None:
    """Copy the fp32 weights into the weights that forward uses, gathered from all ranks. Collective."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer.checkpoint_event_prologue()  # partitions whatever is still gathered
        for low, high in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            low.data.copy_(high.data)
        optimizer.checkpoint_event_epilogue()  # gathers the small parameters that stay whole


def _named_parameters(engine: Any) -> list[tuple[str, Any]]:  # DeepSpeed hangs attributes on the parameters
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _views(engine: Any, flat: Tensor, start: int, numel: int) -> dict[str, Tensor]:
    state = {MASTER: flat.detach(), **ensure_adam_state(engine.basic_optimizer, flat)}
    return {key: value.view(-1).narrow(0, start, numel) for key, value in state.items()}


def _replicated(engine: Any) -> list[Fragment]:
    rank, world_size = comm.get_rank(), comm.get_world_size()
    return [
        Fragment(name, 0, _views(engine, parameter, 0, parameter.numel()), index % world_size == rank)
        for index, (name, parameter) in enumerate(_named_parameters(engine))
    ]


def _stages_1_and_2(engine: Any) -> list[Fragment]:
    flats = engine.optimizer.single_partition_of_fp32_groups
    found = []
    for name, parameter in _named_parameters(engine):
        piece = parameter._hp_mapping
        if piece is None:  # all of it lies on other ranks
            continue
        address = piece.get_hp_fragment_address()
        views = _views(engine, flats[piece.param_group_index], address.start, address.numel)
        found.append(Fragment(name, piece.lp_fragment_address.start, views, True))
    return found


def _stage_3(engine: Any) -> list[Fragment]:
    optimizer = engine.optimizer
    rank = comm.get_rank()
    found = []
    for name, parameter in _named_parameters(engine):
        sub_group, start, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        offset = rank * padded
        numel = min(padded, parameter.ds_numel - offset)
        if numel > 0:
            views = _views(engine, optimizer.fp32_partitioned_groups_flat[sub_group], start, numel)
            found.append(Fragment(name, offset, views, True))
    return found
