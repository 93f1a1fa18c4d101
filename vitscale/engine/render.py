"""The DeepSpeed config, rendered from ours by one pure function."""

import sys
from typing import Any

from vitscale.config import BatchSplit, EngineSection, merge_trees
from vitscale.engine.checks import check_engine
from vitscale.engine.precision import Precision


def render_deepspeed_config(
    engine: EngineSection, split: BatchSplit, clip_norm: float | None, precision: Precision
) -> dict[str, Any]:
    """DeepSpeed's JSON with every value that matters written out, since its defaults move between releases.

    `engine.deepspeed_overrides` is merged over the result, key by key. What a value costs and why it was chosen is
    told in docs/parallelism.md; what cannot be is refused by `check_engine`.
    """
    check_engine(engine, world_size=split.world_size, precision=precision)
    rendered = {
        "train_batch_size": split.places,
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": split.grad_accum,
        # DeepSpeed clips at 1.0 when the key is missing; 0 is its word for never.
        "gradient_clipping": clip_norm or 0.0,
        "bf16": {
            "enabled": precision == "bf16",
            # Scans every gradient and waits for the device; the trainer watches the loss and the norm.
            "check_grad_overflow": False,
            # Without ZeRO only, where bf16 is refused.
            "immediate_grad_update": False,
            # The oracle keeps both in fp32, and so do checkpoints.
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {"enabled": False},
        # Gradients travel and add up over micro-steps as backward makes them. An fp32 sum would turn stage 1 in bf16
        # into another optimizer, BF16_Optimizer: 4 bytes a parameter more and one all-reduce at the end.
        "communication_data_type": precision,
        "data_types": {"grad_accum_dtype": precision},
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_optimization": _zero_optimization(engine),
        # Its list knows torch's and DeepSpeed's own classes; ours are tested under ZeRO here.
        "zero_allow_untested_optimizer": True,
        # An offloaded optimizer is ours too, on CPU tensors; True would insist on DeepSpeed's.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        # It waits for the device at every forward and step, and logs what is logged already.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    return merge_trees(rendered, engine.deepspeed_overrides)


def _zero_optimization(engine: EngineSection) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": engine.bucket_elements,
        # Of use only where torch has no all_gather_into_tensor: a parameter group is gathered at once. Must be even.
        "allgather_bucket_size": engine.bucket_elements + engine.bucket_elements % 2,
        "reduce_scatter": True,
        # Buckets of several owners are all-reduced whole: twice the bytes of one reduce an owner, fewer messages.
        "use_multi_rank_bucket_allreduce": True,
        "allgather_partitions": True,
        # Releases before 0.19.8 skipped the all-reduce on CPUs without it (DeepSpeed #8382).
        "contiguous_gradients": True,
        "overlap_comm": engine.overlap_comm,
        "round_robin_gradients": False,
        "parameter_alignment": False,
        "ignore_unused_parameters": True,
        "zero_hpz_partition_size": engine.hpz,
        "zero_quantized_weights": engine.qwz,
        "zero_quantized_nontrainable_weights": False,
        # Gradients in 4 bits change what is trained.
        "zero_quantized_gradients": False,
        "offload_optimizer": _offload(engine, engine.offload != "none") | {"ratio": 1.0, "super_offload": False},
    }
    if engine.zero_stage in (1, 2):
        zero["compute_grad_norm"] = True
    if engine.zero_stage == 3:
        zero |= {
            "offload_param": _offload(engine, engine.offload == "optimizer_and_params"),
            # In blocks of H, g or G (20, 25 and 38 million elements) the default bucket is two ahead in H and g,
            # one in G, and five to ten kept, which serve the start of backward; 1e9 would keep all of H/14.
            "stage3_prefetch_bucket_size": engine.bucket_elements // 2,
            "stage3_max_live_parameters": 2 * engine.bucket_elements,
            "stage3_max_reuse_distance": 2 * engine.bucket_elements,
            # Small parameters come with their block's one gather. Kept whole, as DeepSpeed would below 1e5, each is
            # gathered by itself after every step: 8 a block, so 384 tiny gathers in G.
            "stage3_param_persistence_threshold": 0,
            "stage3_model_persistence_threshold": sys.maxsize,
            # Blocks are made units by name (leaf modules), not by their number of children.
            "stage3_module_granularity_threshold": 0,
            "stage3_use_all_reduce_for_fetch_params": False,
            "stage3_allgather_sequential": False,
            # Elements a rank updates at a time: G/14 is one piece from two ranks on.
            "sub_group_size": 1_000_000_000,
            "memory_efficient_linear": True,
        }
    return zero


def _offload(engine: EngineSection, used: bool) -> dict[str, Any]:
    return {"device": "cpu" if used else "none", "pin_memory": engine.offload_pin_memory}
