"""The moving average of the weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vitscale.config import AverageSection
from vitscale.engine import averaging
from vitscale.engine.averaging import WeightAverage, average_decay
from vitscale.optim import whole_parameters

DECAYS = st.floats(0.01, 0.99999)


@given(decay=DECAYS, count=st.integers(1, 10**7))
def test_warm_up_rises_to_the_decay_and_is_off_on_request(decay, count):
    warm = AverageSection(decay=decay)
    assert average_decay(warm, count) <= average_decay(warm, count + 1) <= decay
    assert average_decay(warm, count) == pytest.approx(min(decay, (1 + count) / (10 + count)))
    assert average_decay(AverageSection(decay=decay, warmup=False), count) == decay


@pytest.mark.parametrize("field", [{"decay": 1.0}, {"decay": 0.0}, {"every_steps": 0}])
def test_an_average_of_nothing_or_of_the_first_weights_alone_is_refused(field):
    with pytest.raises(ValidationError):
        AverageSection(**field)


def weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((40, 3), (7,))]


@pytest.mark.parametrize("every_steps", [1, 3])
def test_it_is_the_average_of_a_float64_loop(every_steps):
    section = AverageSection(decay=0.7, every_steps=every_steps, warmup=False)
    parameters = weights()
    average = WeightAverage(section, whole_parameters((str(i), p) for i, p in enumerate(parameters)))
    expected = [p.detach().double() for p in parameters]
    for update in range(1, 10):
        for p in parameters:
            p.data.mul_(0.9).add_(0.01)
        average.update(update)
        if update % every_steps == 0:
            expected = [0.7 * e + 0.3 * p.detach().double() for e, p in zip(expected, parameters, strict=True)]
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(average.of(p), e.float(), rtol=0, atol=3e-7)


def test_exchanged_puts_the_averages_in_place_and_the_weights_back_even_after_an_error(monkeypatch):
    monkeypatch.setattr(averaging, "_CHUNK", 16)
    parameters = weights()
    average = WeightAverage(AverageSection(), whole_parameters((str(i), p) for i, p in enumerate(parameters)))
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.mul_(2.0)
    after = [p.detach().clone() for p in parameters]
    seen = []

    def fail():
        with average.exchanged():
            seen.extend(p.detach().clone() for p in parameters)
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail()
    assert all(torch.equal(s, b) for s, b in zip(seen, before, strict=True))
    assert all(torch.equal(p, a) for p, a in zip(parameters, after, strict=True))
    assert all(torch.equal(average.of(p), b) for p, b in zip(parameters, before, strict=True))
