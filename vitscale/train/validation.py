"""Validation during a run: accuracy of the weights and of their average, on images of the model's own size."""

import contextlib
from collections.abc import Iterator

from vitscale.data.loader import EvalLoader
from vitscale.engine import TrainEngine
from vitscale.evaluation import measure_accuracy
from vitscale.model import VisionTransformer
from vitscale.ranks.groups import Ranks
from vitscale.telemetry import tags
from vitscale.train.build import Blueprint

_WEIGHTS = (tags.VAL_LOSS, tags.VAL_TOP1, tags.VAL_TOP5)
_AVERAGE = (tags.VAL_AVERAGE_LOSS, tags.VAL_AVERAGE_TOP1, tags.VAL_AVERAGE_TOP5)


class Validation:
    """Measures one engine on the validation split. Its methods are collective."""

    def __init__(self, blueprint: Blueprint, engine: TrainEngine, ranks: Ranks) -> None:
        """Plan the batches; nothing is read yet."""
        self._blueprint = blueprint
        self._engine = engine
        self._ranks = ranks
        self.loader = open_eval_loader(blueprint, ranks)
        """This rank's share of the split; None where the config names none."""

    def metrics(self) -> dict[str, float]:
        """Loss and accuracy by tag; none without a validation split."""
        if self.loader is None:
            return {}
        with self.own_input_size():
            found = self._measure(self.loader, _WEIGHTS)
            if self._blueprint.config.average is not None:
                with self._engine.averaged():
                    found |= self._measure(self.loader, _AVERAGE)
        return found

    @contextlib.contextmanager
    def own_input_size(self) -> Iterator[None]:
        """Have the model take images of the size that it is built for, whatever size it trains on."""
        model = self._engine.module
        assert isinstance(model, VisionTransformer)
        trained_px = model.input_variant.image_px
        model.set_input_size(None)
        try:
            yield
        finally:
            model.set_input_size(trained_px)

    def _measure(self, loader: EvalLoader, names: tuple[str, str, str]) -> dict[str, float]:
        data = self._blueprint.config.data
        found = measure_accuracy(self._engine.predict, loader, mean=data.mean, std=data.std, ranks=self._ranks)
        return dict(zip(names, (found.loss, found.top1, found.top5), strict=True))


def open_eval_loader(blueprint: Blueprint, ranks: Ranks) -> EvalLoader | None:
    """This rank's share of the validation split; None where the config names none."""
    if blueprint.val_index is None:
        return None
    return EvalLoader(
        blueprint.val_index,
        blueprint.config.data,
        img_size=blueprint.variant.image_px[0],
        micro_batch=blueprint.config.eval.micro_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
