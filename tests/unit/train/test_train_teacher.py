from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vitscale.checkpoint import ExportOptions, Origin, PortableModel, write_portable
from vitscale.config import DataSection
from vitscale.config.loss import DistillSection
from vitscale.errors import ConfigError
from vitscale.model import Preprocessing, VisionTransformer, resolve_variant
from vitscale.train.teacher import Teacher, read_teacher

LABELS = ("n00000001", "n00000002", "n00000003")
PIXELS = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
DATA = DataSection.model_validate({"train": {"path": "data", "split": "train"}})


def portable(**changes) -> PortableModel:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": len(LABELS)}
    variant = resolve_variant("vit_tiny_patch16_224", **{**small, **changes})
    torch.manual_seed(0)
    weights = VisionTransformer(variant, weight_init="trunc_normal").state_dict()
    weights["head.weight"] = torch.randn_like(weights["head.weight"])
    return PortableModel("vit_tiny_patch16_224", variant, weights, PIXELS, Origin("run", "a" * 64), LABELS)


@pytest.mark.parametrize("side", [32, 24, 48])
def test_the_teacher_sees_the_students_images_in_its_own_size_and_normalisation(side):
    found = portable()
    raw = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    students, own = (
        (raw - torch.tensor(pixels.mean).view(3, 1, 1)) / torch.tensor(pixels.std).view(3, 1, 1)
        for pixels in (DATA, PIXELS)
    )
    if side != 32:
        own = F.interpolate(own, (32, 32), mode="bilinear", antialias=True)
    teacher = Teacher(found, DATA, "fp32", torch.device("cpu"))
    logits = teacher.logits(students)
    torch.testing.assert_close(logits, found.build()(own).detach(), rtol=0, atol=1e-5)
    assert not logits.requires_grad
    in_bf16 = Teacher(found, DATA, "bf16", torch.device("cpu")).logits(students)
    assert in_bf16.dtype == torch.bfloat16
    torch.testing.assert_close(in_bf16.float(), logits, rtol=0, atol=0.1)


def write(model: PortableModel, folder: Path) -> DistillSection:
    write_portable(model, folder, ExportOptions("vitscale"))
    return DistillSection(teacher=folder)


def test_a_teacher_is_read_from_a_folder_and_checked_against_the_classes(tmp_path):
    section = write(portable(), tmp_path / "teacher")
    found = read_teacher(section, LABELS)
    assert found.variant == portable().variant
    assert found.weights["head.weight"].equal(portable().weights["head.weight"])
    with pytest.raises(ConfigError, match=rf"^loss.distill.teacher {tmp_path}/teacher has 3 classes, .* data 2: "):
        read_teacher(section, LABELS[:2])
    with pytest.raises(ConfigError, match=r"^loss.distill.teacher .* but other ones, or in another order"):
        read_teacher(section, LABELS[::-1])
    grey = write(portable(in_chans=1), tmp_path / "grey")
    with pytest.raises(ConfigError, match=r"^loss.distill.teacher .* reads 1 channels, shards hold RGB images"):
        read_teacher(grey, LABELS)


@pytest.mark.parametrize(("labels", "told"), [((), False), (("cat", "dog", "cow"), True)])
def test_classes_that_cannot_be_compared_are_taken_in_order(labels, told, tmp_path, caplog):
    section = write(replace(portable(), labels=labels), tmp_path / "teacher")
    with caplog.at_level("WARNING"):
        assert read_teacher(section, LABELS).labels == labels
    assert ("names its classes otherwise" in caplog.text) == told
