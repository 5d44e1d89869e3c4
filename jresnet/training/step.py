"""Training steps as pure functions of a state and a batch, which return a state and metrics.

The uint8 images are on the device. A step gathers its batch from them, augments it, and runs one step of the optimizer.
:class:`jresnet.training.loop.StepsLoop` compiles the step, with the state donated, and runs many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Int32, UInt8

from jresnet.models.resnet import ResNet
from jresnet.training import optim
from jresnet.training.augment import Pipeline, alternate
from jresnet.training.devices import Devices


class Averaged(NamedTuple):
    """The exponential moving average of a model in training."""

    params: nnx.State
    batch_stats: nnx.State


class TrainState(NamedTuple):
    """The training state."""

    step: Int[Array, ""]  # number of completed optimizer steps
    params: nnx.State  # nnx.Param leaves
    batch_stats: nnx.State  # nnx.BatchStat leaves
    opt_state: optax.OptState
    averaged: Averaged | None  # None: the recipe does not average weights


class Images(NamedTuple):
    """Training images, or a batch, on the devices."""

    images: UInt8[Array, "n h w c"]
    labels: Int32[Array, " n"]


class Metrics(NamedTuple):
    """The metrics of one training step, on the device."""

    loss: Float[Array, ""]  # mean_loss with the batch's smoothed and mixed targets, in nats
    correct: Int[Array, ""]  # number of correctly classified images; the label of a mixed image is the first one's


TrainStep = Callable[[TrainState, Images, "Int[Array, ' b']", jax.Array], tuple[TrainState, Metrics]]


def init(model: ResNet, optimizer: optax.GradientTransformation, average: bool = False) -> TrainState:
    """The state before the first step."""
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    # Copies, since a step donates its state, and a buffer cannot be donated twice.
    averaged = jax.tree.map(jnp.copy, Averaged(params, batch_stats)) if average else None
    opt_state = jax.jit(optimizer.init)(params)  # compiles one program instead of one per shape
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, opt_state, averaged)


def evaluated(state: TrainState) -> Averaged:
    """The weights for evaluation and for weights files: the average if there is one, else the weights themselves."""
    return state.averaged or Averaged(state.params, state.batch_stats)


def snapshot(state: TrainState) -> TrainState:
    """A copy of the parts that :func:`model_of` needs, which stays valid after the state was donated."""
    step, (params, batch_stats) = jax.tree.map(jnp.copy, (state.step, evaluated(state)))
    return TrainState(step, params, batch_stats, (), None)


def model_of(graph: nnx.GraphDef, state: TrainState) -> ResNet:
    """The model with the weights of :func:`evaluated`."""
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
    frozen: Sequence[str] = (),
    loss: str = "softmax",
    target_threshold: float = 0.0,
) -> TrainStep:
    """Returns a pure function that runs one step of ``optimizer`` on the batch ``split[indices]``.

    The function takes (state, split, indices ``[B]``, key) and returns (state, metrics). Random numbers of a step come from
    ``fold_in(key, step)``, so that a resumed run draws the same numbers as an uninterrupted one.

    Args:
        graph: graph definition of the model.
        optimizer: the optimizer, from :func:`jresnet.training.optim.optimizer`.
        pipeline: augmentation and normalisation of images.
        steps_per_epoch: steps per epoch; an alternating flip needs it to compute the epoch.
        label_smoothing: fraction of a target that is spread over all classes.
        ema: decay of the moving average of weights and BN statistics; in the first steps (1 + step) / (10 + step) if lower.
        devices: the batch is sharded over these devices.
        bn: ``"global"``: BatchNorm uses the whole batch, as ``torch.nn.SyncBatchNorm``; ``"per-device"``: each device's
            part, and the running statistics are those of the first device, as in ``DistributedDataParallel``.
        frozen: parts that the optimizer freezes (:func:`jresnet.training.optim.freeze`); their gradients are not computed.
        loss: "softmax" or "sigmoid" (:func:`mean_loss`).
        target_threshold: threshold for "sigmoid" (:func:`mean_loss`), at least 0 and below 1.
    """
    views = prepare(pipeline, steps_per_epoch, label_smoothing)

    gradients: Callable = partial(_gradients, graph, tuple(frozen), partial(mean_loss, loss, target_threshold))
    if bn == "per-device" and devices:
        gradients = _on_each_device(gradients, devices)

    def step(state: TrainState, split: Images, indices: Int[Array, " b"], key: jax.Array) -> tuple[TrainState, Metrics]:
        classes = state.params["fc"]["bias"].shape[0]
        images, targets = views(state.step, split, indices, key, classes)
        if devices:
            images = lax.with_sharding_constraint(images, devices.cut())

        (value, logits, batch_stats), grads = gradients(state.params, state.batch_stats, images, targets)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averaged = _average(state.averaged, Averaged(params, batch_stats), state.step, ema) if state.averaged else None
        metrics = Metrics(value, (predict(logits) == split.labels[indices]).sum())
        return TrainState(state.step + 1, params, batch_stats, opt_state, averaged), metrics

    return step


def prepare(
    pipeline: Pipeline, steps_per_epoch: int, label_smoothing: float
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns a pure function (step, split, indices ``[B]``, key, number of classes) -> (images, targets) of the step."""

    def views(
        step: jax.Array, split: Images, indices: Int[Array, " b"], key: jax.Array, classes: int
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
        view_key, mix_key = jax.random.split(jax.random.fold_in(key, step))
        turned = alternate(key, indices, step // steps_per_epoch) if pipeline.flip == "alternate" else None
        images = pipeline.train(view_key, split.images[indices], turned)
        targets = jax.nn.one_hot(split.labels[indices], classes, dtype=images.dtype)
        return pipeline.mix(mix_key, images, optax.smooth_labels(targets, label_smoothing))

    return views


def _gradients(
    graph: nnx.GraphDef,
    frozen: tuple[str, ...],
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    params: nnx.State,
    batch_stats: nnx.State,
    images: jax.Array,
    targets: jax.Array,
):
    """Computes (mean loss, logits, new BN statistics) and the gradients of the loss, which are 0 for frozen parts."""
    constant = optim.mask(*frozen)(params) if frozen else None

    def loss_of(params: nnx.State) -> tuple[jax.Array, tuple[jax.Array, nnx.State]]:
        if constant is not None:  # avoids the computation of their gradients
            params = jax.tree.map(lambda held, value: lax.stop_gradient(value) if held else value, constant, params)
        model = nnx.merge(graph, params, batch_stats, copy=True)  # copied, because the call updates BN statistics
        logits = model(images, train=True)
        return loss(logits, targets), (logits, nnx.state(model, nnx.BatchStat))

    (value, (logits, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return (value, logits, batch_stats), grads


def mean_loss(
    kind: str, threshold: float, logits: Float[Array, "n k"], targets: Float[Array, "n k"]
) -> Float[Array, ""]:
    """The mean softmax cross-entropy, or the mean binary cross-entropy over all classes (arXiv:2110.00476).

    Args:
        kind: "softmax" or "sigmoid".
        threshold: if above 0, targets of "sigmoid" above it become 1 and the others 0, as in timm's ``BinaryCrossEntropy``.
        logits: the network's outputs.
        targets: probabilities of the classes.
    """
    if kind == "softmax":
        return optax.softmax_cross_entropy(logits, targets).mean()
    targets = (targets > threshold).astype(logits.dtype) if threshold else targets
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean()


def _on_each_device(gradients: Callable, devices: Devices) -> Callable:
    """Computes ``gradients`` on each device's part of the batch separately, then averages them."""

    def on_one(*args: Any):
        (loss, logits, batch_stats), grads = gradients(*args)
        # Broadcasts the first device's statistics as a sum with zeros, which XLA combines with the reduction of gradients.
        mine = lax.axis_index("data") == 0
        batch_stats = lax.psum(jax.tree.map(lambda value: jnp.where(mine, value, 0), batch_stats), "data")
        return (lax.pmean(loss, "data"), logits, batch_stats), lax.pmean(grads, "data")

    whole, cut = PartitionSpec(), PartitionSpec("data")
    # check_vma=False: otherwise JAX would sum gradients over the devices itself, in addition to the pmean above.
    return jax.shard_map(
        on_one, mesh=devices.mesh, in_specs=(whole, whole, cut, cut), out_specs=((whole, cut, whole), whole),
        check_vma=False,
    )  # fmt: skip


def _average(old: Averaged, new: Averaged, step: jax.Array, decay: float) -> Averaged:
    # The decay is lower in the first steps; otherwise the random initial weights would have an effect for long.
    share = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, b: a + share.astype(a.dtype) * (b - a), old, new)


def eval_step(graph: nnx.GraphDef, pipeline: Pipeline) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns a pure function (weights of :func:`evaluated`, batch) -> (losses ``[B]``, predictions ``[B]``)."""

    def step(weights: Averaged, batch: Images) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graph, *weights)(pipeline.evaluate(batch.images), train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses, predict(logits)

    return step


def predict(logits: Float[Array, "n k"]) -> Int32[Array, " n"]:
    """The class with the largest logit; -1 (no class) if a logit is NaN or infinite.

    ``argmax`` alone treats NaN as the largest value, so that a broken network would classify all images as class 0.
    """
    return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), -1).astype(jnp.int32)


def all_finite(state: TrainState) -> jax.Array:
    """Whether all floating-point values of the state are finite, as a bool of shape ``[]``."""
    floats = [value for value in jax.tree.leaves(state) if jnp.issubdtype(value.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(value).all() for value in floats]).all()
