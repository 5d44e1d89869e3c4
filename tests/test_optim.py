from __future__ import annotations

import numpy as np
import pytest

from jresnet import optim, recipes


def test_the_rate_falls_at_the_milestone() -> None:
    schedule = optim.step_decay(0.1, (2, 3), 0.1, steps_per_epoch=10)
    rates = [float(schedule(step)) for step in (0, 19, 20, 29, 30, 99)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)


def test_a_milestone_within_an_epoch_and_two_on_one_step() -> None:
    schedule = optim.step_decay(1.0, (1.5, 1.5), 0.5, steps_per_epoch=4)
    np.testing.assert_allclose([float(schedule(step)) for step in (5, 6)], [1.0, 0.25])


def test_no_milestone() -> None:
    assert float(optim.step_decay(0.3, (), 0.1, 5)(1000)) == pytest.approx(0.3)


def test_recipes_milestones() -> None:
    assert recipes.milestones_in_epochs((0.5, 0.75), 200) == (100, 150)
    assert recipes.milestones_in_epochs((0.5, 0.75), 3) == (1.5, 2.25)
    assert recipes.milestones_in_epochs(10, 30) == (10, 20)
    assert recipes.milestones_in_epochs(10, 5) == ()
