"""Why a model decides as it does: heat maps (:func:`grad_cam`) and shares of pixels (:func:`integrated_gradients`).

Both take a model of any head with logits, fused ones (:func:`jresnet.fuse`) included, in evaluation, whatever its mode. They
work inside ``jax.jit``, with the model closed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jresnet.errors import InputError
from jresnet.models.layers import Images
from jresnet.models.resnet import ResNet, checked

Classes = int | Sequence[int] | Int[Array, " n"] | Int[np.ndarray, " n"]


def grad_cam(
    model: ResNet, images: Images, classes: Classes | None = None, layer: str | None = None
) -> Float[Array, "n h w"]:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): where in an image a class is seen.

    The channels of a layer's output are added up, each weighted by the mean of the logit's gradient over its pixels; what is
    below 0 is left out, and each map is scaled to 0 to 1 and enlarged linearly, as the PyTorch package ``grad-cam`` does.

    >>> import jax.numpy as jnp, jresnet
    >>> jresnet.explain.grad_cam(jresnet.create("resnet20_cifar"), jnp.ones((2, 32, 32, 3)), classes=3).shape
    (2, 32, 32)

    Args:
        model: with a head.
        images: normalised, ``[N, H, W, C]``.
        classes: one for all images or one for each; ``None``: those that the model predicts.
        layer: a stage or block, as of :meth:`ResNet.features`; ``None``: the last stage.

    Returns:
        Maps in 0 to 1, a pixel for each of the images'; a map is 0 where nothing speaks for the class.

    Raises:
        InputError: for a class or layer that the model has not, or a model without a head. Others as the model's call.
    """
    layer = layer or f"layer{len(model.config.depths)}"
    images = checked(images, model.config.in_channels)
    return _maps(*nnx.split(model), images, _wanted(model, images, classes), layer)


# Not nnx.jit, which would write the model's variables: inside a jit of the caller's they would be lost.
@partial(jax.jit, static_argnames=("graph", "layer"))
def _maps(graph: nnx.GraphDef, state: nnx.State, images: jax.Array, classes: jax.Array | None, layer: str) -> jax.Array:
    model = nnx.merge(graph, state)
    outputs = model.features(images, False, layer)[layer]
    logits, pull = jax.vjp(lambda outputs: model.logits_from(layer, outputs, False), outputs)
    (slopes,) = pull(_one_hot(logits, classes))
    weights = slopes.mean((1, 2), keepdims=True)
    maps = _scaled(jnp.maximum((weights * outputs).sum(-1), 0))
    return _scaled(jax.image.resize(maps, images.shape[:3], "linear", antialias=False))


def _scaled(maps: jax.Array) -> jax.Array:
    maps = maps - maps.min((1, 2), keepdims=True)
    return maps / (1e-7 + maps.max((1, 2), keepdims=True))  # grad-cam's 1e-7, for maps that are 0


def integrated_gradients(
    model: ResNet,
    images: Images,
    classes: Classes | None = None,
    steps: int = 50,
    baseline: Images | float = 0.0,
) -> Float[Array, "n h w c"]:
    """Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365): what each number of an image adds to a logit.

    (image - baseline) times the mean gradient along the straight line from the baseline, by the midpoint rule. Complete: an
    image's shares sum to its logit less the baseline's, but for the rule's error, which falls with more steps.

    Args:
        model: with a head.
        images: normalised, ``[N, H, W, C]``.
        classes: one for all images or one for each; ``None``: those that the model predicts.
        steps: gradients, each of the cost of a training step of these images.
        baseline: images or a number that say nothing: 0 is the mean colour of normalised images.

    Raises:
        InputError: for fewer steps than 1, a class that the model has not, or a model without a head. Others as its call.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"steps must be a whole number of at least 1, got {steps!r}")
    images = checked(images, model.config.in_channels)
    away = images - jnp.asarray(baseline, images.dtype)
    if away.shape != images.shape:
        raise InputError(
            f"baseline must be a number or like the images {images.shape}, got shape {jnp.shape(baseline)}"
        )
    classes = _wanted(model, images, classes)
    graph, state = nnx.split(model)
    if classes is None:
        classes = _logits(graph, state, images).argmax(-1)  # of the image itself, all along the line
    total = jnp.zeros_like(images)
    for step in range(steps):
        total += _slopes(graph, state, images - away * (1 - (step + 0.5) / steps), classes)
    return away * total / steps


@partial(jax.jit, static_argnames="graph")
def _logits(graph: nnx.GraphDef, state: nnx.State, images: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(images, train=False)


@partial(jax.jit, static_argnames="graph")
def _slopes(graph: nnx.GraphDef, state: nnx.State, images: jax.Array, classes: jax.Array) -> jax.Array:
    logits, pull = jax.vjp(lambda images: _logits(graph, state, images), images)
    return pull(_one_hot(logits, classes))[0]


def _one_hot(logits: jax.Array, classes: jax.Array | None) -> jax.Array:
    classes = logits.argmax(-1) if classes is None else classes
    return jax.nn.one_hot(classes, logits.shape[-1], dtype=logits.dtype)


def _wanted(model: ResNet, images: jax.Array, classes: Classes | None) -> jax.Array | None:
    """The classes as an array, one for each image; None where they are those predicted."""
    if model.fc is None:
        raise InputError("this model has no head, and so no classes to explain")
    if classes is None:
        return None
    found = jnp.asarray(classes)
    if found.shape not in ((), images.shape[:1]) or not jnp.issubdtype(found.dtype, jnp.integer):
        raise InputError(f"classes must be a whole number or one for each of {len(images)} images, got {classes!r}")
    graph, state = nnx.split(model)
    count = jax.eval_shape(partial(_logits, graph), state, images).shape[-1]
    if not isinstance(found, jax.core.Tracer) and not bool(((found >= 0) & (found < count)).all()):
        raise InputError(f"classes must be from 0 to {count - 1}, got {classes!r}")
    return jnp.broadcast_to(found, images.shape[:1])
