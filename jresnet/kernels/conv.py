"""Convolution and its two gradients: definitions, and implementations for a CPU, all in plain JAX.

A convolution is linear in the images and in the kernel, and so are its gradients. :data:`convolution`,
:data:`input_gradient` and :data:`kernel_gradient` are three kernels (:mod:`jresnet.kernels.platforms`), each with the
other two as transposes. So derivatives of every order, forward and reverse, consist of these three.

**3x3 convolutions at stride 1** with 64 or more channels in float32, and their gradients, use Winograd's algorithm
(:mod:`jresnet.kernels.winograd`), which needs 16 products per channel for four pixels instead of 36.

**Other gradients of convolutions.** XLA's CPU compiler runs a forward convolution near the speed of a matrix product, but
expresses its gradients as convolutions for which that code is slow: the kernel's gradient has the whole image as its window
and the whole batch as its channels, and the input gradient of a strided convolution multiplies by the zeros between the
pixels. The implementations instead:

===============  ==============================  ==========================================================================
gradient         of                              computed as
===============  ==============================  ==========================================================================
either           3x3 at stride 1, 64 channels    by Winograd's algorithm, in float32
either           images of fewer pixels than     JAX's gradient of one matrix product over all pixels of the image
                 the kernel has taps
kernel           1x1                             one matrix product of pixels, after slicing by the stride
kernel           others to under 8x8 pixels      XLA's gradient, which is fast for such windows and copies nothing
kernel           others of 3x3 at stride 1       per piece of the batch: a matrix product of x shifted along the rows and
                                                 dy shifted along the columns, so that neither is copied nine times
kernel           above 3x3 (the stem)            per piece of the batch: for each row tap a matrix product with x shifted
                                                 along the rows, for which whole rows are copied
kernel           any other                       per piece of the batch: a matrix product with all shifts of x
input            any other                       one convolution for each phase of the stride, with flipped taps
either           groups above 1                  kernel: XLA, in up to eight pieces of the batch; input: XLA
===============  ==============================  ==========================================================================

The shifted copies of a piece stay in the cache. Pieces are processed in a loop, so compile time does not grow with their
number. Pieces of a kernel's gradient are summed in float32 or wider.

Arrays are NHWC and HWIO throughout, of one dtype. If sizes are symbolic (in an exported program), XLA's implementation is
used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jresnet.kernels import winograd
from jresnet.kernels.platforms import Kernel, known

PIECE = 2**22  # bytes of shifted copies at a time: larger than the L2 cache, well within the L3 cache
SMALL = 8  # for images smaller than this height and width, XLA's gradient of the kernel was measured to be faster
# Winograd's algorithm was measured to be faster from this number of channels and of 2x2 windows on. With fewer channels,
# moving pixels costs more than the products save; with fewer windows, transforming the kernel does.
WINOGRAD_CHANNELS, WINOGRAD_WINDOWS = 64, 48


# Definitions ---------------------------------------------------------------------------------------------------------


def convolve_plainly(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int,
    padding: int,
    groups: int,
    precision: str | None = None,
    dilation: int = 1,
) -> jax.Array:
    """Convolves NHWC images with an HWIO kernel, with ``padding`` zeros on every side and the given dilation."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=precision,
    )


def input_gradient_plainly(dy: jax.Array, kernel: jax.Array, *, shape: tuple[int, ...], **how: Any) -> jax.Array:
    """The gradient with respect to images of ``shape``."""
    x = jax.ShapeDtypeStruct(shape, dy.dtype)
    return jax.linear_transpose(lambda x: convolve_plainly(x, kernel, **how), x)(dy)[0]


def kernel_gradient_plainly(x: jax.Array, dy: jax.Array, *, shape: tuple[int, ...], **how: Any) -> jax.Array:
    """The gradient with respect to a kernel of ``shape``."""
    kernel = jax.ShapeDtypeStruct(shape, dy.dtype)
    return jax.linear_transpose(lambda kernel: convolve_plainly(x, kernel, **how), kernel)(dy)[0]


# CPU implementations -------------------------------------------------------------------------------------------------


def _convolve_on_cpu(
    x: jax.Array, kernel: Any, *, devices: int, stride: int, padding: int, groups: int, precision: str | None
) -> jax.Array:
    """Convolution on a CPU. Winograd's algorithm for two pixels at a time has no factors except 1/2, so that its rounding
    errors are about as large as those of a direct sum. NaN and infinity spread up to two pixels further.
    """
    if _fewer_pixels_than_taps(x.shape, kernel.shape, groups):
        return _by_one_product(x, kernel, stride, padding)
    if _winograd_pays(x, kernel.shape, stride, padding, groups, devices):
        taps = winograd.transformed(_wide(kernel)).astype(kernel.dtype)
        return winograd.convolve(x, taps, PIECE)
    return convolve_plainly(x, kernel, stride=stride, padding=padding, groups=groups, precision=precision)


def _wide(kernel: Any) -> Any:
    """Converts a constant kernel to float64, so that it is transformed now with numpy instead of by XLA."""
    return np.asarray(kernel, np.float64) if isinstance(kernel, np.ndarray) else kernel


def _fewer_pixels_than_taps(shape: tuple[int, ...], kernel: tuple[int, ...], groups: int) -> bool:
    return groups == 1 and known(*shape[1:3]) and math.prod(shape[1:3]) < math.prod(kernel[:2])


def _by_one_product(x: jax.Array, kernel: Any, stride: int, padding: int) -> jax.Array:
    """Convolution of a small image as one matrix product of all its pixels with a matrix of taps.

    XLA would swap image and kernel, and compute the result pixel by pixel.
    """
    n, height, width, channels = x.shape
    k, out, dtype = kernel.shape[0], kernel.shape[3], kernel.dtype
    kernel, numpy = _wide(kernel), np if isinstance(kernel, np.ndarray) else jnp
    rows, columns = (max(0, (size + 2 * padding - k) // stride + 1) for size in (height, width))

    def between(size, length):  # [pixel, output's pixel, tap]
        tap = np.arange(size)[:, None] + padding - stride * np.arange(length)
        return np.asarray(tap[..., None] == np.arange(k), kernel.dtype)

    taps = numpy.einsum("hri,wcj,ijxy->hwxrcy", between(height, rows), between(width, columns), kernel, optimize=True)
    taps = taps.reshape(height * width * channels, -1).astype(dtype)
    y = x.reshape(n, height * width * channels) @ taps
    return y.reshape(n, rows, columns, out)


def _winograd_pays(x: jax.Array, kernel: tuple[int, ...], stride: int, padding: int, groups: int, devices: int) -> bool:
    n, height, width, channels = x.shape
    same = kernel == (3, 3, channels, channels) and (stride, padding, groups) == (1, 1, 1)
    # With several devices, XLA partitions its own convolutions, but not a loop.
    if not (same and devices == 1 and known(n, height, width) and x.dtype == jnp.float32):
        return False
    if channels < WINOGRAD_CHANNELS or min(height, width) < 4:
        return False
    return n * -(-height // 2) * -(-width // 2) >= WINOGRAD_WINDOWS


def _input_gradient_on_cpu(
    dy: jax.Array,
    kernel: Any,
    *,
    shape: tuple[int, ...],
    devices: int,
    stride: int,
    padding: int,
    groups: int,
    **how: Any,
) -> jax.Array:
    """The input gradient on a CPU: pixels of one phase (row and column modulo the stride) use only every stride-th tap."""
    if _fewer_pixels_than_taps(shape, kernel.shape, groups):
        x = jax.ShapeDtypeStruct(shape, dy.dtype)
        return jax.linear_transpose(lambda x: _by_one_product(x, kernel, stride, padding), x)(dy)[0]
    if groups > 1 or not known(*shape[1:3]):
        return input_gradient_plainly(dy, kernel, shape=shape, stride=stride, padding=padding, groups=groups, **how)
    if _winograd_pays(dy, kernel.shape, stride, padding, groups, devices):
        return winograd.input_gradient(dy, kernel, PIECE)
    n, *size, channels = shape
    taps = kernel[::-1, ::-1]  # flipped
    rows = []
    for row in range(stride):
        columns = []
        for column in range(stride):
            parts, pads = [], []
            for axis, phase in enumerate((row, column)):
                first = (phase + padding) % stride  # the first tap of this phase
                count = -(-(kernel.shape[axis] - first) // stride)
                shift = (phase + padding - first) // stride  # dx[a] = sum over m of dy[a + shift - m] tap[m]
                length = -(-size[axis] // stride)
                last = kernel.shape[axis] - 1 - first  # in the flipped kernel
                parts.append(slice(last % stride, last + 1, stride) if count > 0 else slice(0, 0))
                pads.append((count - 1 - shift, length - 1 + shift - (dy.shape[1 + axis] - 1)))
            # The kernel of the transposed convolution. The transposition is last, because XLA does not pass a reversed
            # kernel to oneDNN, and converts bfloat16 to float32 otherwise.
            sub = taps[parts[0], parts[1]].swapaxes(2, 3)
            if sub.size:
                y = lax.conv_general_dilated(dy, sub, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
            else:
                y = jnp.zeros((n, *(-(-s // stride) for s in size), channels), dy.dtype)
            columns.append(y)
        rows.append(jnp.stack(columns, 3))
    both = jnp.stack(rows, 2)  # [n, h, stride, w, stride, channels]
    return both.reshape(n, both.shape[1] * stride, both.shape[3] * stride, channels)[:, : size[0], : size[1]]


def _kernel_gradient_on_cpu(
    x: jax.Array,
    dy: jax.Array,
    *,
    shape: tuple[int, ...],
    devices: int,
    stride: int,
    padding: int,
    groups: int,
    **how: Any,
) -> jax.Array:
    def by_xla(x: jax.Array, dy: jax.Array) -> jax.Array:
        return kernel_gradient_plainly(x, dy, shape=shape, stride=stride, padding=padding, groups=groups, **how)

    if _fewer_pixels_than_taps(x.shape, shape, groups):
        kernel = jax.ShapeDtypeStruct(shape, dy.dtype)
        return jax.linear_transpose(lambda kernel: _by_one_product(x, kernel, stride, padding), kernel)(dy)[0]
    if not known(*x.shape):
        return by_xla(x, dy)
    if groups > 1:
        # Half a megabyte of input per piece; with more than eight pieces, compilation costs more time than they save.
        size = max(2**19 // (4 * math.prod(x.shape[1:])), -(-len(x) // 8), 1)
        pieces = [by_xla(x[start : start + size], dy[start : start + size]) for start in range(0, len(x), size)]
        return sum(pieces[1:], pieces[0])
    k, _, channels, out = shape
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    if k == 1 and padding == 0:
        # Without the barrier, XLA computes the operands (including ReLU) once more in the shape of the product.
        x, dy = lax.optimization_barrier((x[:, ::stride, ::stride], dy))
        return _product(x, dy, wide, devices).reshape(shape).astype(dy.dtype)
    if _winograd_pays(x, shape, stride, padding, groups, devices):
        return winograd.kernel_gradient(x, dy, PIECE)
    if max(dy.shape[1:3]) < SMALL:
        return by_xla(x, dy)
    if stride == 1 and k == 3 and padding == 1:
        shifts, copies = _both_shifted, k * (channels + out)
    elif k > 3:
        shifts, copies = _row_by_row, 2 * k * channels
    else:
        shifts, copies = _x_shifted, k * k * channels
    batch, piece = len(x), max(PIECE, math.prod(shape) * wide.itemsize)  # each piece also reads and writes the sum
    images = _images_in_a_piece(batch, piece // (copies * math.prod(dy.shape[1:3]) * x.dtype.itemsize), devices)
    if devices > 1:  # a piece takes images from every device's part of the batch, so that no image moves
        x, dy = (a.reshape(images, len(a) // images, *a.shape[1:]) for a in (x, dy))

    def add(i, total):
        if devices > 1:
            piece = [lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in (x, dy)]
        else:  # no reshape, because XLA would compute x and dy again in that shape
            piece = [lax.dynamic_slice_in_dim(a, i * images, images) for a in (x, dy)]
        return total + shifts(*piece, k, stride, padding, partial(_product, dtype=wide, devices=devices))

    return lax.fori_loop(0, batch // images, add, jnp.zeros(shape, wide)).astype(dy.dtype)


def _images_in_a_piece(batch: int, most: int, devices: int) -> int:
    """The largest divisor of the batch up to ``most`` that is a multiple of the number of devices."""
    devices = devices if batch % devices == 0 else 1
    return devices * winograd.largest_divisor(batch // devices, most // devices)


def _product(a, b, dtype, devices):
    """Multiplies [images, ..., i] and [images, ..., j] to [i, j], summed over all pixels.

    Two products of half of the images use the cores better than one. With several devices the images are not moved.
    A product of bfloat16 is rounded to bfloat16, like PyTorch's gradients: XLA requests only that from oneDNN, and CPUs with
    bfloat16 units compute it twice as fast.
    """
    halves = 2 if len(a) % 2 == 0 and devices == 1 else 1
    a, b = (v.reshape(halves, -1, v.shape[-1]) for v in (a, b))
    kept = a.dtype if a.dtype == jnp.bfloat16 else dtype
    products = lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,))), preferred_element_type=kept)
    return products.astype(dtype).sum(0)


def _x_shifted(x, dy, k, stride, padding, product):
    """Multiplies the views of x for all taps, [pixels, k k channels], with dy, [pixels, out]."""
    height, width = (stride * (size - 1) + 1 for size in dy.shape[1:3])
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    views = [x[:, i : i + height : stride, j : j + width : stride] for i in range(k) for j in range(k)]
    # Without the barrier, XLA computes the copies inside the product, element by element.
    views = lax.optimization_barrier(jnp.concatenate(views, -1))
    return product(views, dy).reshape(k, k, x.shape[-1], dy.shape[-1])


def _row_by_row(x, dy, k, stride, padding, product):
    """Multiplies k copies of x, shifted along its rows, with dy, one row tap after the other; this copies whole rows."""
    height, width = (stride * (size - 1) + 1 for size in dy.shape[1:3])
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    xs = lax.optimization_barrier(jnp.concatenate([x[:, :, j : j + width : stride] for j in range(k)], -1))
    taps = jnp.stack([product(xs[:, i : i + height : stride], dy) for i in range(k)])
    return taps.reshape(k, k, x.shape[-1], dy.shape[-1])


def _both_shifted(x, dy, k, stride, padding, product):
    """For 3x3 at stride 1: one product of x shifted along its rows and dy shifted along its columns gives all nine taps.

    Tap (i, j) is the sum of x[r, c + j - 1] dy[r - i + 1, c] over all rows r and columns c; both are zero outside.
    """
    xs = jnp.concatenate([_shift(x, 2, 1 - j) for j in range(k)], -1)
    dys = jnp.concatenate([_shift(dy, 1, i - 1) for i in range(k)], -1)
    xs, dys = lax.optimization_barrier((xs, dys))
    taps = product(xs, dys).reshape(k, x.shape[-1], k, dy.shape[-1])  # [j, channel, i, out]
    return taps.transpose(2, 0, 1, 3)


def _shift(x, axis, by):
    """Shifts x by ``by`` positions along an axis and fills with zeros."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(by, -by, 0) if axis == i else (0, 0, 0) for i in range(x.ndim)])


# The kernels ---------------------------------------------------------------------------------------------------------


def _of_a_larger_batch(how: dict[str, Any], size: int) -> dict[str, Any]:
    return how | {"shape": (size * how["shape"][0], *how["shape"][1:])}


def each_others_transposes(
    prefix: str, forward: Sequence[Callable], by_input: Sequence[Callable], by_kernel: Sequence[Callable]
) -> tuple[Kernel, Kernel, Kernel]:
    """Builds a convolution and its gradients with respect to images and kernel. Each of the three is bilinear and has the
    other two as its transposes.

    Args:
        prefix: prefix of the primitives' names.
        forward, by_input, by_kernel: for each the definition and the CPU implementation.
    """
    convolution = Kernel(f"{prefix}convolution", *forward, images=(0,))
    input_gradient = Kernel(f"{prefix}input_gradient", *by_input, images=(0,), resized=_of_a_larger_batch)
    kernel_gradient = Kernel(f"{prefix}kernel_gradient", *by_kernel)
    convolution.multilinear(
        lambda dy, kernel, *, argument, **how: input_gradient(dy, kernel, shape=argument, **how),
        lambda dy, x, *, argument, **how: kernel_gradient(x, dy, shape=argument, **how),
    )
    input_gradient.multilinear(
        lambda dx, kernel, *, argument, shape, **how: convolution(dx, kernel, **how),
        lambda dx, dy, *, argument, shape, **how: kernel_gradient(dx, dy, shape=argument, **how),
    )
    kernel_gradient.multilinear(
        lambda dk, dy, *, argument, shape, **how: input_gradient(dy, dk, shape=argument, **how),
        lambda dk, x, *, argument, shape, **how: convolution(x, dk, **how),
    )
    return convolution, input_gradient, kernel_gradient


convolution, input_gradient, kernel_gradient = each_others_transposes(
    "", (convolve_plainly, _convolve_on_cpu), (input_gradient_plainly, _input_gradient_on_cpu),
    (kernel_gradient_plainly, _kernel_gradient_on_cpu),
)  # fmt: skip


class Constant:
    """A kernel that is known at trace time: a weight of a network that ``jax.jit`` closes over."""

    def __init__(self, array: jax.Array):
        self.array, self.aval = array, jax.core.ShapedArray(array.shape, array.dtype)


# A separate primitive, because a lowering rule cannot tell which arguments are constants.
convolution_by_constant = Kernel(
    "convolution_by_constant",
    lambda x, *, kernel, **how: convolve_plainly(x, kernel.array, **how),
    lambda x, *, kernel, **how: _convolve_on_cpu(x, np.asarray(kernel.array), **how),
    images=(0,),
)
convolution_by_constant.multilinear(
    lambda dy, *, argument, kernel, **how: input_gradient(dy, kernel.array, shape=argument, **how)
)
# Eager calls use `convolution`, so that no program is compiled for each constant kernel.
convolution_by_constant.primitive.def_impl(lambda x, *, kernel, **how: convolution(x, kernel.array, **how))
convolution_by_constant.primitive.def_abstract_eval(
    lambda x, *, kernel, **how: convolution.shape(x, kernel.aval, **how)
)


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0, groups: int = 1) -> jax.Array:
    """Convolves ``[N, H, W, C]`` with ``[k, k, C // groups, D]`` to ``[N, H', W', D]``, with ``padding`` zeros per side.

    Both arguments and the result have the same dtype. Like PyTorch's ``conv2d``, it is a cross-correlation.
    """
    how = {
        "stride": stride, "padding": padding, "groups": groups,
        "precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
    }  # fmt: skip
    if isinstance(x, jax.core.Tracer) and not isinstance(kernel, jax.core.Tracer):
        return convolution_by_constant(x, kernel=Constant(kernel), **how)
    return convolution(x, kernel, **how)
