"""How the engine section has a model's blocks run: float8, leaf modules of ZeRO-3, recomputation and compilation."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from torch.nn.attention import sdpa_kernel

from vitscale.config import EngineSection
from vitscale.engine.precision import Precision
from vitscale.errors import ConfigError
from vitscale.model import Execution, ResidualBlock, VisionTransformer
from vitscale.model.execution import KERNELS, BlockFunction

# One graph for each combination of input size, drop path (none, mask, each number of kept samples), recomputation and
# training or evaluation. Beyond it a compiled block raises; torch's own limit is 8.
_GRAPHS = 128
# Tensor cores take float8 in tiles of 16; the fused kernel came with Ada (8.9) and Hopper (9.0).
_FP8_MULTIPLE, _FP8_CAPABILITY = 16, (8, 9)


def check_execution(engine: EngineSection, precision: Precision, device: torch.device, head_dim: int) -> None:
    """Refuse what this machine cannot run.

    Raises:
        ConfigError: the attention kernel, or float8, does not work on the device; one line with the mend.
    """
    if engine.attention != "auto":
        _check_attention(engine.attention, precision, device, head_dim)
    if engine.fp8:
        _check_fp8(precision, device)


def prepare_model(
    model: VisionTransformer, engine: EngineSection, *, precision: Precision, device: torch.device
) -> None:
    """Have the blocks of a model run as the engine section says; before DeepSpeed takes it, after it lies on `device`.

    Parameters stay the same objects under the same names, so the optimizer may have been built before.

    Raises:
        ConfigError: as `check_execution`.
    """
    check_execution(engine, precision, device, model.variant.head_dim)
    if engine.fp8:
        convert_to_fp8(model.blocks)
    if engine.kind == "deepspeed" and engine.zero_stage == 3:
        # A block is gathered whole and once a direction, and holds no hooks that would break its graph.
        set_z3_leaf_modules(model, [ResidualBlock])
    execution = Execution(
        recompute=engine.activation_checkpointing,
        every=engine.checkpoint_every or 1,
        attention=engine.attention,
        compiled=_compiler(engine.activation_budget) if engine.compile else None,
    )
    model.set_execution(execution)


def takes_fp8(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose sides float8's kernels can tile."""
    return isinstance(module, nn.Linear) and not (
        module.in_features % _FP8_MULTIPLE or module.out_features % _FP8_MULTIPLE
    )


def convert_to_fp8(blocks: nn.Module) -> None:
    """Multiply the linear layers of `blocks` in float8 (torchao's tensorwise dynamic scales), all that `takes_fp8`."""
    importlib.import_module("torchao.float8").convert_to_float8_training(
        blocks, module_filter_fn=lambda module, _: takes_fp8(module)
    )


def _compiler(budget: float | None) -> Callable[[BlockFunction], BlockFunction]:
    dynamo = importlib.import_module("torch._dynamo")  # takes seconds, for those that compile alone
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _GRAPHS)
    backend: Any = "inductor" if budget is None else partial(_compile_within, budget)
    return partial(torch.compile, backend=backend, fullgraph=True, dynamic=False)


def _compile_within(budget: float, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Inductor with a memory budget, which torch reads from a global while it cuts forward from backward."""
    with torch._functorch.config.patch(activation_memory_budget=budget):
        return importlib.import_module("torch._dynamo").lookup_backend("inductor")(graph, inputs)


def _check_attention(kernel: str, precision: Precision, device: torch.device, head_dim: int) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    query = torch.zeros(1, 1, 2, head_dim, dtype=dtype, device=device, requires_grad=True)
    try:
        with torch.enable_grad(), sdpa_kernel(KERNELS[kernel]):
            F.scaled_dot_product_attention(query, query, query).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ConfigError(
            f"engine.attention={kernel} does not run on {device.type} in {precision} with heads of {head_dim}: "
            "use engine.attention=auto"
        ) from error


def _check_fp8(precision: Precision, device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(
            f"engine.fp8 needs an NVIDIA GPU of compute capability 8.9, not {device.type}: set it to false"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise ConfigError(
            f"engine.fp8 needs compute capability 8.9, the GPU has {'.'.join(map(str, capability))}: set it to false"
        )
    if precision != "bf16":
        raise ConfigError(f"engine.fp8 replaces bf16 products, engine.precision is {precision}: set it to bf16")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("engine.fp8 needs torchao: pip install 'vitscale[fp8]', or set engine.fp8=false")
