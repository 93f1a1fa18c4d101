from typing import Any

import pytest
from pydantic import ValidationError

from vitscale.config.augment import AugmentSection


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rand_augment": {"policy": "timm", "magnitude": 15}}, "magnitude 15.0: timm's levels end at 10"),
        ({"blur": {"sigma": [1.0, 0.5]}}, "give 0 < least <= most <= 2"),
        ({"blur": {"sigma": [0.5, 2.5]}}, "less than or equal to 2"),
        ({"erasing": {"area": [0.0, 0.3]}}, "give 0 < least <= most <= 1"),
        ({"erasing": {"area": [0.4, 0.3]}}, "give 0 < least <= most <= 1"),
        ({"erasing": {"ratio": [3.0, 0.3]}}, "give 0 < least <= most"),
        ({"mix": {}}, "mixup_alpha and cutmix_alpha are both 0"),
        ({"jitter": {"hue": 0.6}}, "less than or equal to 0.5"),
    ],
)
def test_what_has_no_meaning_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AugmentSection.model_validate(section)


def test_all_is_off_when_left_out_and_an_empty_section_takes_its_defaults() -> None:
    off = AugmentSection()
    assert not off.three_augment
    assert (off.rand_augment, off.jitter, off.blur, off.erasing, off.mix, off.repeats) == (None,) * 5 + (1,)
    assert AugmentSection.model_validate({"rand_augment": {}}).rand_augment is not None
