"""3x3 convolutions at stride 1 and their gradients by Winograd's algorithm.

Winograd's minimal filtering (Lavin & Gray 2016, arXiv:1509.09308, section 4.1) computes 2x2 pixels of output at a time with
16 products per channel instead of 36. In one dimension, two output pixels y are computed from four pixels x and three taps
k with four products instead of six::

    m = (x0 - x2) k0,  (x1 + x2) (k0 + k1 + k2) / 2,  (x2 - x1) (k0 - k1 + k2) / 2,  (x1 - x3) k2
    y = m0 + m1 + m2,  m1 - m2 - m3

and the gradient of the three taps is computed from the same four pixels x and two pixels of y's gradient d::

    m = (x0 - x2) d0,  (x1 + x2) (d0 + d1) / 2,  (x2 - x1) (d0 - d1) / 2,  (x3 - x1) d1
    k = m0 + m1 + m2,  m1 - m2,  m1 + m2 + m3

Both dimensions together give 16 products of 4x4 values, each of which is a matrix product over the channels. The only factor
is 1/2, so that rounding errors are about as large as those of a direct sum, unlike with larger windows.

Arrays are NHWC and HWIO, images are padded by one pixel of zeros, and the numbers of input and output channels are equal.
``piece`` is the number of bytes of transformed pixels, which take four times the memory of the pixels, that are processed at
a time so that they stay in the cache; it includes both operands of a product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def convolve(x: jax.Array, taps: jax.Array | np.ndarray, piece: int) -> jax.Array:
    """Convolves [N, H, W, C] with :func:`transformed` taps [16, C, C] to [N, H, W, C]."""
    return _convolve(x, taps, 1, piece)


def input_gradient(dy: jax.Array, kernel: jax.Array, piece: int) -> jax.Array:
    """The gradient of :func:`convolve` with respect to x: from dy [N, H, W, C] and kernel [3, 3, C, C] to [N, H, W, C]."""
    return _convolve(dy, transformed(kernel, turned=True), 2, piece)  # contracts over the output channels


def kernel_gradient(x: jax.Array, dy: jax.Array, piece: int) -> jax.Array:
    """The gradient of :func:`convolve` with respect to the kernel: from x and dy, [N, H, W, C] each, to [3, 3, C, C]."""
    zeros = jnp.zeros((16, x.shape[-1], dy.shape[-1]), x.dtype)
    images = _images(x, piece // 2)  # half for each operand

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
    """Transforms a JAX or numpy kernel [3, 3, C, C] to [16, C, C]; flips it first if ``turned``."""
    numpy = isinstance(kernel, np.ndarray)

    def spread(a, b, c):
        ends, middle = 0.5 * (a + c), 0.5 * b
        return (np if numpy else jnp).stack([a, ends + middle, ends - middle, c])

    order = (2, 1, 0) if turned else (0, 1, 2)
    rows = spread(*(kernel[i] for i in order))  # [row, tap's column, C, C]
    rows = rows if numpy else lax.optimization_barrier(rows)
    return spread(*(rows[:, j] for j in order)).reshape(16, *kernel.shape[2:])  # by column, then row


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` up to ``most``, at least 1."""
    return max(d for d in range(1, number + 1) if number % d == 0 and (d <= most or d == 1))


def _images(x, piece):
    """The number of images to process at a time, a divisor of the batch."""
    windows = -(-x.shape[1] // 2) * -(-x.shape[2] // 2)
    return largest_divisor(len(x), piece // (16 * windows * x.shape[3] * x.dtype.itemsize))


def _convolve(x, taps, contracted, piece):
    images = _images(x, piece)

    def add_piece(i, y):  # overwrites its input pixels, so that nothing is copied if these are not used any more
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
    """Transforms [N, H, W, C] to [16, windows, C]: 4x4 pixels for each 2x2 pixels of output."""
    height, width, channels = x.shape[1:]
    rows, columns = 2 * (-(-height // 2)), 2 * (-(-width // 2))
    x = jnp.pad(x, ((0, 0), (1, rows + 1 - height), (1, columns + 1 - width), (0, 0)))

    def spread(a, b, c, d):
        return jnp.stack([a - c, b + c, c - b, b - d])

    # The barrier between the two dimensions keeps XLA from recomputing the first four times inside the second.
    x = lax.optimization_barrier(spread(*(x[:, i : i + rows - 1 : 2] for i in range(4))))
    return spread(*(x[:, :, :, j : j + columns - 1 : 2] for j in range(4))).reshape(16, -1, channels)


def _pairs(dy):
    """Transforms [N, H, W, C] to [16, windows, C]: 2x2 pixels of the output's gradient."""
    height, width, channels = dy.shape[1:]
    dy = jnp.pad(dy, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))

    def spread(a, b):
        return jnp.stack([a, a + b, a - b, -b])

    dy = lax.optimization_barrier(spread(dy[:, ::2], dy[:, 1::2]))
    return spread(dy[:, :, :, ::2], dy[:, :, :, 1::2]).reshape(16, -1, channels)
