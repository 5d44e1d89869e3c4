"""Training as pure functions: a state and a batch in, a state and metrics out.

The uint8 images live on the device; a step gathers its batch from them, augments it, and takes one step of the optimizer.
:class:`jresnet.training.loop.StepsLoop` compiles it, with the state donated, and runs many of them.
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

    loss: Float[Array, ""]  # of mean_loss with the batch's targets, smoothed and mixed as they are, in nats
    correct: Int[Array, ""]  # images whose prediction is the label, of a mixed image the first one's


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


def snapshot(state: TrainState) -> TrainState:
    """A copy of what :func:`model_of` needs, which is still there when the state has been given to a step."""
    step, (params, batch_stats) = jax.tree.map(jnp.copy, (state.step, evaluated(state)))
    return TrainState(step, params, batch_stats, (), None)


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
    frozen: Sequence[str] = (),
    loss: str = "softmax",
    target_threshold: float = 0.0,
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
        frozen: parts that the optimizer holds (:func:`jresnet.training.optim.freeze`): no gradient is computed for them.
        loss: "softmax" or "sigmoid", of which ``target_threshold`` is (:func:`mean_loss`).
        target_threshold: 0 to below 1.
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


def _gradients(
    graph: nnx.GraphDef,
    frozen: tuple[str, ...],
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    params: nnx.State,
    batch_stats: nnx.State,
    images: jax.Array,
    targets: jax.Array,
):
    """-> (mean loss, logits, new BN statistics), the gradients of the loss, 0 for what is frozen."""
    constant = optim.mask(*frozen)(params) if frozen else None

    def loss_of(params: nnx.State) -> tuple[jax.Array, tuple[jax.Array, nnx.State]]:
        if constant is not None:  # nothing is computed for their derivatives
            params = jax.tree.map(lambda held, value: lax.stop_gradient(value) if held else value, constant, params)
        model = nnx.merge(graph, params, batch_stats, copy=True)  # its own variables, to be updated
        logits = model(images, train=True)
        return loss(logits, targets), (logits, nnx.state(model, nnx.BatchStat))

    (value, (logits, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return (value, logits, batch_stats), grads


def mean_loss(
    kind: str, threshold: float, logits: Float[Array, "n k"], targets: Float[Array, "n k"]
) -> Float[Array, ""]:
    """The mean over a batch of the cross-entropy of the softmax, or of the binary ones over all classes (arXiv:2110.00476).

    Args:
        kind: "softmax" or "sigmoid".
        threshold: above 0: targets of "sigmoid" that are greater are 1, the others 0, as timm's ``BinaryCrossEntropy``.
        logits: of the network.
        targets: shares of the classes.
    """
    if kind == "softmax":
        return optax.softmax_cross_entropy(logits, targets).mean()
    targets = (targets > threshold).astype(logits.dtype) if threshold else targets
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean()


def _on_each_device(gradients: Callable, devices: Devices) -> Callable:
    """``gradients`` of each device's part of the batch by itself, then their mean."""

    def on_one(*args: Any):
        (loss, logits, batch_stats), grads = gradients(*args)
        # The first device's, as a sum with nothing: XLA then exchanges them together with the gradients.
        mine = lax.axis_index("data") == 0
        batch_stats = lax.psum(jax.tree.map(lambda value: jnp.where(mine, value, 0), batch_stats), "data")
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
        logits = nnx.merge(graph, *weights)(pipeline.evaluate(batch.images), train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses, predict(logits)

    return step


def predict(logits: Float[Array, "n k"]) -> Int32[Array, " n"]:
    """The class with the largest logit; -1, which is no class, where a logit is NaN or infinite.

    ``argmax`` alone takes NaN for the largest: a broken network would score as many images as class 0 has.
    """
    return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), -1).astype(jnp.int32)


def all_finite(state: TrainState) -> jax.Array:
    """Whether all floating-point values of the state are finite; a bool of shape ``[]``."""
    floats = [value for value in jax.tree.leaves(state) if jnp.issubdtype(value.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(value).all() for value in floats]).all()
