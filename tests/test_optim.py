from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jresnet.errors import InputError
from jresnet.training import optim, recipes


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


def rates(kind: str, **options) -> np.ndarray:
    schedule = optim.schedule(kind, 2.0, epochs=4, steps_per_epoch=5, **options)
    return np.array([float(schedule(step)) for step in range(20)])


def test_one_cycle_is_a_triangle() -> None:
    expected = [0.5, 1.0, 1.5, 2.0, *(2 - 2 * np.arange(16) / 16)]
    np.testing.assert_allclose(rates("onecycle", warmup_epochs=0.8), expected, rtol=1e-6)


def test_a_cosine_falls_to_zero() -> None:
    found = rates("cosine", warmup_epochs=0.4)
    np.testing.assert_allclose(found[:3], [1.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(found[2:], 1 + np.cos(np.pi * np.arange(18) / 18), rtol=1e-5, atol=1e-6)


def test_milestones_count_from_the_start_of_the_run_in_spite_of_a_warm_up() -> None:
    found = rates("step", warmup_epochs=1, milestones=(2, 3), gamma=0.5)
    np.testing.assert_allclose(found[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    np.testing.assert_allclose(found[[5, 9, 10, 14, 15, 19]], [2, 2, 1, 1, 0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(rates("step", warmup_epochs=0.2, milestones=(2,))[0], 2.0)


PARAMS = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2,), 3.0)}


def update(kind: str, gradient: float, steps: int = 1, **options) -> dict[str, np.ndarray]:
    """The parameters' change after some steps of one gradient at learning rate 0.1."""
    optimizer = optim.optimizer(kind, 0.1, **options)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        gradients = jax.tree.map(lambda p: jnp.full_like(p, gradient), params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(lambda new, old: np.asarray(new - old), params, PARAMS)


def test_decay_spares_what_is_no_kernel() -> None:
    change = update("sgd", 0.0, weight_decay=0.5, decay_norms=False)
    np.testing.assert_allclose(change["kernel"], -0.15, rtol=1e-6)
    np.testing.assert_array_equal(change["bias"], 0)
    np.testing.assert_allclose(update("sgd", 0.0, weight_decay=0.5)["bias"], -0.15, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: optim.optimizer("adam", 0.1),
            "the optimizer must be sgd or adamw or lamb, got 'adam': optax has others",
        ),
        (lambda: optim.optimizer("sgd", float("nan")), "learning_rate must be a number of at least 0, got nan"),
        (lambda: optim.optimizer("sgd", -0.1), "learning_rate must be"),
        (lambda: optim.optimizer("sgd", 0.1, momentum=1), "momentum must be a number of at least 0 and below 1, got 1"),
        (lambda: optim.optimizer("sgd", 0.1, weight_decay=-1e-4), "weight_decay must be"),
        (lambda: optim.optimizer("sgd", 0.1, clip_norm=float("inf")), "clip_norm must be"),
        (lambda: optim.step_decay(0.1, (1,), 0.1, steps_per_epoch=0), "steps_per_epoch must be at least 1, got 0"),
        (lambda: optim.step_decay(0.1, (-1, 2), 0.1, steps_per_epoch=5), "milestone must be a number of at least 0"),
        (
            lambda: optim.schedule("linear", 0.1, 2, 5),
            "the schedule must be one of step, cosine, onecycle, got 'linear'",
        ),
        (lambda: optim.schedule("cosine", float("inf"), 2, 5), "lr must be a number of at least 0, got inf"),
    ],
)
def test_what_would_train_otherwise_without_a_word_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_a_traced_rate_is_taken() -> None:
    params = {"conv1": {"kernel": jnp.ones((2, 2))}}
    step = jax.jit(lambda lr: optim.optimizer("sgd", lr, momentum=0.0).update(
        params, optim.optimizer("sgd", lr, momentum=0.0).init(params), params)[0])  # fmt: skip
    assert float(step(0.5)["conv1"]["kernel"][0, 0]) == -0.5


def test_decoupled_decay_gathers_no_momentum() -> None:
    coupled, decoupled = (
        update("sgd", 0.0, 2, weight_decay=0.5, decoupled_decay=flag)["kernel"] for flag in (False, True)
    )
    np.testing.assert_allclose(decoupled, 3 * 0.95**2 - 3, rtol=1e-5)
    np.testing.assert_allclose(coupled, -0.1 * (1.5 + (0.9 * 1.5 + 0.5 * 2.85)), rtol=1e-5)


def test_clipping_counts_all_parameters_together() -> None:
    change = update("sgd", 10.0, clip_norm=1.0, momentum=0.0)  # six values of 10: a norm of 24.5
    length = np.sqrt(sum((value**2).sum() for value in change.values()))
    assert length == pytest.approx(0.1, rel=1e-5)
    np.testing.assert_allclose(update("sgd", 0.1, clip_norm=1.0)["bias"], -0.01, rtol=1e-5)


def test_adamw_decays_outside_its_moments() -> None:
    change = update("adamw", 1e-3, weight_decay=0.1)
    np.testing.assert_allclose(change["kernel"], -0.1 * (1 + 0.1 * 3), rtol=1e-4)
    np.testing.assert_allclose(update("adamw", 1e-3, weight_decay=0.1, decay_norms=False)["bias"], -0.1, rtol=1e-4)
