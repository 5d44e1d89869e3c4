from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices_check import Exact
from flax import nnx

import jresnet
from jresnet.data.dataset import Split
from jresnet.models.resnet import ResNet, ResNetConfig
from jresnet.training import augment, devices, optim
from jresnet.training import step as train
from jresnet.training.loop import StepsLoop, batches, epoch_order, evaluate

TINY = ResNetConfig("basic", (1, 1), (4, 8), num_classes=10, stem="cifar", shortcut="pad")
PIPELINE = augment.Pipeline("pad", 8, "random", (0.5,) * 3, (0.25,) * 3)
ONE = devices.find(1)


@pytest.fixture
def split() -> train.Images:
    """Ten colours with noise, so that there is something to learn."""
    draw = np.random.default_rng(0)
    labels = np.arange(50) % 10
    images = draw.uniform(0, 200, (10, 1, 1, 3))[labels] + draw.uniform(0, 50, (50, 8, 8, 3))
    return train.Images(jnp.asarray(images, jnp.uint8), jnp.asarray(labels, jnp.int32))


def setup(lr: float = 0.1, ema: float = 0.0, pipeline: augment.Pipeline = PIPELINE, **options):
    model = ResNet(TINY, rngs=nnx.Rngs(0))
    if isinstance(pipeline, Exact):
        nnx.update(model, jax.tree.map(lambda value: value.astype("float64"), nnx.state(model)))
    optimizer = optim.optimizer("sgd", lr, nesterov=True, weight_decay=5e-4)
    graph, _, _ = nnx.split(model, nnx.Param, nnx.BatchStat)
    step = train.train_step(graph, optimizer, pipeline, ema=ema, **options)
    return graph, step, train.init(model, optimizer, average=ema > 0)


@pytest.fixture(scope="module")
def loop() -> StepsLoop:
    """Of the usual step, compiled once; :func:`setup` makes the state."""
    return StepsLoop(setup()[1], ONE)


def test_an_epoch_is_a_permutation() -> None:
    one, other = (np.asarray(epoch_order(jax.random.key(0), epoch, 50, 8)) for epoch in (0, 1))
    assert one.shape == (6, 8)
    assert len(np.unique(one)) == 48
    assert not np.array_equal(one, other)


def test_each_step_draws_its_own_views(split: train.Images) -> None:
    """The same images look otherwise at another step or with another key, and alike at the same: a resumed run's do."""
    views = train.prepare(PIPELINE, 4, 0.0)
    indices = jnp.arange(16)
    first, again, later, other = (
        views(jnp.int32(step), split, indices, jax.random.key(key), 10)[0]
        for step, key in ((3, 0), (3, 0), (4, 0), (3, 1))
    )
    assert jnp.array_equal(first, again)
    for views_of in (later, other):  # in one place of 162 by chance
        assert (first != views_of).any((1, 2, 3)).mean() > 0.8


def test_training_learns(split: train.Images, loop: StepsLoop) -> None:
    _, _, state = setup()
    losses = []
    for epoch in range(25):
        order = epoch_order(jax.random.key(0), epoch, 50, 8)
        state, metrics = loop(state, split, order, 0, len(order), jax.random.key(1))
        losses.append(metrics.loss.mean())
    assert int(state.step) == 150
    assert losses[-1] < 0.7 * losses[0]


def test_the_loop_on_the_device_takes_the_same_steps(split: train.Images) -> None:
    """Accelerators run an epoch as one compiled loop, the CPU as a Python loop: the same function, in any stretches.

    In float64, where rounding stays below 1e-14 of the values: weight decay's part in six steps is 1e-4.
    """
    order = np.asarray(epoch_order(jax.random.key(0), 0, 50, 8))
    results = []
    with jax.enable_x64(True):
        for on_device, stretches in ((False, [(0, 6)]), (True, [(0, 4), (4, 6)])):
            _, step, state = setup(pipeline=Exact("pad", 8, "none", (), ()))
            loop = StepsLoop(step, ONE, on_device)
            rows = []
            for start, end in stretches:
                told: list[int] = []
                state, metrics = loop(state, split, order, start, end, jax.random.key(1), after_steps=told.append)
                assert len(metrics.loss) == sum(told) == end - start
                rows.append(metrics.loss)
            results.append((np.concatenate(rows), state))
    assert results[0][0].dtype == np.float64
    for losses, state in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), state, results[0][1])


def test_the_state_is_donated(split: train.Images, loop: StepsLoop) -> None:
    _, _, state = setup()
    order = epoch_order(jax.random.key(0), 0, 50, 8)
    old = jax.tree.leaves(state.params)[0]
    loop(state, split, order, 0, 1, jax.random.key(0))
    assert old.is_deleted()


def test_a_stop_ends_the_loop_between_steps(split: train.Images, loop: StepsLoop) -> None:
    _, _, state = setup()
    asked = []
    order = epoch_order(jax.random.key(0), 0, 50, 8)
    hooks = {"stop": lambda: len(asked) >= 2, "after_steps": asked.append}
    state, metrics = loop(state, split, order, 0, 6, jax.random.key(0), **hooks)
    assert int(state.step) == len(metrics.loss) == 2
    assert asked == [1, 1]
    state, metrics = loop(state, split, order, 2, 6, jax.random.key(0), **hooks)
    assert int(state.step) == 2
    assert len(metrics.loss) == 0


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64, 128])
def test_evaluation_counts_every_image_once(split: train.Images, batch_size: int) -> None:
    graph, _, state = setup()
    step, held = jax.jit(train.eval_step(graph, PIPELINE)), Split(np.asarray(split.images), np.asarray(split.labels))
    weights = train.evaluated(state)
    found, whole = (evaluate(step, weights, batches(held, size, ONE), held.labels) for size in (batch_size, 50))
    assert found
    assert whole
    np.testing.assert_array_equal(found.predictions, whole.predictions)
    assert found.predictions.shape == found.losses.shape == (50,)
    assert found.accuracy == (found.predictions == held.labels).mean()
    assert found.loss == pytest.approx(whole.loss, rel=1e-5)
    assert evaluate(step, weights, batches(held, batch_size, ONE), held.labels, stop=lambda: True) is None


def test_the_average_follows_weights_and_statistics(split: train.Images) -> None:
    """The first steps' decay is (1 + step) / (10 + step), then the recipe's."""
    graph, step, state = setup(ema=0.3)
    expected, taken = train.Averaged(state.params, state.batch_stats), []
    step = jax.jit(step)
    for i in range(6):
        state, _ = step(state, split, jnp.arange(8), jax.random.key(0))
        decay = min(0.3, (1 + i) / (10 + i))
        taken.append(decay)
        new = train.Averaged(state.params, state.batch_stats)
        expected = jax.tree.map(lambda a, b, decay=decay: decay * a + (1 - decay) * b, expected, new)
    assert taken[0] < taken[1] < 0.3 == taken[-1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.averaged, expected)
    np.testing.assert_array_equal(train.model_of(graph, state).bn1.mean[...], state.averaged.batch_stats["bn1"]["mean"])
    assert not np.allclose(state.averaged.params["fc"]["kernel"], state.params["fc"]["kernel"])


@pytest.mark.parametrize("amount", [0.0, 0.2])
def test_the_loss_is_the_smoothed_cross_entropy(split: train.Images, amount: float) -> None:
    """Of the batch's own logits, in float64 by numpy."""
    graph, step, state = setup(label_smoothing=amount)
    indices, key = jnp.arange(8), jax.random.key(0)
    images, _ = train.prepare(PIPELINE, 1, amount)(jnp.int32(0), split, indices, key, 10)
    model = nnx.merge(graph, state.params, state.batch_stats, copy=True)
    logits = np.asarray(model(images, train=True), np.float64)
    targets = (1 - amount) * np.eye(10)[np.asarray(split.labels[:8])] + amount / 10
    expected = (np.log(np.exp(logits).sum(1)) - (targets * logits).sum(1)).mean()
    assert float(jax.jit(step)(state, split, indices, key)[1].loss) == pytest.approx(expected, rel=1e-5)


def test_what_is_not_finite_is_no_prediction() -> None:
    """argmax alone takes NaN for the largest, and so for class 0."""
    logits = jnp.array([[0.0, 2.0, 1.0], [jnp.nan] * 3, [0.0, jnp.nan, 9.0], [jnp.inf, 0.0, 0.0], [1.0, 0.0, -jnp.inf]])
    assert train.predict(logits).tolist() == [1, -1, -1, -1, -1]


def test_a_broken_network_classifies_nothing_rightly(split: train.Images) -> None:
    graph, _, state = setup()
    state.params["fc"]["bias"][...] = jnp.full(10, jnp.nan)
    zeros = Split(np.asarray(split.images[:8]), np.zeros(8, np.int32))
    step = jax.jit(train.eval_step(graph, PIPELINE))
    found = evaluate(step, train.evaluated(state), batches(zeros, 8, ONE), zeros.labels)
    assert found
    assert found.accuracy == 0
    assert np.isnan(found.loss)


def test_model_of_gives_the_trained_model(split: train.Images) -> None:
    graph, step, state = setup()
    before = np.asarray(train.model_of(graph, state).fc.bias[...])
    state, _ = jax.jit(step)(state, split, jnp.arange(8), jax.random.key(0))
    after = train.model_of(graph, state)
    assert isinstance(after, jresnet.ResNet)
    assert not np.array_equal(before, after.fc.bias[...])
