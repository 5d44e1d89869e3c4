"""Controls what XLA's CPU compiler fuses and in which order it computes: residual sums, ReLUs, batches in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jresnet.kernels.platforms import Kernel, known

# Bytes of the first stage's output at a time in inference, chosen by measurement so that each layer finds its input in the
# cache: 2 images of 224 pixels for ResNet-50, 64 images of 32 pixels for ResNet-20.
BATCH_PIECE = 7 * 2**20


def _relu_on_cpu(x: jax.Array, *, devices: int) -> jax.Array:
    """ReLU on a CPU. bfloat16 is converted to float32 explicitly, as XLA does anyway: in this form, XLA passes it to oneDNN
    together with the preceding convolution.
    """
    if x.dtype == jnp.bfloat16:
        return jnp.maximum(x.astype(jnp.float32), 0).astype(x.dtype)
    return jnp.maximum(x, 0)


_relu = Kernel("relu", lambda x: jnp.maximum(x, 0), _relu_on_cpu)
# x, behind a barrier on the CPU
_once = Kernel("computed_once", lambda x: x, lambda x, *, devices: lax.optimization_barrier(x))
_once.multilinear(lambda dy, *, argument: _once(dy))


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0) with derivative 0 at 0, as ``torch.relu``."""
    return _relu(x)


@relu.defjvp
def _relu_derivative(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _relu(x), jnp.where(x > 0, dx, 0)


@jax.custom_jvp
def add_relu(y: jax.Array, shortcut: jax.Array) -> jax.Array:
    """The output of a block: relu(y + shortcut).

    On the CPU there is a barrier after ``shortcut``. So XLA sees no other use of it, and oneDNN's convolution adds to it in
    place. Otherwise the sum would need separate memory, which makes such 1x1 convolutions a tenth slower.

    If it is differentiated, the barriers are after the output and after its gradient instead. Without them, XLA's CPU
    compiler recomputes a block's output in every fusion that uses it, recursively from the inputs of earlier blocks: a step
    of ResNet-110 took 1.98 s instead of 1.29 s.
    """
    return _relu(y + _once(shortcut))


@add_relu.defjvp
def _add_relu_derivative(primals, tangents):
    y = _once(_relu(primals[0] + primals[1]))
    return y, _once(jnp.where(y > 0, tangents[0] + tangents[1], 0))


def _whole(x: jax.Array, *weights: jax.Array, function: Callable[..., jax.Array], **_: Any) -> jax.Array:
    return function(x, *weights)


def _by_pieces_on_cpu(
    x: jax.Array,
    *weights: jax.Array,
    function: Callable[..., jax.Array],
    outputs: tuple[int, Any],
    bytes_an_image: int,
    devices: int,
) -> jax.Array:
    if not known(*x.shape):
        return function(x, *weights)
    batch, most = len(x), max(1, BATCH_PIECE // max(1, bytes_an_image))
    if batch <= most or devices > 1:
        return function(x, *weights)
    # Among the sizes above half of the limit, the one that needs the least padding.
    images = min(range(most, most // 2, -1), key=lambda size: -batch % size)
    pieces = jnp.pad(x, [(0, -batch % images), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, images, *x.shape[1:])
    y = lax.map(lambda piece: function(piece, *weights), pieces)
    return y.reshape(pieces.shape[0] * images, -1)[:batch]


_by_pieces = Kernel("in_pieces", _whole, _by_pieces_on_cpu)
# The network is traced only once, when its program is lowered, for the number of images that is chosen then.
_by_pieces.primitive.def_abstract_eval(
    lambda x, *weights, outputs, **_: jax.core.ShapedArray((x.shape[0], outputs[0]), outputs[1])
)
_by_pieces.primitive.def_impl(lambda x, *weights, function, **_: function(x, *weights))


def in_pieces(
    function: Callable[..., jax.Array],
    x: jax.Array,
    *weights: jax.Array,
    outputs: tuple[int, DTypeLike],
    bytes_an_image: int,
) -> jax.Array:
    """Computes ``function(x, *weights)``; inside jit on a CPU a few images at a time, with zero padding at the end.

    So each layer finds its input in the cache.

    Args:
        function: a function ``[n, ...] -> [n, classes]`` that treats images independently and closes over no traced array.
        x: images ``[N, ...]``.
        weights: traced arrays.
        outputs: number of classes, and the dtype of the result.
        bytes_an_image: size of the largest intermediate result per image, compared with ``BATCH_PIECE``.
    """
    if not isinstance(x, jax.core.Tracer):
        return function(x, *weights)
    return _by_pieces(x, *weights, function=function, outputs=outputs, bytes_an_image=bytes_an_image)
