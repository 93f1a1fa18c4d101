"""Where each ZeRO stage keeps a parameter's fp32 weights and state: the one adapter to DeepSpeed's insides.

DeepSpeed has no public way to the local state at every stage, so this module reads attributes that its
releases may rename. tests/distributed/test_distributed_engine.py holds it to the installed version.

    stage 0     the parameter itself; replicated (fp32 only: see `render_deepspeed_config`)
    stage 1, 2  one flat fp32 tensor a parameter group and rank; a parameter may straddle two ranks
    stage 3     one flat fp32 tensor a sub-group and rank; every parameter is cut into world_size equal
                pieces, the last one padded
"""

from collections.abc import Sequence
from typing import Any

from deepspeed import comm

from vitscale.engine.optimizer_state import FlatValues, fragments_of
from vitscale.engine.protocol import Fragment
from vitscale.optim import Flat, Segment, SegmentedOptimizer, whole_parameters


def bind_optimizer(engine: Any) -> list[Flat]:
    """The flat tensors that the base optimizer updates, told to it where its update needs whole parameters."""
    flats = zero_flats(engine)
    if isinstance(engine.basic_optimizer, SegmentedOptimizer):
        partitioned = engine.zero_optimization_stage() > 0
        group = engine.optimizer.dp_process_group if partitioned else None
        engine.basic_optimizer.bind(flats, group, engine.device)
    return flats


def zero_flats(engine: Any) -> list[Flat]:
    """The flat fp32 tensors of this rank, in DeepSpeed's order: one a parameter group, sub-group or parameter."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return whole_parameters(engine.module.named_parameters())
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return _stage_3(engine.optimizer, names) if stage == 3 else _stages_1_and_2(engine.optimizer, names)


def zero_fragments(engine: Any, flats: Sequence[Flat], further: FlatValues | None = None) -> list[Fragment]:
    """The fragments that this rank holds of a DeepSpeed engine's state."""
    return fragments_of(
        flats,
        engine.basic_optimizer,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
        replicated=engine.zero_optimization_stage() == 0,
        further=further,
    )


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


def _stages_1_and_2(optimizer: Any, names: dict[Any, str]) -> list[Flat]:
    def segment(parameter: Any) -> Segment:
        piece, shape = parameter._hp_mapping, tuple(parameter.shape)
        if piece is None:  # all of it lies on other ranks
            return Segment(names[parameter], shape, 0, 0, 0)
        address = piece.get_hp_fragment_address()
        return Segment(names[parameter], shape, piece.lp_fragment_address.start, address.start, address.numel)

    groups = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
    return [Flat(flat, tuple(map(segment, group))) for flat, group in groups]


def _stage_3(optimizer: Any, names: dict[Any, str]) -> list[Flat]:
    rank = comm.get_rank(optimizer.dp_process_group)

    def segment(parameter: Any) -> Segment:
        _, start, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        offset = rank * padded
        numel = max(0, min(padded, parameter.ds_numel - offset))
        return Segment(names[parameter], tuple(parameter.ds_shape), offset if numel else 0, start, numel)

    groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    return [Flat(flat, tuple(map(segment, group))) for flat, group in groups]
