from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jresnet
from jresnet.data.dataset import Split
from jresnet.models.resnet import ResNet, ResNetConfig
from jresnet.training import augment, devices, optim
from jresnet.training import step as train

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


def setup(lr: float = 0.1, ema: float = 0.0, **options):
    model = ResNet(TINY, rngs=nnx.Rngs(0))
    optimizer = optim.optimizer("sgd", lr, nesterov=True, weight_decay=5e-4)
    graph, _, _ = nnx.split(model, nnx.Param, nnx.BatchStat)
    step = train.train_step(graph, optimizer, PIPELINE, ema=ema, **options)
    return graph, step, train.init(model, optimizer, average=ema > 0)


def test_an_epoch_is_a_permutation() -> None:
    one, other = (np.asarray(train.epoch_order(jax.random.key(0), epoch, 50, 8)) for epoch in (0, 1))
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


def test_training_learns(split: train.Images) -> None:
    _, step, state = setup()
    loop = train.StepsLoop(step, ONE)
    losses = []
    for epoch in range(30):
        order = train.epoch_order(jax.random.key(0), epoch, 50, 10)
        state, metrics = loop(state, split, order, 0, len(order), jax.random.key(1))
        losses.append(metrics.loss.mean())
    assert int(state.step) == 150
    assert losses[-1] < 0.7 * losses[0]


def test_the_loop_on_the_device_takes_the_same_steps(split: train.Images) -> None:
    """Accelerators run an epoch as one compiled loop, the CPU as a Python loop: the same function, in any stretches."""
    order = train.epoch_order(jax.random.key(0), 0, 50, 8)
    results = []
    for on_device, stretches in ((False, [(0, 6)]), (True, [(0, 6)]), (True, [(0, 1), (1, 4), (4, 6)])):
        _, step, state = setup()
        loop = train.StepsLoop(step, ONE, on_device)
        rows = []
        for start, end in stretches:
            state, metrics = loop(state, split, order, start, end, jax.random.key(1))
            assert len(metrics.loss) == end - start
            rows.append(metrics.loss)
        results.append((np.concatenate(rows), state))
    for losses, state in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-3)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), state, results[0][1])


def test_the_state_is_donated(split: train.Images) -> None:
    _, step, state = setup()
    order = train.epoch_order(jax.random.key(0), 0, 50, 8)
    old = jax.tree.leaves(state.params)[0]
    train.StepsLoop(step, ONE)(state, split, order, 0, 1, jax.random.key(0))
    assert old.is_deleted()


def test_a_stop_ends_the_loop_between_steps(split: train.Images) -> None:
    _, step, state = setup()
    asked = []
    loop = train.StepsLoop(step, ONE)
    order = train.epoch_order(jax.random.key(0), 0, 50, 8)
    hooks = {"stop": lambda: len(asked) >= 2, "after_step": lambda: asked.append(1)}
    state, metrics = loop(state, split, order, 0, 6, jax.random.key(0), **hooks)
    assert int(state.step) == len(metrics.loss) == 2
    state, metrics = loop(state, split, order, 2, 6, jax.random.key(0), **hooks)
    assert int(state.step) == 2
    assert len(metrics.loss) == 0


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64, 128])
def test_evaluation_counts_every_image_once(split: train.Images, batch_size: int) -> None:
    graph, _, state = setup()
    step, held = jax.jit(train.eval_step(graph, PIPELINE)), Split(np.asarray(split.images), np.asarray(split.labels))
    found, whole = (train.evaluate(step, train.evaluated(state), held, size, ONE) for size in (batch_size, 50))
    assert found
    assert whole
    np.testing.assert_array_equal(found.predictions, whole.predictions)
    assert found.predictions.shape == found.losses.shape == (50,)
    assert found.accuracy == (found.predictions == held.labels).mean()
    assert found.loss == pytest.approx(whole.loss, rel=1e-5)
    assert train.evaluate(step, train.evaluated(state), held, batch_size, ONE, stop=lambda: True) is None


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


def test_smoothed_targets_give_the_smoothed_loss(split: train.Images) -> None:
    plain, smoothed = (
        jax.jit(setup(label_smoothing=amount)[1])(setup()[2], split, jnp.arange(8), jax.random.key(0))[1].loss
        for amount in (0.0, 0.2)
    )
    views = train.prepare(PIPELINE, 1, 0.2)
    _, targets = views(jnp.int32(0), split, jnp.arange(8), jax.random.key(0), 10)
    np.testing.assert_allclose(targets.max(1), 0.82, rtol=1e-6)
    np.testing.assert_allclose(targets.min(1), 0.02, rtol=1e-6)
    assert not np.isclose(plain, smoothed)


def test_model_of_gives_the_trained_model(split: train.Images) -> None:
    graph, step, state = setup()
    before = np.asarray(train.model_of(graph, state).fc.bias[...])
    state, _ = jax.jit(step)(state, split, jnp.arange(8), jax.random.key(0))
    after = train.model_of(graph, state)
    assert isinstance(after, jresnet.ResNet)
    assert not np.array_equal(before, after.fc.bias[...])
