"""When XLA's CPU compiler computes what: sums of residuals, ReLUs, and a batch in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jresnet.kernels.platforms import Kernel, known

# Bytes of the first stage's output at a time in inference: 2 images of 224 pixels for ResNet-50, 64 of 32 for ResNet-20, by
# measurement, so that a layer finds in the cache what the one before it left.
BATCH_PIECE = 7 * 2**20


def _relu_on_cpu(x: jax.Array, *, devices: int) -> jax.Array:
    """bfloat16 goes through float32, where XLA computes it so anyway: written so, XLA hands it to oneDNN together with the
    convolution before it.
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
    """max(x, 0) as ``torch.relu``, whose derivative at 0 is 0."""
    return _relu(x)


@relu.defjvp
def _relu_derivative(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _relu(x), jnp.where(x > 0, dx, 0)


@jax.custom_jvp
def add_relu(y: jax.Array, shortcut: jax.Array) -> jax.Array:
    """relu(y + shortcut), a block's output.

    On the CPU ``shortcut`` comes from behind a barrier: so XLA sees no other reader, and has oneDNN's convolution add to it
    where it lies. Else the sum goes to memory of its own, which makes every such 1x1 convolution a tenth slower.

    Where it is differentiated, it is the output that lies behind a barrier there, and so does its gradient. Without it XLA's
    CPU compiler computes a block's output anew in every fusion that reads it, from the block's input, and that from the one
    before: ResNet-110's step took 1.98 s instead of 1.29.
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
    # The size, of the larger half, that leaves the fewest to fill up.
    images = min(range(most, most // 2, -1), key=lambda size: -batch % size)
    pieces = jnp.pad(x, [(0, -batch % images), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, images, *x.shape[1:])
    y = lax.map(lambda piece: function(piece, *weights), pieces)
    return y.reshape(pieces.shape[0] * images, -1)[:batch]


_by_pieces = Kernel("in_pieces", _whole, _by_pieces_on_cpu)
# A network is traced when its program is lowered, once, and for images of the size that is then chosen.
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
    """``function(x, *weights)``, inside jit on a CPU some images at a time, the last ones filled up by zeros.

    So each layer finds in the cache what the one before it left.

    Args:
        function: of images, one by one, ``[n, ...] -> [n, classes]``; it closes over no array that jit traces.
        x: ``[N, ...]``.
        weights: arrays that jit traces.
        outputs: number of classes, and the result's dtype.
        bytes_an_image: of what ``function`` makes on the way, to be held against ``BATCH_PIECE``.
    """
    if not isinstance(x, jax.core.Tracer):
        return function(x, *weights)
    return _by_pieces(x, *weights, function=function, outputs=outputs, bytes_an_image=bytes_an_image)
