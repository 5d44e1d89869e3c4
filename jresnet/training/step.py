"""Training as pure functions: a state and a batch in, a state and metrics out.

The uint8 images live on the device; a step gathers its batch from them, augments it, and takes one step of the optimizer,
all in one jitted function whose state is donated. :class:`StepsLoop` runs many of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from jresnet import cache
from jresnet.data.dataset import Split
from jresnet.models.resnet import ResNet
from jresnet.training.augment import Pipeline, alternate
from jresnet.training.devices import Devices

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Int32, UInt8


class Averaged(NamedTuple):
    """The exponential moving average of a model in training."""

    params: nnx.State
    batch_stats: nnx.State


class TrainState(NamedTuple):
    """All that changes in training."""

    step: Int[Array, ""]  # optimizer steps taken
    params: nnx.State  # nnx.Param leaves
    batch_stats: nnx.State  # nnx.BatchStat leaves
    opt_state: optax.OptState
    averaged: Averaged | None  # where the recipe averages


class Images(NamedTuple):
    """Training images, or a batch, on the devices."""

    images: UInt8[Array, "n h w c"]
    labels: Int32[Array, " n"]


class Metrics(NamedTuple):
    """What one training step reports, on the device until it is fetched."""

    loss: Float[Array, ""]  # mean cross-entropy with the batch's targets, smoothed and mixed as they are, in nats
    correct: Int[Array, ""]  # images whose largest logit is the label's, of a mixed image the first one's


class Evaluation(NamedTuple):
    """What evaluation found, each image counted once."""

    loss: float  # mean cross-entropy with the labels, in nats
    accuracy: float  # share of the images, 0 to 1
    predictions: np.ndarray  # int32 [N]
    losses: np.ndarray  # float32 [N]


TrainStep = Callable[[TrainState, Images, "Int[Array, ' b']", jax.Array], tuple[TrainState, Metrics]]


def init(model: ResNet, optimizer: optax.GradientTransformation, average: bool = False) -> TrainState:
    """The state before the first step."""
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    # Copies, since a step is given its state to overwrite, and one buffer cannot be given twice.
    averaged = jax.tree.map(jnp.copy, Averaged(params, batch_stats)) if average else None
    opt_state = jax.jit(optimizer.init)(params)  # one program, not one for each shape
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, opt_state, averaged)


def evaluated(state: TrainState) -> Averaged:
    """What evaluation and the weight files take: the average, or without one the weights themselves."""
    return state.averaged or Averaged(state.params, state.batch_stats)


def model_of(graph: nnx.GraphDef, state: TrainState) -> ResNet:
    """The model in a state, as :func:`evaluated`."""
    return nnx.merge(graph, *evaluated(state))


def train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    pipeline: Pipeline,
    *,
    steps_per_epoch: int = 1,
    label_smoothing: float = 0.0,
    ema: float = 0.0,
    devices: Devices | None = None,
    bn: str = "global",
) -> TrainStep:
    """A pure function: one step of ``optimizer`` on the batch ``split[indices]``.

    The returned function takes (state, split, indices ``[B]``, key) and returns (state, metrics). Each step draws its
    augmentation from ``fold_in(key, step)``, so that a resumed run draws what an undisturbed one would.

    Args:
        graph: of the model.
        optimizer: of :func:`jresnet.training.optim.optimizer`.
        pipeline: what happens to the images.
        steps_per_epoch: tells the epoch, which an alternating flip needs.
        label_smoothing: share of a target that is spread over all classes.
        ema: decay of the average of weights and BN statistics; the first steps' is lower, (1 + step) / (10 + step).
        devices: cuts the batch over them.
        bn: ``"global"``: BatchNorm sees the whole batch, as ``torch.nn.SyncBatchNorm``; ``"per-device"``: each device's
            part, and the running statistics follow the first device's, as in ``DistributedDataParallel``.
    """
    views = prepare(pipeline, steps_per_epoch, label_smoothing)
    gradients: Callable = partial(_gradients, graph)
    if bn == "per-device" and devices:
        gradients = _on_each_device(gradients, devices)

    def step(state: TrainState, split: Images, indices: Int[Array, " b"], key: jax.Array) -> tuple[TrainState, Metrics]:
        classes = state.params["fc"]["bias"].shape[0]
        images, targets = views(state.step, split, indices, key, classes)
        if devices:
            images = lax.with_sharding_constraint(images, devices.cut())

        (loss, logits, batch_stats), grads = gradients(state.params, state.batch_stats, images, targets)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averaged = _average(state.averaged, Averaged(params, batch_stats), state.step, ema) if state.averaged else None
        metrics = Metrics(loss, (logits.argmax(-1) == split.labels[indices]).sum())
        return TrainState(state.step + 1, params, batch_stats, opt_state, averaged), metrics

    return step


def prepare(
    pipeline: Pipeline, steps_per_epoch: int, label_smoothing: float
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A pure function: (step, split, indices ``[B]``, key, number of classes) -> the step's images and targets."""

    def views(
        step: jax.Array, split: Images, indices: Int[Array, " b"], key: jax.Array, classes: int
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
        view_key, mix_key = jax.random.split(jax.random.fold_in(key, step))
        turned = alternate(key, indices, step // steps_per_epoch) if pipeline.flip == "alternate" else None
        images = pipeline.train(view_key, split.images[indices], turned)
        targets = jax.nn.one_hot(split.labels[indices], classes, dtype=images.dtype)
        return pipeline.mix(mix_key, images, optax.smooth_labels(targets, label_smoothing))

    return views


def _gradients(graph: nnx.GraphDef, params: nnx.State, batch_stats: nnx.State, images: jax.Array, targets: jax.Array):
    """-> (mean loss, logits, new BN statistics), the gradients of the loss."""

    def loss_of(params: nnx.State) -> tuple[jax.Array, tuple[jax.Array, nnx.State]]:
        model = nnx.merge(graph, params, batch_stats, copy=True)  # its own variables, to be updated
        logits = model(images, train=True)
        return optax.softmax_cross_entropy(logits, targets).mean(), (logits, nnx.state(model, nnx.BatchStat))

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return (loss, logits, batch_stats), grads


def _on_each_device(gradients: Callable, devices: Devices) -> Callable:
    """``gradients`` of each device's part of the batch by itself, then their mean."""

    def on_one(*args: Any):
        (loss, logits, batch_stats), grads = gradients(*args)
        batch_stats = jax.tree.map(lambda value: lax.all_gather(value, "data")[0], batch_stats)
        return (lax.pmean(loss, "data"), logits, batch_stats), lax.pmean(grads, "data")

    whole, cut = PartitionSpec(), PartitionSpec("data")
    # check_vma=False: JAX then leaves the sum over the devices to the pmean above.
    return jax.shard_map(
        on_one, mesh=devices.mesh, in_specs=(whole, whole, cut, cut), out_specs=((whole, cut, whole), whole),
        check_vma=False,
    )  # fmt: skip


def _average(old: Averaged, new: Averaged, step: jax.Array, decay: float) -> Averaged:
    # The lower decay of the first steps: else the random initial weights would count for long.
    share = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, b: a + share.astype(a.dtype) * (b - a), old, new)


def eval_step(graph: nnx.GraphDef, pipeline: Pipeline) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A pure function: (what is :func:`evaluated`, a batch ``Images``) -> (losses ``[B]``, predictions ``[B]``)."""

    def step(weights: Averaged, batch: Images) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graph, *weights)(pipeline.evaluate(batch.images))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses, logits.argmax(-1).astype(jnp.int32)

    return step


def epoch_order(key: jax.Array, epoch: int, images: int, batch_size: int) -> Int[Array, "steps b"]:
    """Which images each step of an epoch takes; the remainder of less than a batch sits this epoch out."""
    steps = images // batch_size
    order = jax.random.permutation(jax.random.fold_in(key, epoch), images)
    return order[: steps * batch_size].reshape(steps, batch_size)


class StepsLoop:
    """Runs steps of an epoch: ``loop(state, split, order [steps, B], start, end, key) -> (state, metrics)``.

    The metrics are numpy arrays, one row for each step that was taken. The state that is given is gone afterwards: its
    memory is used again.

    Args:
        step: of :func:`train_step`.
        devices: where it runs.
        on_device: loop inside one compiled function, for accelerators: the host then waits once for all the steps. Not
            on the CPU, where XLA leaves the backward convolutions of a loop body as naive loops, ten times slower
            (jax#12868): there Python calls the compiled step.
        compiler_options: of ``jax.jit``; :func:`jresnet.compiler_options` has the CPU's.
    """

    def __init__(
        self,
        step: TrainStep,
        devices: Devices,
        on_device: bool | None = None,
        compiler_options: dict[str, str | bool] | None = None,
    ):
        self.devices = devices
        self.on_device = devices.platform != "cpu" if on_device is None else on_device
        # Every device holds the results whole: XLA would be free to cut them.
        function = jax.jit(
            partial(_many_steps, step) if self.on_device else step,
            donate_argnums=0,
            out_shardings=devices.whole,
            compiler_options=compiler_options,
        )
        self._jitted, self._compiled = function, cast(Callable, function)

    def compile(self, state: TrainState, split: Images, order: np.ndarray, key: jax.Array) -> None:
        """Compiles for arguments like these, all at once: the first call is then as quick as any."""
        if self._compiled is self._jitted:
            self._compiled = cache.compiled(self._jitted, state, split, *self._bounds(order, 0, 1), key)

    def __call__(
        self,
        state: TrainState,
        split: Images,
        order: np.ndarray,
        start: int,
        end: int,
        key: jax.Array,
        stop: Callable[[], bool] = lambda: False,
        after_step: Callable[[], None] = lambda: None,
    ) -> tuple[TrainState, Metrics]:
        """Takes steps ``start`` to ``end``; on the host it asks ``stop`` before and calls ``after_step`` after each."""
        taken: list[Metrics] = []
        if self.on_device:
            state, rows = self._compiled(state, split, *self._bounds(order, start, end), key)
            loss, correct = (np.asarray(row)[start:end] for row in rows)
            return state, Metrics(loss, correct)  # type: ignore[arg-type]  # numpy now, fetched
        for i in range(start, end):
            if stop():
                break
            state, metrics = self._compiled(state, split, *self._bounds(order, i, i + 1), key)
            if taken:
                taken[-1].loss.block_until_ready()  # one step ahead of the device: no gap, and a signal is soon seen
            taken.append(metrics)
            after_step()
        rows = [np.array(row) for row in zip(*jax.device_get(taken), strict=True)] or [np.zeros(0), np.zeros(0, int)]
        return state, Metrics(*rows)  # type: ignore[arg-type]  # numpy now, fetched

    def _bounds(self, order: np.ndarray, start: int, end: int) -> tuple[Any, ...]:
        """What tells the compiled function its batches."""
        order = np.asarray(order, np.int32)
        if self.on_device:
            # Bounds that are values, not constants: one compilation serves every stretch of an epoch.
            return self.devices.put(order, self.devices.cut(1)), np.int32(start), np.int32(end)
        return (self.devices.put(order[start], self.devices.cut()),)


def _many_steps(
    step: TrainStep,
    state: TrainState,
    split: Images,
    order: jax.Array,
    start: jax.Array,
    end: jax.Array,
    key: jax.Array,
) -> tuple[TrainState, Metrics]:
    """Steps ``start`` to ``end`` of ``order [steps, B]``, and metrics of which rows ``[start:end]`` are filled."""

    def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, all_metrics = carry
        state, metrics = step(state, split, order[i], key)
        return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), all_metrics, metrics)

    rows = jax.eval_shape(step, state, split, order[0], key)[1]
    empty = jax.tree.map(lambda row: jnp.zeros((len(order),), row.dtype), rows)
    return lax.fori_loop(start, end, body, (state, empty))


def batches(split: Split, batch_size: int, devices: Devices) -> Iterator[tuple[Images, int]]:
    """(a batch, how many of its images count): every image once, the last batch filled with the last image."""
    for start in range(0, len(split.labels), batch_size):
        indices = np.arange(start, start + batch_size)
        parts = (part.take(indices, axis=0, mode="clip") for part in (split.images, split.labels))
        yield Images(*(devices.put(part, devices.cut()) for part in parts)), min(batch_size, len(split.labels) - start)


def evaluate(
    step: Callable[..., tuple[jax.Array, jax.Array]],
    weights: Averaged,
    split: Split,
    batch_size: int,
    devices: Devices,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Loss and accuracy over every image of ``split`` exactly once; None where ``stop`` said so.

    ``step`` is a jitted :func:`eval_step`.
    """
    found = []
    for batch, count in batches(split, batch_size, devices):
        if stop():
            return None
        losses, predictions = step(weights, batch)
        found.append((losses, predictions, count))
        if len(found) > 1:
            found[-2][0].block_until_ready()
    all_losses = np.concatenate([np.asarray(losses)[:count] for losses, _, count in found])
    predicted = np.concatenate([np.asarray(predictions)[:count] for _, predictions, count in found])
    accuracy = float((predicted == split.labels).mean())
    return Evaluation(float(all_losses.astype(np.float64).mean()), accuracy, predicted, all_losses)
