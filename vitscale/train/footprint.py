"""Memory of one rank as the planning formulas give it for a config: what `vitscale plan` and the GPU benchmark ask."""

from vitscale.config import BatchSplit, Config, EngineSection
from vitscale.engine import Precision, render_deepspeed_config
from vitscale.model import Recompute, VisionTransformer
from vitscale.optim import parameter_groups
from vitscale.optim.factoring import attention_shapes
from vitscale.planning import (
    ActivationRule,
    StateBytes,
    UpdateBytes,
    checkpoint_bytes,
    state_bytes,
    step_bytes,
    update_bytes,
)

DEFAULT_BUDGET = 0.5


def planned_state(
    config: Config, engine: EngineSection, model: VisionTransformer, split: BatchSplit, precision: Precision
) -> StateBytes:
    """Weights, gradients, optimizer state and buffers of a rank; the model may lie on the meta device.

    Raises:
        ConfigError: DeepSpeed cannot run `engine`.
    """
    optim = config.optim
    groups = parameter_groups(model, optim.weight_decay, optim.head_weight_decay, optim.layer_decay)
    torch_engine = engine.kind == "torch"
    rendered = {} if torch_engine else render_deepspeed_config(engine, split, optim.clip_norm, precision)
    return state_bytes(
        [[parameter.numel() for parameter in group["params"]] for group in groups],
        world_size=split.world_size,
        zero={"stage": 0} if torch_engine else rendered["zero_optimization"],
        precision="fp32" if torch_engine else precision,  # autocast leaves weights and gradients in fp32
        update=_planned_update(config, model),
        accumulates=split.grad_accum > 1,
        average=config.average is not None,
    )


def planned_checkpoint_bytes(config: Config, model: VisionTransformer) -> int:
    """Bytes of one tag, whatever the engine; the model may lie on the meta device."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return checkpoint_bytes(parameters, _planned_update(config, model), config.average is not None)


def _planned_update(config: Config, model: VisionTransformer) -> UpdateBytes:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()} | attention_shapes(model)
    return update_bytes(config.optim, shapes.values())


def activation_rule(config: Config, recompute: Recompute, precision: Precision) -> ActivationRule:
    """What decides the activations under a recomputation policy; the config's k and budget stand for themselves."""
    engine, model = config.engine, config.model
    return ActivationRule(
        precision=precision,
        recompute=recompute,
        every=engine.checkpoint_every or 2,
        budget=(engine.activation_budget or DEFAULT_BUDGET) if recompute == "budget" else 1.0,
        drop_rate=model.drop_rate,
        drop_path_rate=model.drop_path_rate,
        drop_path_subset=model.drop_path_mode == "subset",
    )


def planned_step_bytes(config: Config, model: VisionTransformer, split: BatchSplit, precision: Precision) -> int:
    """The most that tensors take on a rank within a step of the config as it stands."""
    rule = activation_rule(config, config.engine.activation_checkpointing, precision)
    state = planned_state(config, config.engine, model, split, precision)
    return step_bytes(model.variant, split.micro_batch, rule, state)
