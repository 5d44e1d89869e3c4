"""Explains a model's predictions: heat maps (:func:`grad_cam`) and pixel attributions (:func:`integrated_gradients`).

Both accept any model whose head returns logits, including fused ones (:func:`jresnet.fuse`). They always run the model in
evaluation mode. They work inside ``jax.jit`` if the model is closed over.
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
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): a map of the pixels that support a class.

    The map is the weighted sum of the channels of a layer's output. A channel's weight is the gradient of the logit,
    averaged over the channel's pixels. Negative values are set to 0. Each map is scaled to the range 0 to 1 and enlarged
    linearly to the images' size, as in the PyTorch package ``grad-cam``.

    >>> import jax.numpy as jnp, jresnet
    >>> jresnet.explain.grad_cam(jresnet.create("resnet20_cifar"), jnp.ones((2, 32, 32, 3)), classes=3).shape
    (2, 32, 32)

    Args:
        model: a model with a head.
        images: normalised floating-point images ``[N, H, W, C]``.
        classes: one class index for all images, or one per image; ``None``: the predicted classes.
        layer: name of a stage or block, as in :meth:`ResNet.features`; ``None``: the last stage.

    Returns:
        Maps ``[N, H, W]`` with values from 0 to 1; 0 where nothing supports the class.

    Raises:
        InputError: the model has no such class or layer, or has no head. Other errors as in calling the model.
    """
    layer = layer or f"layer{len(model.config.depths)}"
    images = checked(images, model.config.in_channels)
    return _maps(*nnx.split(model), images, _wanted(model, images, classes), layer)


# Not nnx.jit: it writes to the model's variables, which fails inside a jit of the caller.
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
    return maps / (1e-7 + maps.max((1, 2), keepdims=True))  # 1e-7 as in grad-cam; avoids 0 / 0 for a map of zeros


def integrated_gradients(
    model: ResNet,
    images: Images,
    classes: Classes | None = None,
    steps: int = 50,
    baseline: Images | float = 0.0,
) -> Float[Array, "n h w c"]:
    """Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365): the contribution of each pixel value to a logit.

    The attribution is (image - baseline) times the mean gradient along the straight line from the baseline to the image,
    integrated by the midpoint rule. The attributions of an image sum to its logit minus the baseline's, up to the error of
    the midpoint rule, which decreases with more steps.

    Args:
        model: a model with a head.
        images: normalised floating-point images ``[N, H, W, C]``.
        classes: one class index for all images, or one per image; ``None``: the predicted classes.
        steps: number of gradients; each costs about as much as a training step on these images.
        baseline: neutral images of the same shape, or one number; 0 is the mean colour of normalised images.

    Returns:
        Attributions of the images' shape ``[N, H, W, C]``.

    Raises:
        InputError: ``steps`` is below 1, the model has no such class, or has no head. Other errors as in calling the model.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"steps must be a whole number of at least 1, got {steps!r}")
    images = checked(images, model.config.in_channels)
    away = images - jnp.asarray(baseline, images.dtype)
    if away.shape != images.shape:
        raise InputError(
            f"baseline must be a number or have the images' shape {images.shape}, got shape {jnp.shape(baseline)}"
        )
    classes = _wanted(model, images, classes)
    graph, state = nnx.split(model)
    if classes is None:
        classes = _logits(graph, state, images).argmax(-1)  # the image's class, also for the points along the line
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
    """The classes as an array with one index per image; None means the predicted classes."""
    if model.fc is None:
        raise InputError("this model has no head and therefore no classes to explain")
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
