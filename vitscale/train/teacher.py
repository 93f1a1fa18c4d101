"""The teacher of a distillation: another model that looks at the same augmented images."""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.checkpoint import PortableModel, read_portable
from vitscale.config import DataSection
from vitscale.config.loss import DistillSection
from vitscale.engine import Precision
from vitscale.errors import ConfigError

log = logging.getLogger(__name__)


class Teacher:
    """A model in evaluation mode that gives logits of the student's images, as it would want to see them."""

    def __init__(self, found: PortableModel, data: DataSection, precision: Precision, device: torch.device) -> None:
        """Build the teacher on the device; every rank holds all of it."""
        model = found.build().eval().requires_grad_(False)
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._model = model.to(device, self._dtype)
        pixels = found.preprocessing
        # From the student's normalised pixels to the teacher's: both are affine maps of the same ones.
        own, students = ((torch.tensor(p.std), torch.tensor(p.mean)) for p in (pixels, data))
        self._scale = (students[0] / own[0]).view(-1, 1, 1).to(device)
        self._offset = ((students[1] - own[1]) / own[0]).view(-1, 1, 1).to(device)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, S, S] of the student, resized to the teacher's own input."""
        own_px = self._model.variant.image_px
        if images.shape[2:] != own_px:
            images = F.interpolate(images, own_px, mode="bilinear", antialias=True)
        logits: Tensor = self._model((images * self._scale + self._offset).to(self._dtype))
        return logits


def read_teacher(section: DistillSection, labels: tuple[str, ...]) -> PortableModel:
    """The teacher, checked against the classes of the training data.

    Raises:
        ConfigError: it has other classes, or another number of them.
        CheckpointError: it cannot be read.
    """
    found = read_portable(section.teacher)
    if found.variant.num_classes != len(labels):
        raise ConfigError(
            f"loss.distill.teacher {section.teacher} has {found.variant.num_classes} classes, the training data "
            f"{len(labels)}: take a teacher of the same classes"
        )
    if found.variant.in_chans != 3:
        raise ConfigError(
            f"loss.distill.teacher {section.teacher} reads {found.variant.in_chans} channels, shards hold RGB images: "
            "take another teacher"
        )
    known = set(found.labels) & set(labels)
    if found.labels and not known:
        log.warning("loss.distill.teacher %s names its classes otherwise: they are taken in order", section.teacher)
    elif found.labels and found.labels != labels:
        raise ConfigError(
            f"loss.distill.teacher {section.teacher} has the training data's number of classes, but other ones, or in "
            "another order: take a teacher of the same label space"
        )
    return found
