from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from unit.data.test_data_augment_colour import by_pillow, pictures

from vitscale.data.augment.operations import Chosen, Operation, apply_layers

FILL = (10, 200, 90)


def chosen(operations: list[list[Operation]], strengths: list[list[float]]) -> Chosen:
    layers = np.array(operations, dtype=np.int8)
    return Chosen(layers, np.array(strengths, dtype=np.float32), np.full((*layers.shape, 2), 0.5, dtype=np.float32))


def test_every_operation_acts_and_does_what_its_name_says() -> None:
    """All operations in one batch against timm's function of that name; geometric ones differ by 1 at most."""
    named = {
        Operation.AUTO_CONTRAST: ("AutoContrast", 0),
        Operation.EQUALIZE: ("Equalize", 0),
        Operation.INVERT: ("Invert", 0),
        Operation.SOLARIZE: ("Solarize", 77),
        Operation.SOLARIZE_ADD: ("SolarizeAdd", 50),
        Operation.POSTERIZE: ("Posterize", 3),
        Operation.BRIGHTNESS: ("Brightness", 1.5),
        Operation.CONTRAST: ("Contrast", 0.4),
        Operation.SATURATION: ("Color", 1.8),
        Operation.SHARPNESS: ("Sharpness", 1.7),
        Operation.ROTATE: ("Rotate", 20),
        Operation.SHEAR_X: ("ShearX", 0.25),
        Operation.SHEAR_Y: ("ShearY", -0.25),
        Operation.TRANSLATE_X: ("TranslateXRel", 0.25),
        Operation.TRANSLATE_Y: ("TranslateYRel", -0.25),
    }
    image = pictures()[2:3]
    images = image.expand(len(named), -1, -1, -1)
    layers = chosen([[operation] for operation in named], [[strength] for _, strength in named.values()])
    result = apply_layers(images, layers, FILL, nearest=False)
    rest = {"resample": Image.Resampling.BILINEAR, "fillcolor": FILL}
    for i, (name, strength) in enumerate(named.values()):
        arguments = () if name in ("AutoContrast", "Equalize", "Invert") else (strength,)
        theirs = timm_ops.NAME_TO_OP[name]
        expected = by_pillow(image, lambda p, f=theirs, a=arguments: f(p, *a, **rest))
        geometric = name.startswith(("Rotate", "Shear", "Translate"))
        torch.testing.assert_close(result[i : i + 1], expected, rtol=0, atol=int(geometric), msg=name)
        assert (result[i] != image[0]).any(), name


def test_layers_follow_each_other_and_nothing_leaves_an_image_as_it_is() -> None:
    images = pictures()[:3]
    layers = chosen(
        [
            [Operation.INVERT, Operation.SOLARIZE],
            [Operation.SOLARIZE, Operation.INVERT],
            [Operation.NOTHING, Operation.NOTHING],
        ],
        [[0, 64], [64, 0], [9, 9]],
    )
    before = images.clone()
    result = apply_layers(images, layers, FILL, nearest=False)
    inverted = 255 - images[0]
    assert result[0].equal(torch.where(inverted < 64, inverted, 255 - inverted))
    assert result[1].equal(255 - torch.where(images[1] < 64, images[1], 255 - images[1]))
    assert result[2].equal(images[2])
    assert images.equal(before)


@pytest.mark.parametrize("nearest", [False, True])
def test_the_interpolation_and_the_fill_reach_the_map(nearest: bool) -> None:
    image = pictures()[:1]
    result = apply_layers(image, chosen([[Operation.SHEAR_X]], [[0.3]]), FILL, nearest=nearest)
    known = {tuple(pixel) for pixel in image[0].flatten(1).T.tolist()} | {FILL}
    pixels = {tuple(pixel) for pixel in result[0].flatten(1).T.tolist()}
    assert FILL in pixels
    assert (pixels <= known) == nearest


def test_cut_out_and_the_blur_of_3_augment_are_reached() -> None:
    images = pictures()[:1].expand(2, -1, -1, -1)
    layers = chosen([[Operation.CUT_OUT], [Operation.BLUR]], [[0.25], [2.0]])
    result = apply_layers(images, layers, FILL, nearest=True)
    assert (result[0] == torch.tensor(FILL)[:, None, None]).all(0).sum() == 144
    assert result[1].float().std() < images[1].float().std() / 4


def test_operations_are_launched_once_for_all_their_images() -> None:
    images = pictures()
    layers = chosen([[Operation.INVERT]] * 4 + [[Operation.NOTHING]], [[0.0]] * 5)
    with mock.patch("vitscale.data.augment.operations.apply_operation", side_effect=lambda _, i, *a, **k: i) as applied:
        apply_layers(images, layers, FILL, nearest=False)
    assert [len(call.args[1]) for call in applied.call_args_list] == [4]
