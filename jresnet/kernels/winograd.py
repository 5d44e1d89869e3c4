"""3x3 convolutions at stride 1, and their gradients, with 16 products a channel for four pixels instead of 36.

Winograd's minimal filtering (Lavin & Gray 2016, arXiv:1509.09308, section 4.1), two by two pixels of output at a time. In
one direction, four pixels x and three taps k make two pixels of output y from four products instead of six::

    m = (x0 - x2) k0,  (x1 + x2) (k0 + k1 + k2) / 2,  (x2 - x1) (k0 - k1 + k2) / 2,  (x1 - x3) k2
    y = m0 + m1 + m2,  m1 - m2 - m3

and the taps' gradient, of three numbers, comes from the same four of x and two pixels of y's gradient d::

    m = (x0 - x2) d0,  (x1 + x2) (d0 + d1) / 2,  (x2 - x1) (d0 - d1) / 2,  (x3 - x1) d1
    k = m0 + m1 + m2,  m1 - m2,  m1 + m2 + m3

Both directions one after the other make 16 products of 4 by 4 numbers, each of which is a matrix product over the channels.
There is no factor but 1/2, so that rounding errors stay of the size of the direct sum's; those of larger windows do not.

Arrays are NHWC and HWIO, with one pixel of zeros around the images; as many channels come out as go in. ``piece`` is how
many bytes of transformed pixels, which are four times the pixels, are made at a time, of a product's two operands together,
so that they stay in the cache.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def convolve(x: jax.Array, taps: jax.Array | np.ndarray, piece: int) -> jax.Array:
    """[N, H, W, C] by :func:`transformed` taps [16, C, C] -> [N, H, W, C]."""
    return _convolve(x, taps, 1, piece)


def input_gradient(dy: jax.Array, kernel: jax.Array, piece: int) -> jax.Array:
    """:func:`convolve`'s gradient in x: dy [N, H, W, C] by [3, 3, C, C] -> [N, H, W, C]."""
    return _convolve(dy, transformed(kernel, turned=True), 2, piece)  # over what were the outputs


def kernel_gradient(x: jax.Array, dy: jax.Array, piece: int) -> jax.Array:
    """:func:`convolve`'s gradient in the kernel: two of [N, H, W, C] -> [3, 3, C, C]."""
    zeros = jnp.zeros((16, x.shape[-1], dy.shape[-1]), x.dtype)
    images = _images(x, piece // 2)  # of two operands

    def add_piece(i, total):
        windows, pairs = (lax.dynamic_slice_in_dim(a, i * images, images) for a in (x, dy))
        windows, pairs = lax.optimization_barrier((_windows(windows), _pairs(pairs)))
        return total + lax.dot_general(windows, pairs, (((1,), (1,)), ((0,), (0,))))

    def gather(a, b, c, d):
        even, odd = 0.5 * (b + c), 0.5 * (b - c)
        return jnp.stack([a + even, odd, even + d])

    products = lax.fori_loop(0, len(x) // images, add_piece, zeros).reshape(4, 4, *zeros.shape[1:])  # [column, row]
    columns = lax.optimization_barrier(gather(*products))  # [tap's column, row, C, C]
    return gather(*columns.swapaxes(0, 1))


def transformed(kernel: Any, turned: bool = False) -> Any:
    """[3, 3, C, C], of JAX or of numpy -> [16, C, C], and of the kernel turned round."""
    numpy = isinstance(kernel, np.ndarray)

    def spread(a, b, c):
        ends, middle = 0.5 * (a + c), 0.5 * b
        return (np if numpy else jnp).stack([a, ends + middle, ends - middle, c])

    order = (2, 1, 0) if turned else (0, 1, 2)
    rows = spread(*(kernel[i] for i in order))  # [row, tap's column, C, C]
    rows = rows if numpy else lax.optimization_barrier(rows)
    return spread(*(rows[:, j] for j in order)).reshape(16, *kernel.shape[2:])  # by column, then row


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor up to ``most``, at least 1."""
    return max(d for d in range(1, number + 1) if number % d == 0 and (d <= most or d == 1))


def _images(x, piece):
    """How many at a time: a divisor of the batch."""
    windows = -(-x.shape[1] // 2) * -(-x.shape[2] // 2)
    return largest_divisor(len(x), piece // (16 * windows * x.shape[3] * x.dtype.itemsize))


def _convolve(x, taps, contracted, piece):
    images = _images(x, piece)

    def add_piece(i, y):  # in the place of the pixels that it is made of: where these are done with, nothing is copied
        done = _convolve_piece(lax.dynamic_slice_in_dim(y, i * images, images), taps, contracted)
        return lax.dynamic_update_slice_in_dim(y, done, i * images, 0)

    if images == len(x):
        return _convolve_piece(x, taps, contracted)
    return lax.fori_loop(0, len(x) // images, add_piece, x)


def _convolve_piece(x, taps, contracted):
    n, height, width, _ = x.shape
    products = lax.dot_general(_windows(x), taps, (((2,), (contracted,)), ((0,), (0,))))

    def gather(a, b, c, d):
        return a + b + c, b - c - d

    rows, columns = -(-height // 2), -(-width // 2)
    half = [gather(*column) for column in products.reshape(4, 4, n, rows, columns, -1)]  # [column][row of the pair]
    y = jnp.stack([jnp.stack(gather(*row), 3) for row in zip(*half, strict=True)], 2)
    return y.reshape(n, 2 * rows, 2 * columns, -1)[:, :height, :width]


def _windows(x):
    """[N, H, W, C] -> [16, windows, C]: four by four pixels for every two by two of output, transformed."""
    height, width, channels = x.shape[1:]
    rows, columns = 2 * (-(-height // 2)), 2 * (-(-width // 2))
    x = jnp.pad(x, ((0, 0), (1, rows + 1 - height), (1, columns + 1 - width), (0, 0)))

    def spread(a, b, c, d):
        return jnp.stack([a - c, b + c, c - b, b - d])

    # One direction after the other: without the barrier XLA computes the first anew, four times, inside the second.
    x = lax.optimization_barrier(spread(*(x[:, i : i + rows - 1 : 2] for i in range(4))))
    return spread(*(x[:, :, :, j : j + columns - 1 : 2] for j in range(4))).reshape(16, -1, channels)


def _pairs(dy):
    """[N, H, W, C] -> [16, windows, C]: two by two pixels of the output's gradient, transformed."""
    height, width, channels = dy.shape[1:]
    dy = jnp.pad(dy, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))

    def spread(a, b):
        return jnp.stack([a, a + b, a - b, -b])

    dy = lax.optimization_barrier(spread(dy[:, ::2], dy[:, 1::2]))
    return spread(dy[:, :, :, ::2], dy[:, :, :, 1::2]).reshape(16, -1, channels)
