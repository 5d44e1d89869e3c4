"""Convolution, batch normalisation and max-pool on a CPU, with gradients of our own in training, all in plain JAX.

**3x3 convolutions at stride 1** of 64 channels or more, in float32, take 16 products a channel for four pixels instead of 36
inside a jitted function, by Winograd's algorithm (:mod:`jresnet.kernels.winograd`), and so do their gradients.

**Convolutions' other gradients.** XLA's CPU compiler runs a forward convolution near the speed of a matrix product, but
turns its gradients into convolutions that fit that code badly: the kernel's gradient has the whole image as its window and
the whole batch as its channels, and a strided convolution's input gradient multiplies by the zeros between the pixels. What
is done instead:

===============  ==============================  ==========================================================================
gradient         of                              computed as
===============  ==============================  ==========================================================================
either           3x3 at stride 1, 64 channels    by Winograd's algorithm, in float32
either           images of fewer pixels than     JAX's, of one matrix product of all the image's pixels
                 the kernel has taps
kernel           1x1                             one matrix product of pixels, after the stride's slice
kernel           others to under 8x8 pixels      XLA's own: such a window fits, and nothing is copied
kernel           others of 3x3 at stride 1       pieces of the batch: x shifted along the rows by a matrix product with dy
                                                 shifted along the columns, so that neither is copied nine times
kernel           above 3x3 (the stem)            pieces of the batch: x shifted along the rows by a matrix product for each
                                                 row tap, for which whole rows are copied
kernel           any other                       pieces of the batch: all shifts of x side by side by a matrix product
input            any other                       one convolution for each phase of the stride, with the taps turned round
either           groups above 1                  the kernel in up to eight pieces of the batch by XLA, the input by XLA
===============  ==============================  ==========================================================================

A piece's shifted copies stay in the cache; the pieces run in a loop, so that compilation does not grow with their number.
Pieces of a kernel's gradient are summed in float32 at least.

**Batch normalisation.** A sum over N, H and W of something computed on the way runs on one core and pixel by pixel, since
XLA gives each core a part of the result and the result is one row of channels. Summed over H first, everything is read in
order by all cores. The gradient's rule here needs two such sums.

**Max-pool.** The maxima of rows, then those of columns, instead of XLA's of windows. XLA scatters the gradient, pixel by
pixel, after a search for the maxima that it has already found. In training each window remembers which of its pixels won,
and a pixel asks the windows that see it, one to four by its phase of the stride.

**Inference.** A fused network takes a batch a few images at a time (:func:`in_pieces`), and each block adds its output where
its input lies (:func:`jresnet.models.layers.added_in_place`).

**Sums of residuals.** A barrier behind every block (:func:`jresnet.models.layers.computed_once`) keeps XLA from computing a block's
output anew, and all outputs before it, wherever it is read.

The price is that forward-mode differentiation (``jax.jvp``) does not reach through a model in training on the CPU.

**Compiler options.** :func:`compiler_options` has what ``jax.jit`` is given besides, by jax's version.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jresnet.errors import InputError
from jresnet.kernels import winograd

PIECE = 2**22  # bytes of shifted copies at a time: beyond the second-level cache, well inside the third
# Bytes of the first stage's output at a time in inference: 2 images of 224 pixels for ResNet-50, 64 of 32 for ResNet-20, by
# measurement, so that a layer finds in the cache what the one before it left.
BATCH_PIECE = 7 * 2**20
SMALL = 8  # pixels a side, under which XLA's own gradient of a kernel is the faster, by measurement
# By Winograd's algorithm, which was the faster, by measurement, from so many channels and windows of two by two pixels on:
# with fewer channels moving the pixels costs more than the products save, with fewer windows transforming the kernel does.
WINOGRAD_CHANNELS, WINOGRAD_WINDOWS = 64, 48

# Which library XLA hands convolutions and matrix products to, by jax's version: YNN, Eigen (where YNN gets nothing), or
# oneDNN. A version that is not named gets XLA's own choice: each of these was faster in training and in inference, with
# AVX2 and with AVX-512 (docs/speed.md).
YNN = "xla_cpu_experimental_ynn_fusion_type"
ONEDNN = "xla_cpu_experimental_onednn_custom_call"
Options = dict[str, str | bool]
SOME_YNN: Options = {YNN: "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_ELTWISE,LIBRARY_FUSION_TYPE_REDUCE"}
# XLA's CPU compiler drops optimization barriers and then merges what comes twice, so that it keeps what remat would compute
# again. Without this pass it keeps them. 0.10.1 drops those behind the blocks, too, and always has this; 0.12.0.1 does not.
BARRIERS: Options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
OPTIONS: dict[str, Options] = {
    "0.10.1": SOME_YNN | BARRIERS,
    "0.12.0.1": {YNN: "", ONEDNN: True},
}


def compiler_options(remat: bool = False) -> Options:
    """The options with which XLA's CPU compiler makes the fastest programs of these networks, for ``jax.jit``.

    >>> import jax, jresnet
    >>> model = jresnet.fuse(jresnet.create("resnet20_cifar"))
    >>> predict = jax.jit(model, compiler_options=jresnet.compiler_options())

    (So the weights are constants of the program, which oneDNN need not pack in every call.)

    They choose among XLA's implementations of the same operations: results differ by rounding. Programs with oneDNN's, which
    are those of jax 0.12.0.1, do not outlive their process in JAX's compilation cache, which warns of each and goes on.
    ``JRESNET_COMPILER_OPTIONS=off`` switches them off, but for ``remat``'s, without which it saves nothing.

    Args:
        remat: for training a model that was created with ``remat=True``.

    Returns:
        What ``jax.jit`` takes: nothing where JAX's default device is no CPU; for ``remat`` alone with a version of jax that
        was not measured.

    Raises:
        InputError: for another value of ``JRESNET_COMPILER_OPTIONS`` than ``on`` and ``off``.
    """
    switch = os.environ.get("JRESNET_COMPILER_OPTIONS", "on")
    if switch not in ("on", "off"):
        raise InputError(f"JRESNET_COMPILER_OPTIONS must be on or off, got {switch!r}")
    if jax.default_backend() != "cpu":
        return {}
    chosen = OPTIONS.get(jax.__version__, {}) if switch == "on" else {}
    return chosen | (BARRIERS if remat else {})


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> jax.Array:
    """NHWC by HWIO, with ``padding`` zeros on every side, by XLA alone."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def convolve_on_cpu(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> jax.Array:
    """:func:`convolve`, by Winograd's algorithm where that is faster. Its derivatives are XLA's.

    Rounding errors are of the same size, since for two pixels at a time it has no factor but 1/2. What is not a number, or
    infinite, reaches up to two pixels further. An image of fewer pixels than the kernel has taps goes by one matrix product.
    """
    if _fewer_pixels_than_taps(x, kernel, groups):
        return _by_one_product(x, kernel, stride, padding)
    direct = partial(convolve, stride=stride, padding=padding, groups=groups)
    if not _winograd_pays(x, kernel, stride, padding, groups):
        return direct(x, kernel)
    if isinstance(kernel, jax.core.Tracer):
        faster = jax.custom_jvp(lambda x, kernel: winograd.convolve(x, winograd.transformed(kernel), PIECE))
        faster.defjvp(lambda primals, tangents: jax.jvp(direct, primals, tangents))
        return faster(x, kernel)
    taps = winograd.transformed(np.asarray(kernel, np.float64)).astype(kernel.dtype)  # now, not by XLA
    faster = jax.custom_jvp(lambda x: winograd.convolve(x, taps, PIECE))
    faster.defjvp(lambda x, dx: jax.jvp(partial(direct, kernel=kernel), x, dx))
    return faster(x)


def _fewer_pixels_than_taps(x, kernel, groups):
    pixels = x.shape[1:3]
    return (
        groups == 1
        and all(isinstance(size, int) for size in pixels)
        and math.prod(pixels) < math.prod(kernel.shape[:2])
    )


def _by_one_product(x, kernel, stride, padding):
    """Every pixel of the output from all pixels of a small image, by the tap that lies between them.

    XLA would have image and kernel change places, and run what that gives pixel by pixel.
    """
    n, height, width, channels = x.shape
    k, out, dtype, numpy = kernel.shape[0], kernel.shape[3], kernel.dtype, jnp
    if not isinstance(kernel, jax.core.Tracer):  # now, not by XLA
        kernel, numpy = np.asarray(kernel, np.float64), np
    rows, columns = (max(0, (size + 2 * padding - k) // stride + 1) for size in (height, width))

    def between(size, length):  # [pixel, output's pixel, tap]
        tap = np.arange(size)[:, None] + padding - stride * np.arange(length)
        return np.asarray(tap[..., None] == np.arange(k), kernel.dtype)

    taps = numpy.einsum("hri,wcj,ijxy->hwxrcy", between(height, rows), between(width, columns), kernel, optimize=True)
    taps = taps.reshape(height * width * channels, -1).astype(dtype)
    y = x.reshape(n, height * width * channels) @ taps
    return y.reshape(n, rows, columns, out)


def _winograd_pays(x, kernel, stride, padding, groups):
    n, height, width, channels = x.shape
    same = kernel.shape == (3, 3, channels, channels) and (stride, padding, groups) == (1, 1, 1)
    # Outside jit each step would be a call. A batch without a number is one that is exported. Over several devices XLA
    # shares out its own convolutions, not a loop.
    known = isinstance(x, jax.core.Tracer) and isinstance(n, int) and jax.device_count() == 1
    if not (same and known and x.dtype == jnp.float32) or channels < WINOGRAD_CHANNELS or min(height, width) < 4:
        return False
    return n * -(-height // 2) * -(-width // 2) >= WINOGRAD_WINDOWS


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve_to_train(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> jax.Array:
    """:func:`convolve_on_cpu` with the gradients of the table above."""
    return convolve_on_cpu(x, kernel, stride, padding, groups)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _forward(x, kernel, stride, padding, groups):
    return convolve_on_cpu(x, kernel, stride, padding, groups), (x, kernel)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(stride, padding, groups, saved, dy):
    x, kernel = saved
    if _fewer_pixels_than_taps(x, kernel, groups):
        dx, dk = jax.vjp(lambda x, kernel: _by_one_product(x, kernel, stride, padding), x, kernel)[1](dy)
    elif groups > 1:
        dx = _by_xla_input(x, kernel, dy, stride, padding, groups)
        dk = _in_pieces_by_xla(x, kernel, dy, stride, padding, groups)
    else:
        dx = _phases(x, kernel, dy, stride, padding)
        dk = _kernel_gradient(x, kernel, dy, stride, padding)
    return dx, dk.astype(kernel.dtype)


convolve_to_train.defvjp(_forward, _backward)


def _by_xla_input(x, kernel, dy, stride, padding, groups):
    return jax.linear_transpose(lambda x: convolve(x, kernel, stride, padding, groups), x)(dy)[0]


def _by_xla_kernel(x, kernel, dy, stride, padding, groups):
    return jax.linear_transpose(lambda kernel: convolve(x, kernel, stride, padding, groups), kernel)(dy)[0]


def _in_pieces_by_xla(x, kernel, dy, stride, padding, groups):
    # Half a megabyte of input a piece; more than eight pieces cost more compilation than they save time.
    size = max(2**19 // (4 * math.prod(x.shape[1:])), -(-len(x) // 8), 1)
    pieces = [
        _by_xla_kernel(x[start : start + size], kernel, dy[start : start + size], stride, padding, groups)
        for start in range(0, len(x), size)
    ]
    return sum(pieces[1:], pieces[0])


def _phases(x, kernel, dy, stride, padding):
    """The input's gradient: pixels of one phase (row and column modulo the stride) meet every stride-th tap alone."""
    if _winograd_pays(dy, kernel, stride, padding, 1):
        return winograd.input_gradient(dy, kernel, PIECE)
    n, *size, channels = x.shape
    taps = kernel[::-1, ::-1]  # turned round
    rows = []
    for row in range(stride):
        columns = []
        for column in range(stride):
            parts, pads = [], []
            for axis, phase in enumerate((row, column)):
                first = (phase + padding) % stride  # the first tap that meets this phase
                count = -(-(kernel.shape[axis] - first) // stride)
                shift = (phase + padding - first) // stride  # dx[a] = sum over m of dy[a + shift - m] tap[m]
                length = -(-size[axis] // stride)
                last = kernel.shape[axis] - 1 - first  # in the kernel turned round
                parts.append(slice(last % stride, last + 1, stride) if count > 0 else slice(0, 0))
                pads.append((count - 1 - shift, length - 1 + shift - (dy.shape[1 + axis] - 1)))
            # The transposed convolution's kernel. Transposed last: XLA gives oneDNN no kernel that is a reverse, and what is
            # left of bfloat16 it converts to float32.
            sub = taps[parts[0], parts[1]].swapaxes(2, 3)
            if sub.size:
                y = lax.conv_general_dilated(dy, sub, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
            else:
                y = jnp.zeros((n, *(-(-s // stride) for s in size), channels), dy.dtype)
            columns.append(y)
        rows.append(jnp.stack(columns, 3))
    both = jnp.stack(rows, 2)  # [n, h, stride, w, stride, channels]
    return both.reshape(n, both.shape[1] * stride, both.shape[3] * stride, channels)[:, : size[0], : size[1]]


def _kernel_gradient(x, kernel, dy, stride, padding):
    k, _, channels, out = kernel.shape
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    if k == 1 and padding == 0:
        # Without the barrier XLA computes what it has, ReLU and all, once more in the product's shape.
        x, dy = lax.optimization_barrier((x[:, ::stride, ::stride], dy))
        return _product(x, dy, wide).reshape(kernel.shape)
    if _winograd_pays(x, kernel, stride, padding, 1):
        return winograd.kernel_gradient(x, dy, PIECE)
    if max(dy.shape[1:3]) < SMALL:
        return _by_xla_kernel(x, kernel, dy, stride, padding, 1)
    if stride == 1 and k == 3 and padding == 1:
        shifts, copies = _both_shifted, k * (channels + out)
    elif k > 3:
        shifts, copies = _row_by_row, 2 * k * channels
    else:
        shifts, copies = _x_shifted, k * k * channels
    batch, piece = len(x), max(PIECE, kernel.size * wide.itemsize)  # each piece reads and writes the sum, too
    images = _images_in_a_piece(batch, piece // (copies * math.prod(dy.shape[1:3]) * x.dtype.itemsize))
    devices = jax.device_count()
    if devices > 1:  # pieces are taken across the devices' stretches of the batch, so that each image stays where it is
        x, dy = (a.reshape(images, len(a) // images, *a.shape[1:]) for a in (x, dy))

    def add(i, total):
        if devices > 1:
            piece = [lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in (x, dy)]
        else:  # no reshape: XLA would compute x and dy anew in that shape
            piece = [lax.dynamic_slice_in_dim(a, i * images, images) for a in (x, dy)]
        return total + shifts(*piece, k, stride, padding, wide)

    return lax.fori_loop(0, batch // images, add, jnp.zeros(kernel.shape, wide))


def _images_in_a_piece(batch: int, most: int) -> int:
    """The largest divisor of the batch up to ``most``, in whole numbers a device."""
    devices = jax.device_count() if batch % jax.device_count() == 0 else 1
    return devices * winograd.largest_divisor(batch // devices, most // devices)


def _product(a, b, dtype):
    """[images, ..., i] and [images, ..., j] -> [i, j], summed over all pixels.

    Two products of half the images keep cores busier than one. Over several devices the images stay as they lie.
    A product of bfloat16 is rounded to bfloat16, as PyTorch's gradients are: XLA asks oneDNN for no other, and a CPU with
    units for it multiplies twice as fast.
    """
    halves = 2 if len(a) % 2 == 0 and jax.device_count() == 1 else 1
    a, b = (v.reshape(halves, -1, v.shape[-1]) for v in (a, b))
    kept = a.dtype if a.dtype == jnp.bfloat16 else dtype
    products = lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,))), preferred_element_type=kept)
    return products.astype(dtype).sum(0)


def _x_shifted(x, dy, k, stride, padding, dtype):
    """Every tap's view of x side by side, [pixels, k k channels], by dy, [pixels, out]."""
    height, width = (stride * (size - 1) + 1 for size in dy.shape[1:3])
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    views = [x[:, i : i + height : stride, j : j + width : stride] for i in range(k) for j in range(k)]
    # Without the barrier XLA computes the copies inside the product, element by element.
    views = lax.optimization_barrier(jnp.concatenate(views, -1))
    return _product(views, dy, dtype).reshape(k, k, x.shape[-1], dy.shape[-1])


def _row_by_row(x, dy, k, stride, padding, dtype):
    """x shifted along its rows, k copies; the row taps one after the other, which copies whole rows."""
    height, width = (stride * (size - 1) + 1 for size in dy.shape[1:3])
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    xs = lax.optimization_barrier(jnp.concatenate([x[:, :, j : j + width : stride] for j in range(k)], -1))
    taps = jnp.stack([_product(xs[:, i : i + height : stride], dy, dtype) for i in range(k)])
    return taps.reshape(k, k, x.shape[-1], dy.shape[-1])


def _both_shifted(x, dy, k, stride, padding, dtype):
    """For 3x3 at stride 1: x shifted along its rows by dy shifted along its columns, and one product gives all nine taps.

    Tap (i, j) sums x[r, c + j - 1] dy[r - i + 1, c] over all rows r and columns c, both zero outside.
    """
    xs = jnp.concatenate([_shift(x, 2, 1 - j) for j in range(k)], -1)
    dys = jnp.concatenate([_shift(dy, 1, i - 1) for i in range(k)], -1)
    xs, dys = lax.optimization_barrier((xs, dys))
    taps = _product(xs, dys, dtype).reshape(k, x.shape[-1], k, dy.shape[-1])  # [j, channel, i, out]
    return taps.transpose(2, 0, 1, 3)


def _shift(x, axis, by):
    """x moved on by so many places, with zeros in the gap."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(by, -by, 0) if axis == i else (0, 0, 0) for i in range(x.ndim)])


def inverse_sqrt(x: jax.Array) -> jax.Array:
    """1 / sqrt(x) to rounding.

    XLA turns that, however it is written, into an approximation that is off by 1e-7 on the CPU: the same way for every
    pixel of a channel, so that nothing averages it out, and the logits of resnet56_cifar are twice as far from float64's
    as PyTorch's. One Newton step (f(r) = 1/r² - x) brings it back to rounding.
    """
    r = lax.rsqrt(x)
    return r + lax.stop_gradient(0.5 * r * (1 - x * r * r))  # the derivative is rsqrt's own


def _columns(x, narrow):
    """[N, H, W, C] -> [N, W, C], summed over H; the barriers keep XLA from joining sums that follow one another.

    XLA's sum goes number by number over what it computes of a ``narrow`` dtype, at a tenth of the speed, and window by
    window over more than 32 rows, at half of it: there up to eight stretches of rows, as many as divide H, are added before.
    """
    if narrow or x.shape[1] > 32:
        rows = x.shape[1] // max(d for d in range(1, 9) if x.shape[1] % d == 0)
        stretches = [x[:, start : start + rows] for start in range(0, x.shape[1], rows)]
        x = lax.optimization_barrier(sum(stretches[1:], stretches[0]))
    return lax.optimization_barrier(x.sum(1))


def _total(columns):
    """[N, W, C] -> [C], one axis after the other, which is faster and rounds less than both at once."""
    return lax.optimization_barrier(columns.sum(1)).sum(0)


def _sum(x, narrow):
    """[N, H, W, C] -> [C]"""
    return _total(_columns(x, narrow))


def _mean(x, narrow):
    """[N, H, W, C] -> [C].

    Rounding grows along a sum of thousands of numbers that are large against their deviation, as in PyTorch's channels-last
    kernel: a second sum, of the columns less their own mean, takes that back.
    """
    columns = _columns(x, narrow)
    n = math.prod(columns.shape[:-1])
    about = _total(columns) / n
    return (about + _total(columns - about) / n) / x.shape[1]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_to_train(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``x`` normalised over N, H and W, and the batch's mean and biased variance, which carry no gradient.

    Sums and statistics are of the wider of the input's dtype and float32.
    """
    return _normalize_forward(x, scale, bias, eps)[0]


@partial(jax.jit, static_argnums=3)
def _normalize_forward(x, scale, bias, eps):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    n, narrow = math.prod(x.shape[:-1]), x.dtype != wide.dtype
    mean = _mean(wide, narrow)
    # Two passes: E[x²] - E[x]² cancels where the mean is large against the deviation.
    var = _sum(jnp.square(wide - mean), narrow) / n
    inverse = inverse_sqrt(var + eps)
    y = (wide - mean) * (inverse * scale) + bias
    return (y.astype(x.dtype), mean, var), (x, scale, mean, inverse)


@partial(jax.jit, static_argnums=0)
def _normalize_backward(eps, saved, upstream):
    x, scale, mean, inverse = saved
    dy = upstream[0].astype(mean.dtype)
    n, narrow = math.prod(x.shape[:-1]), x.dtype != mean.dtype
    centred = x.astype(mean.dtype) - mean
    dbias = _sum(dy, narrow)
    dscale = _sum(dy * centred, narrow) * inverse
    dx = (dy - dbias / n - centred * (inverse * dscale / n)) * (inverse * scale)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(scale.dtype)


normalize_to_train.defvjp(_normalize_forward, _normalize_backward)


def max_pool_to_train(x: jax.Array) -> jax.Array:
    """[N, H, W, C] -> [N, ceil(H / 2), ceil(W / 2), C]: 3x3 maximum at stride 2, padded by one pixel of -inf.

    The gradient goes to the first maximum of a window, row by row, as PyTorch's does.
    """
    return _pool(_even(x))


def max_pool(x: jax.Array) -> jax.Array:
    """What :func:`max_pool_to_train` computes, by XLA alone."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


@jax.custom_jvp
def max_pool_on_cpu(x: jax.Array) -> jax.Array:
    """:func:`max_pool` faster: first rows, then columns. Its derivatives are XLA's."""
    wide = jnp.promote_types(x.dtype, jnp.float32)  # of bfloat16 XLA would convert every maximum to and fro
    rows = lax.optimization_barrier(_maxima(_even(x).astype(wide), 1))
    return _maxima(rows, 2).astype(x.dtype)


@max_pool_on_cpu.defjvp
def _max_pool_derivative(x, tangent):
    return jax.jvp(max_pool, x, tangent)


def _maxima(x, axis):
    """Of each pair along an axis and the number before it; half as long."""
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    even, odd = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in range(2))
    before = lax.pad(odd, jnp.array(-jnp.inf, x.dtype), [(int(i == axis), -int(i == axis), 0) for i in range(odd.ndim)])
    return jnp.maximum(jnp.maximum(even, odd), before)


def _even(x):
    """Height and width filled up with -inf."""
    height, width = x.shape[1:3]
    return jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), constant_values=-jnp.inf)


@jax.custom_vjp
def _pool(x):
    """For an even height and width."""
    return _pool_forward(x)[0]


@jax.jit
def _pool_forward(x):
    """The maxima, and which tap of its window each is."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=-jnp.inf)
    taps = [x[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    y, winner = taps[0], jnp.zeros(taps[0].shape, jnp.int8)
    for number, tap in enumerate(taps[1:], 1):
        better = (tap > y) | jnp.isnan(tap)
        y, winner = jnp.where(better, tap, y), jnp.where(better, jnp.int8(number), winner)
    return y, winner


@jax.jit
def _pool_backward(winner, dy):
    n, height, width, channels = dy.shape
    edge = ((0, 0), (0, 1), (0, 1), (0, 0))
    winner, dy = jnp.pad(winner, edge, constant_values=-1), jnp.pad(dy, edge)
    # By a pixel's phase: the taps it is at, and of which window, its own or the next.
    windows = ((1, 0),), ((2, 0), (0, 1))
    rows = []
    for row in windows:
        columns = []
        for column in windows:
            parts = [
                jnp.where(
                    winner[:, a : a + height, b : b + width] == 3 * i + j, dy[:, a : a + height, b : b + width], 0
                )
                for i, a in row
                for j, b in column
            ]
            columns.append(sum(parts[1:], parts[0]))
        rows.append(jnp.stack(columns, 3))
    dx = jnp.stack(rows, 2)  # [n, h, phase, w, phase, channels]
    return (dx.reshape(n, 2 * height, 2 * width, channels),)


_pool.defvjp(_pool_forward, _pool_backward)


def in_pieces(function: Callable[[jax.Array], jax.Array], x: jax.Array, bytes_an_image: int) -> jax.Array:
    """``function(x)``, inside jit some images at a time, with the last ones filled up by zeros where they are fewer.

    Args:
        function: of images, one by one, ``[n, ...] -> [n, classes]``.
        x: ``[N, ...]``.
        bytes_an_image: of what ``function`` makes on the way, to be held against ``BATCH_PIECE``.
    """
    batch, most = len(x), max(1, BATCH_PIECE // max(1, bytes_an_image))
    if batch <= most or not isinstance(x, jax.core.Tracer) or jax.device_count() > 1:
        return function(x)
    # The size, of the larger half, that leaves the fewest to fill up.
    images = min(range(most, most // 2, -1), key=lambda size: -batch % size)
    pieces = jnp.pad(x, [(0, -batch % images), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, images, *x.shape[1:])
    return lax.map(function, pieces).reshape(pieces.shape[0] * images, -1)[:batch]


def average_on_cpu(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """[N, H, W, C] -> [N, C], summed in ``dtype``.

    XLA goes number by number over both axes at once (32 images of 7x7, 2,048 channels: 5.6 ms, one axis at a time 0.3).
    What is narrower than ``dtype`` is a matrix product with ones: where jax 0.12.0.1 sums max(convolution(max(x, 0)), 0) of
    bfloat16 in float32, some sums are not numbers (its YNN fusions; without them they are right), and a fused network ends
    so.
    """
    pixels = x.shape[1] * x.shape[2]
    if x.dtype == dtype:
        return lax.optimization_barrier(x.sum(1)).sum(1) / pixels
    ones = jnp.ones((len(x), 1, pixels), x.dtype)
    flat = x.reshape(len(x), -1, x.shape[-1])
    total = lax.dot_general(ones, flat, (((2,), (1,)), ((0,), (0,))), preferred_element_type=dtype)
    return total[:, 0] / pixels
