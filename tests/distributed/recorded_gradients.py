"""Recorded gradients fed through real engines: a model whose loss has exactly the gradients that it is given."""

import functools
import math
from pathlib import Path

import torch
from torch import nn

from vitscale.checkpoint import Manifest, rank_file_name, read_fragments, write_fragments
from vitscale.config import BatchSplit, EngineSection, OptimSection
from vitscale.engine import DeepSpeedEngine, TorchEngine, render_deepspeed_config
from vitscale.optim import build_optimizer

OPTIMIZERS = {
    "adamw": {"kind": "adamw", "weight_decay": 0.1, "head_weight_decay": 0.5, "layer_decay": 0.8},
    "sgd": {"kind": "sgd", "weight_decay": 0.01},
    "lamb": {"kind": "lamb", "weight_decay": 0.1, "head_weight_decay": 0.5},
    "adafactor": {"kind": "adafactor", "weight_decay": 0.03, "head_weight_decay": 3.0},
    "adafactor bf16": {"kind": "adafactor", "weight_decay": 0.03, "momentum_dtype": "bf16"},
}
"""Settings of `OptimSection` by case."""


class Held(nn.Module):
    """A weight and a bias, and sum(gradient * parameter)."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(shape[0]))

    def forward(self, weight_grad, bias_grad):
        return (self.weight * weight_grad).sum() + (self.bias * bias_grad).sum()


class HeldScalar(nn.Module):
    """One number; DeepSpeed has no way with tensors of no dimension."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1))

    def forward(self, grad):
        return (self.weight * grad).sum()


class HeldAttention(nn.Module):
    """Weights as of two heads of 33, which are factored by head."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv = Held(3 * 2 * 33, 37)
        self.proj = Held(37, 2 * 33)

    def forward(self, *grads):
        return self.qkv(*grads[:2]) + self.proj(*grads[2:])


class RecordedGradients(nn.Module):
    """Parameters of odd shapes, with ViT's names; `forward` takes their gradients, flat [1, numel], as the images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 37))
        self.pos_embed = nn.Parameter(torch.randn(1, 50, 37))
        self.frozen = nn.Parameter(torch.randn(3, 5), requires_grad=False)
        self.patch_embed = Held(37, 3, 34, 2)
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": HeldAttention(), "norm1": Held(41, 31)})])
        self.norm = HeldScalar()
        self.head = Held(5, 37)
        self.shapes = {name: list(p.shape) for name, p in self.named_parameters() if p.requires_grad}

    def no_weight_decay(self):
        return {"cls_token", "pos_embed"}

    def split(self, images):
        """The gradients by parameter name."""
        pieces = images[0].split([math.prod(shape) for shape in self.shapes.values()])
        return {key: piece.view(shape) for (key, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def forward(self, images):
        grads = self.split(images)

        def of(prefix):
            return [grad for key, grad in grads.items() if key.startswith(prefix)]

        own = sum((getattr(self, key) * grads[key]).sum() for key in ("cls_token", "pos_embed"))
        block = self.blocks[0]["attn"](*of("blocks.0.attn.")) + self.blocks[0]["norm1"](*of("blocks.0.norm1."))
        ends = self.patch_embed(*of("patch_embed.")) + self.norm(*of("norm.")) + self.head(*of("head."))
        return own + block + ends


def recorded_gradient(step):
    """Of one step, for all parameters: [1, numel]. 3 times 8 bits: the mean over 1, 2 or 3 equal ranks is exact."""
    generator = torch.Generator().manual_seed(step)
    gradient = torch.randn(1, len(_scales()), generator=generator) * _scales()
    return 3 * gradient.bfloat16().float() / 512


def recorded_rate(step):
    return 0.01 / (1 + step / 50)


@functools.cache
def _scales():
    """Of the gradient of each element, far apart."""
    numel = sum(math.prod(shape) for shape in RecordedGradients().shapes.values())
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000)).exp()


def build_recorded(case, stage, rank, world_size):
    """The engine at a ZeRO stage, or the plain torch engine where the stage is None."""
    model = RecordedGradients()
    optimizer = build_optimizer(model, OptimSection(peak_lr=1.0, **OPTIMIZERS[case]))
    if stage is None:
        return TorchEngine(
            model, optimizer, _loss, grad_accum=1, clip_norm=None, precision="fp32",
            device=torch.device("cpu"), rank=rank, world_size=world_size,
        )  # fmt: skip
    section = EngineSection(
        zero_stage=stage,
        precision="fp32",
        bucket_elements=10_000,
        # Several sub-groups a group at stage 3, each stepped by itself.
        deepspeed_overrides={"zero_optimization": {"sub_group_size": 3000}},
    )
    split = BatchSplit(world_size, 1, 1, world_size)
    return DeepSpeedEngine(
        model, optimizer, _loss, deepspeed_config=render_deepspeed_config(section, split, None, "fp32")
    )


def feed(engine, steps):
    for step in steps:
        engine.train_step([(recorded_gradient(step), torch.zeros(1))], recorded_rate(step))


def state_of(engine):
    """Copies of the fragments that this rank writes: [(name, offset, {key: value})]."""
    return [
        (f.name, f.offset, {key: value.clone() for key, value in f.values.items()})
        for f in engine.fragments()
        if f.saved_here
    ]


def assemble(ranks):
    """{(name, key): the whole value} from what all ranks hold; no element is missing or held twice."""
    runs = {}
    for fragments in ranks:
        for name, offset, values in fragments:
            for key, value in values.items():
                runs.setdefault((name, key), []).append((offset, value))
    whole = {}
    for what, pieces in runs.items():
        pieces.sort(key=lambda piece: piece[0])
        ends = [0]
        for offset, value in pieces:
            assert offset == ends[-1], f"{what}: a gap or an overlap at {offset}"
            ends.append(offset + value.numel())
        whole[what] = torch.cat([value for _, value in pieces])
    return whole


def save_recorded(engine, folder, rank):
    folder.mkdir(parents=True, exist_ok=True)
    write_fragments(engine.fragments(), folder / rank_file_name(rank))


def load_recorded(engine, folder: Path, saved_by, steps):
    manifest = Manifest(
        step=steps, generation=1, world_size=saved_by, optimizer_steps=steps, cursor={"position": 0}, config={},
        model={}, labels=[], shapes=RecordedGradients().shapes, metrics={}, versions={}, saved_at="", files=[],
    )  # fmt: skip
    read_fragments(engine.fragments(), folder, manifest)
    engine.state_loaded(steps)


def _loss(output, _targets):
    return output
