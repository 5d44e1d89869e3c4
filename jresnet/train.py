"""Training as pure functions: a state and a batch in, a state and metrics out.

The uint8 images live on the device; a step gathers its batch from them, augments it, and takes one step of the optimizer,
all in one jitted function whose state is donated. :func:`steps_loop` runs many of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from jresnet.augment import Pipeline
from jresnet.resnet import ResNet

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, UInt8


class TrainState(NamedTuple):
    """All that changes in training."""

    step: Int[Array, ""]  # optimizer steps taken
    params: nnx.State  # nnx.Param leaves
    batch_stats: nnx.State  # nnx.BatchStat leaves
    opt_state: optax.OptState


class Images(NamedTuple):
    """A split on the device."""

    images: UInt8[Array, "n h w c"]
    labels: Int[Array, " n"]


class Metrics(NamedTuple):
    """What one training step reports, on the device until it is fetched."""

    loss: Float[Array, ""]  # mean cross-entropy of the batch, in nats
    correct: Int[Array, ""]  # images whose largest logit is the label's


class Evaluation(NamedTuple):
    """What evaluation found, each image counted once."""

    loss: float  # mean cross-entropy, in nats
    accuracy: float  # share of the images, 0 to 1
    predictions: np.ndarray  # int32 [N]


TrainStep = Callable[[TrainState, Images, "Int[Array, ' b']", jax.Array], tuple[TrainState, Metrics]]


def init(model: ResNet, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))


def model_of(graph: nnx.GraphDef, state: TrainState) -> ResNet:
    """The model in a state."""
    return nnx.merge(graph, state.params, state.batch_stats)


def train_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation, pipeline: Pipeline) -> TrainStep:
    """A pure function: one step of ``optimizer`` on the batch ``split[indices]``.

    The returned function takes (state, split, indices ``[B]``, key) and returns (state, metrics). Each step draws its
    augmentation from ``fold_in(key, step)``, so that a resumed run draws what an undisturbed one would.
    """

    def step(state: TrainState, split: Images, indices: Int[Array, " b"], key: jax.Array) -> tuple[TrainState, Metrics]:
        images = pipeline.train(jax.random.fold_in(key, state.step), split.images[indices])
        labels = split.labels[indices]

        def loss_of(params: nnx.State) -> tuple[jax.Array, tuple[jax.Array, nnx.State]]:
            model = nnx.merge(graph, params, state.batch_stats, copy=True)  # its own variables, to be updated
            logits = model(images, train=True)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, (logits, nnx.state(model, nnx.BatchStat))

        (loss, (logits, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = Metrics(loss, (logits.argmax(-1) == labels).sum())
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return step


def eval_step(graph: nnx.GraphDef, pipeline: Pipeline) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A pure function: (params, batch_stats, split, indices ``[B]``) -> (losses ``[B]``, predictions ``[B]``)."""

    def step(params: nnx.State, batch_stats: nnx.State, split: Images, indices: Int[Array, " b"]):
        logits = nnx.merge(graph, params, batch_stats)(pipeline.evaluate(split.images[indices]))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels[indices])
        return losses, logits.argmax(-1).astype(jnp.int32)

    return step


def epoch_order(key: jax.Array, epoch: int, images: int, batch_size: int) -> Int[Array, "steps b"]:
    """Which images each step of an epoch takes; the remainder of less than a batch sits this epoch out."""
    steps = images // batch_size
    order = jax.random.permutation(jax.random.fold_in(key, epoch), images)
    return order[: steps * batch_size].reshape(steps, batch_size)


def steps_loop(
    step: TrainStep,
    on_device: bool,
    stop: Callable[[], bool] = lambda: False,
    after_step: Callable[[], None] = lambda: None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Runs steps ``start`` to ``end`` of an epoch.

    What is returned takes (state, split, order ``[steps, B]``, start, end, key) and gives (state, metrics).

    Args:
        step: of :func:`train_step`.
        on_device: loop inside one compiled function, for accelerators: the host then waits once for all the steps. Not
            on the CPU, where XLA leaves the backward convolutions of a loop body as naive loops, ten times slower
            (jax#12868): there Python calls the compiled step.
        stop: asked before every step on the host; true ends the loop early.
        after_step: called after every step on the host.

    Returns:
        A function whose metrics are stacked, one row for each step that was taken.
    """
    if on_device:

        def loop(state: TrainState, split: Images, order: jax.Array, start: jax.Array, end: jax.Array, key: jax.Array):
            def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
                state, all_metrics = carry
                state, metrics = step(state, split, order[i], key)
                return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), all_metrics, metrics)

            rows = jax.eval_shape(step, state, split, order[0], key)[1]
            empty = jax.tree.map(lambda row: jnp.zeros((len(order),), row.dtype), rows)
            # Bounds that are values, not constants: one compilation serves every stretch of an epoch.
            return lax.fori_loop(start, end, body, (state, empty))

        compiled_loop = jax.jit(loop, donate_argnums=0)

        def run_on_device(state: TrainState, split: Images, order: jax.Array, start: int, end: int, key: jax.Array):
            state, metrics = compiled_loop(state, split, order, np.int32(start), np.int32(end), key)
            return state, jax.tree.map(lambda rows: np.asarray(rows)[start:end], metrics)

        return run_on_device

    compiled = jax.jit(step, donate_argnums=0)

    def run_on_host(state: TrainState, split: Images, order: jax.Array, start: int, end: int, key: jax.Array):
        taken: list[Metrics] = []
        for indices in np.asarray(order[start:end]):
            if stop():
                break
            state, metrics = compiled(state, split, indices, key)
            if taken:
                taken[-1].loss.block_until_ready()  # one step ahead of the device: no gap, and a signal is soon seen
            taken.append(metrics)
            after_step()
        rows = [np.array(row) for row in zip(*jax.device_get(taken), strict=True)] or [np.zeros(0), np.zeros(0, int)]
        return state, Metrics(*rows)  # type: ignore[arg-type]  # numpy now, fetched

    return run_on_host


def batches(images: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(indices ``[batch_size]``, how many of them count): every image once, the last batch filled with image 0."""
    for start in range(0, images, batch_size):
        indices = np.arange(start, min(start + batch_size, images), dtype=np.int32)
        yield np.pad(indices, (0, batch_size - len(indices))), len(indices)


def evaluate(
    step: Callable[..., tuple[jax.Array, jax.Array]], state: TrainState, split: Images, batch_size: int
) -> Evaluation:
    """Loss and accuracy over every image of ``split`` exactly once; ``step`` is a jitted :func:`eval_step`."""
    n = len(split.labels)
    found = [
        (step(state.params, state.batch_stats, split, indices), count)
        for indices, count in batches(n, min(batch_size, n))
    ]
    losses = np.concatenate([np.asarray(losses)[:count] for (losses, _), count in found])
    predictions = np.concatenate([np.asarray(predicted)[:count] for (_, predicted), count in found])
    accuracy = float((predictions == np.asarray(split.labels)).mean())
    return Evaluation(float(losses.astype(np.float64).mean()), accuracy, predictions)
