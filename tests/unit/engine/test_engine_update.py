"""The optimizer's step behind its guard, called as often as DeepSpeed does."""

import pytest
import torch

from vitscale.engine.update import GuardedUpdate, set_learning_rate
from vitscale.optim import whole_parameters


class Guarded:
    """Two parameters in groups of their own, stepped one after the other like ZeRO's partitions."""

    def __init__(self, norm):
        self.parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        groups = [{"params": [p]} for p in self.parameters]
        self.optimizer = torch.optim.SGD(groups, lr=0.5)
        self.update = GuardedUpdate(
            self.optimizer,
            whole_parameters([("norm.weight", self.parameters[0]), ("head.weight", self.parameters[1])]),
            grad_norm=lambda: torch.tensor(norm),
            clip_norm=None,
            group=None,
            device=torch.device("cpu"),
            average=None,
        )

    def step(self, accept=None, measure=False, reached=True):
        for parameter in self.parameters:
            parameter.grad = torch.ones(3)
        self.update.begin(accept, measure)
        groups = self.optimizer.param_groups
        for group in groups if reached else ():
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        self.optimizer.param_groups = groups
        return self.update.end()

    @property
    def weights(self):
        return [float(p[0].detach()) for p in self.parameters]


def test_the_guard_is_asked_once_a_step_and_told_the_norm():
    guarded, asked = Guarded(2.0), []
    assert guarded.step(lambda norm: not asked.append(norm)) == (False, None)
    assert asked == [2.0]
    assert guarded.weights == [0.5, 0.5]
    assert guarded.update.count == 1


def test_a_refused_step_reaches_no_group():
    guarded = Guarded(2.0)
    assert guarded.step(lambda norm: False) == (True, None)
    assert guarded.weights == [1.0, 1.0]
    assert guarded.update.count == 0


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_put_to_the_guard_and_left_out_whatever_it_says(norm):
    guarded, asked = Guarded(norm), []
    assert guarded.step(lambda norm: not asked.append(norm))[0]
    assert len(asked) == 1
    assert guarded.weights == [1.0, 1.0]


def test_a_step_that_deepspeed_left_out_itself_is_told_to_the_guard():
    guarded, asked = Guarded(float("inf")), []
    assert guarded.step(lambda norm: not asked.append(norm), measure=True, reached=False) == (True, None)
    assert asked == [float("inf")]
    assert guarded.step(reached=False) == (True, None)
    assert guarded.update.count == 0


def test_a_measured_step_gives_the_norms_of_its_parts_alone():
    guarded = Guarded(6.0**0.5)
    for weight in (0.5, 0.0):  # nothing of the first is left in the second
        _, norms = guarded.step(measure=True)
        expected = {"grad_norm": 3.0**0.5, "update_norm": 0.75**0.5, "weight_norm": (3 * weight**2) ** 0.5}
        wanted = {f"{kind}/{part}": value for kind, value in expected.items() for part in ("norm", "head")}
        assert {key: float(value) for key, value in norms.items()} == pytest.approx(wanted)


def test_a_groups_rate_is_the_rate_times_its_scale():
    optimizer = torch.optim.SGD(
        [
            {"params": [torch.nn.Parameter(torch.ones(1))]},
            {"params": [torch.nn.Parameter(torch.ones(1))], "lr_scale": 0.25},
        ],
        lr=1.0,
    )
    for _ in range(2):  # not times the scale again
        set_learning_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.025]
