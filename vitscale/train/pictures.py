"""Pictures of a run: predictions on validation images, where the model looks, its position embedding."""

import contextlib
import logging
import math
from collections.abc import Iterator
from contextlib import closing

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vitscale.data.augment import normalise
from vitscale.data.labels import class_name
from vitscale.data.loader import EvalLoader
from vitscale.engine import TrainEngine
from vitscale.model import VisionTransformer
from vitscale.ranks.groups import Ranks
from vitscale.telemetry import Prediction, draw_attention, draw_predictions, draw_similarity, tags
from vitscale.train.build import Blueprint
from vitscale.train.together import on_main

log = logging.getLogger(__name__)

_ATTENTION_ROWS = 8


class Recording:
    """What a forward pass let be seen of a model's last attention and of its position embedding."""

    def __init__(self, model: VisionTransformer) -> None:
        """Nothing is seen yet."""
        self._model = model
        self._seen: dict[str, Tensor] = {}

    def attention(self) -> Tensor:
        """Attention to the patches, fp32 [B, H, rows, columns], of the newest forward pass.

        With a class token it is the last block's, from that token; with attention pooling the probe's; with mean
        pooling the last block's, averaged over all patches that look. Other tokens take what is missing to a
        sum of 1.
        """
        variant = self._model.input_variant
        query, key = self._seen["query"], self._seen["key"]
        if variant.pool == "token":
            query = query[:, :, :1]
        elif variant.pool != "map":
            query = query[:, :, variant.prefix_tokens :]
        weights = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(dim=-1).mean(dim=2)
        rows, columns = variant.grid
        return weights[..., key.shape[2] - variant.patches :].reshape(*weights.shape[:2], rows, columns)

    def position_embedding(self) -> Tensor:
        """The stored embedding of the patches, fp32 [rows, columns, D]."""
        variant = self._model.variant
        rows, columns = variant.grid
        return self._seen["pos_embed"][0, variant.prefix_tokens :].reshape(rows, columns, -1)

    def watch(self) -> list[RemovableHandle]:
        """Look on from now until the handles are removed."""
        model = self._model
        # Under ZeRO stage 3 it is whole only while the model's forward runs.
        handles = [model.patch_embed.register_forward_pre_hook(lambda *_: self._keep("pos_embed", model.pos_embed))]
        pool = model.attn_pool
        if pool is None:
            last = model.blocks[-1].get_submodule("attn")
            handles += [
                last.get_submodule(module).register_forward_hook(
                    lambda _m, _i, found, name=name: self._keep(name, found)
                )
                for name, module in (("query", "q_norm"), ("key", "k_norm"))
            ]
        else:
            heads = pool.num_heads
            handles += [
                pool.q.register_forward_hook(lambda _m, _i, q: self._keep("query", _by_head(q, heads))),
                pool.kv.register_forward_hook(
                    lambda _m, _i, kv: self._keep("key", _by_head(kv.chunk(2, -1)[0], heads))
                ),
            ]
        return handles

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._seen[name] = tensor.detach().float().clone()


@contextlib.contextmanager
def recorded(model: VisionTransformer) -> Iterator[Recording]:
    """Record every forward pass inside. Compiled blocks run eagerly there, so nothing is compiled anew."""
    recording = Recording(model)
    handles = recording.watch()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield recording
    finally:
        for handle in handles:
            handle.remove()


def attention_maps(model: VisionTransformer, images: Tensor) -> Tensor:
    """See `Recording.attention`: normalised images [B, C, height, width] -> [B, H, rows, columns]."""
    training = model.training
    model.eval()
    try:
        with recorded(model) as recording, torch.no_grad():
            model(images)
        return recording.attention()
    finally:
        model.train(training)


class Pictures:
    """Draws the same validation images whenever it is asked to. Its methods are collective."""

    def __init__(self, blueprint: Blueprint, ranks: Ranks, eval_loader: EvalLoader | None) -> None:
        """Plan the pictures; nothing is read yet."""
        self._blueprint = blueprint
        self._ranks = ranks
        self._loader = eval_loader
        self._shown: tuple[Tensor, Tensor] | None = None
        self._count = blueprint.config.log.pictures
        if self._count and eval_loader is None and ranks.is_main:
            log.info("no data.val, so TensorBoard gets no pictures")

    def due(self, step: int, validated: bool) -> bool:
        """Whether pictures are wanted after this step, at which the run was `validated` or not."""
        every = self._blueprint.config.log.pictures_every_steps
        wanted = validated if every is None else step % every == 0
        return wanted and self._count > 0 and self._loader is not None

    def draw(self, engine: TrainEngine) -> dict[str, bytes]:
        """PNG files by tag on rank 0, nothing on the others; the model takes images of its own size.

        Under ZeRO stage 3 all ranks put the weights together for rank 0's forward pass, with a blank image each.
        """
        if self._shown is None:
            on_main(self._ranks, self._read)
        if self._shown is None:
            blank = torch.zeros(1, 3, *self._blueprint.variant.image_px, dtype=torch.uint8)
            self._shown = blank, torch.zeros(1, dtype=torch.int64)
        images, labels = self._shown
        data = self._blueprint.config.data
        model = engine.module
        assert isinstance(model, VisionTransformer)
        with recorded(model) as recording:
            logits = engine.predict(normalise(images.to(self._ranks.device), data.mean, data.std))
        if not self._ranks.is_main:
            return {}
        attention = recording.attention()
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        return {
            tags.PICTURE_PREDICTIONS: draw_predictions(pixels, self._predictions(logits.cpu(), labels)),
            tags.PICTURE_ATTENTION: draw_attention(pixels[:_ATTENTION_ROWS], attention[:_ATTENTION_ROWS].cpu().numpy()),
            tags.PICTURE_POS_EMBED: draw_similarity(recording.position_embedding().cpu().numpy()),
        }

    def _predictions(self, logits: Tensor, labels: Tensor) -> list[Prediction]:
        classes = self._blueprint.source.classes
        # Under the sigmoid loss every class has a probability of its own.
        sigmoid = self._blueprint.config.loss.kind == "sigmoid"
        probabilities, guesses = (logits.sigmoid() if sigmoid else logits.softmax(dim=1)).max(dim=1)
        rows = zip(labels.tolist(), guesses.tolist(), probabilities.tolist(), strict=True)
        return [Prediction(class_name(classes[t]), class_name(classes[g]), p, t == g) for t, g, p in rows]

    def _read(self) -> None:
        """Keep the first images that can be read; rank 0 only."""
        assert self._loader is not None
        images: list[Tensor] = []
        labels: list[Tensor] = []
        with closing(iter(self._loader)) as batches:
            for batch in batches:
                images.append(batch.images[batch.valid])
                labels.append(batch.labels[batch.valid])
                if sum(map(len, labels)) >= self._count:
                    break
        self._shown = torch.cat(images)[: self._count].contiguous(), torch.cat(labels)[: self._count]


def _by_head(tokens: Tensor, heads: int) -> Tensor:
    """[B, S, D] -> [B, H, S, D / H]."""
    return tokens.view(*tokens.shape[:2], heads, -1).transpose(1, 2)
