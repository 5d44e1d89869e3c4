"""Pooling: the stem's max-pool, averages and blurs of neighbouring pixels, and the global average."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jresnet.kernels.platforms import Kernel, known


def _max_pool(x: jax.Array) -> jax.Array:
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def _max_pool_on_cpu(x: jax.Array, *, devices: int) -> jax.Array:
    """Max-pooling on a CPU: first over rows, then over columns, instead of XLA's windows."""
    if not known(*x.shape[1:3]):
        return _max_pool(x)
    wide = jnp.promote_types(x.dtype, jnp.float32)  # for bfloat16, XLA would convert every maximum back and forth
    rows = lax.optimization_barrier(_maxima(_even(x).astype(wide), 1))
    return _maxima(rows, 2).astype(x.dtype)


def _maxima(x: jax.Array, axis: int) -> jax.Array:
    """The maximum of each pair along an axis and the value before it; the result is half as long."""
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    even, odd = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in range(2))
    before = lax.pad(odd, jnp.array(-jnp.inf, x.dtype), [(int(i == axis), -int(i == axis), 0) for i in range(odd.ndim)])
    return jnp.maximum(jnp.maximum(even, odd), before)


def _even(x: jax.Array, fill: float = -jnp.inf) -> jax.Array:
    """Pads height and width to even numbers."""
    height, width = x.shape[1:3]
    return jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), constant_values=fill)


_maximum = Kernel("max_pool", _max_pool, _max_pool_on_cpu, images=(0,))


@jax.custom_jvp
def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max-pool at stride 2, padded by one pixel of -inf: ``[N, H, W, C] -> [N, ceil(H / 2), ceil(W / 2), C]``.

    The gradient goes to the first maximum of a window in row-major order, as in PyTorch. XLA would search the maxima again
    and scatter the gradient pixel by pixel. Instead, if the function is differentiated, each window stores the index of its
    maximum, and each pixel sums the gradients of the one to four windows that contain it.
    """
    return _maximum(x)


@max_pool.defjvp
def _derivative(primals, tangents):
    (x,), (dx,) = primals, tangents
    if not known(*x.shape[1:3]):
        return jax.jvp(_max_pool, (x,), (dx,))
    y, winner = _with_winners(_even(x))
    return y, _selected(dx, winner)


def _taps(x: jax.Array, fill: float) -> list[jax.Array]:
    """The views of an image of even height and width for all taps, in row-major order."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=fill)
    return [x[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]


def _with_winners(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maxima, and for each the index of its tap in the window."""
    taps = _taps(x, -jnp.inf)
    y, winner = taps[0], jnp.zeros(taps[0].shape, jnp.int8)
    for number, tap in enumerate(taps[1:], 1):
        better = (tap > y) | jnp.isnan(tap)
        y, winner = jnp.where(better, tap, y), jnp.where(better, jnp.int8(number), winner)
    return y, winner


def _select(dx: jax.Array, winner: jax.Array) -> jax.Array:
    """The values of ``dx [N, H, W, C]`` at the maxima's pixels: [N, H / 2, W / 2, C], like ``winner``."""
    parts = [jnp.where(winner == number, tap, 0) for number, tap in enumerate(_taps(_even(dx, 0.0), 0.0))]
    return sum(parts[1:], parts[0])


def _give_back(dy: jax.Array, winner: jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    """The transpose of :func:`_select`, to ``shape``: each pixel sums the values of the windows whose maximum it is."""
    n, height, width, channels = dy.shape
    edge = ((0, 0), (0, 1), (0, 1), (0, 0))
    winner, dy = jnp.pad(winner, edge, constant_values=-1), jnp.pad(dy, edge)
    # For each phase of a pixel: its taps, and whether they are in its own window (0) or the next one (1).
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
    return dx.reshape(n, 2 * height, 2 * width, channels)[:, : shape[1], : shape[2]]


def _of_a_larger_batch(how: dict, size: int) -> dict:
    return {"shape": (size * how["shape"][0], *how["shape"][1:])}


_selected = Kernel("max_pool_select", _select, images=(0, 1))
_given_back = Kernel("max_pool_give_back", _give_back, images=(0, 1), resized=_of_a_larger_batch)
_selected.multilinear(lambda dy, winner, *, argument: _given_back(dy, winner, shape=argument))
_given_back.multilinear(lambda dx, winner, *, argument, shape: _selected(dx, winner))


def _neighbours(x: jax.Array, axis: int, length: int, step: int, count: int) -> list[jax.Array]:
    """``count`` strided slices along an axis, each of ``length`` values at distance ``step``, which start at 0, 1, ..."""
    return [lax.slice_in_dim(x, i, i + step * (length - 1) + 1, step, axis) for i in range(count)]


def _sums(x: jax.Array, step: int, padding: tuple[int, int] = (0, 0)) -> jax.Array:
    """The sums over windows of 2x2 pixels, for symbolic sizes; sizes as in convolutions, so JAX sees them as equal."""
    edges = ((0, 0), padding, padding, (0, 0))
    return lax.reduce_window(x, jnp.zeros((), x.dtype), lax.add, (1, 2, 2, 1), (1, step, step, 1), edges)


def max_pool_dense(x: jax.Array) -> jax.Array:
    """3x3 max-pool at stride 1, padded by one pixel of -inf; the shape ``[N, H, W, C]`` does not change."""
    if not known(*x.shape[1:3]):
        edges = ((0, 0), (1, 1), (1, 1), (0, 0))
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), edges)
    x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
    for axis in (1, 2):
        first, second, third = _neighbours(x, axis, x.shape[axis] - 2, 1, 3)
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def _reflected(x: jax.Array, axis: int) -> jax.Array:
    """Pads ``axis`` by one pixel at both ends, by reflection."""
    if known(size := x.shape[axis]):
        first, last = (lax.slice_in_dim(x, at, at + 1, axis=axis) for at in (min(1, size - 1), max(size - 2, 0)))
    else:  # dynamic slices, because JAX cannot know that there are at least two pixels
        first, last = (lax.dynamic_slice_in_dim(values, 1, 1, axis) for values in (x, lax.rev(x, (axis,))))
    return lax.concatenate([first, x, last], axis)


def _blurred(x: jax.Array, step: int) -> jax.Array:
    """The binomial filter (1 2 1) / 4 along both axes at stride ``step``, with reflection at the edges."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = _reflected(_reflected(wide, 1), 2)
    if not known(*x.shape[1:3]):
        return (_sums(_sums(wide, 1), step) / 16).astype(x.dtype)  # (1 1) twice is (1 2 1)
    for axis in (1, 2):
        before, middle, after = _neighbours(wide, axis, -(-x.shape[axis] // step), step, 3)
        wide = (before + 2 * middle + after) / 4
    return wide.astype(x.dtype)


def blur(x: jax.Array) -> jax.Array:
    """3x3 binomial filter at stride 2 (``timm.layers.BlurPool2d``): ``[N, H, W, C] -> [N, ceil(H / 2), ceil(W / 2), C]``.

    Zhang 2019, arXiv:1904.11486. It is computed as a sum of shifted pixels, because a depthwise convolution would be the
    slowest layer of a network on a CPU.
    """
    return _blurred(x, 2)


def blur_dense(x: jax.Array) -> jax.Array:
    """:func:`blur` at stride 1."""
    return _blurred(x, 1)


def average_halves(x: jax.Array) -> jax.Array:
    """2x2 average pooling ``[N, H, W, C] -> [N, H // 2, W // 2, C]``; an odd last row or column is dropped."""
    return _averaged(x, 2)


def average_pairs(x: jax.Array) -> jax.Array:
    """2x2 average pooling ``[N, H, W, C] -> [N, ceil(H / 2), ceil(W / 2), C]``; padding does not count in averages."""
    if not known(*x.shape[1:3]):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        count = _sums(jnp.ones((1, *x.shape[1:3], 1), wide.dtype), 2, (0, 1))
        return (_sums(wide, 2, (0, 1)) / count).astype(x.dtype)
    for axis in (1, 2):
        size = x.shape[axis]
        if size % 2:  # repeating the last row gives the average of that row
            x = lax.concatenate([x, lax.slice_in_dim(x, size - 1, size, axis=axis)], axis)
    return _averaged(x, 2)


def average_same(x: jax.Array) -> jax.Array:
    """The average of each pixel and its neighbours to the right and below, with zeros outside; the shape does not change."""
    return _averaged(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))), 1)


def _averaged(x: jax.Array, step: int) -> jax.Array:
    """The averages of windows of 2x2 pixels at stride ``step``, without padding."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if not known(*x.shape[1:3]):
        return (_sums(wide, step) / 4).astype(x.dtype)
    for axis in (1, 2):
        first, second = _neighbours(wide, axis, (x.shape[axis] - 2) // step + 1, step, 2)
        wide = first + second
    return (wide / 4).astype(x.dtype)


def every_second(x: jax.Array) -> jax.Array:
    """The pixels at even rows and columns: ``[N, H, W, C] -> [N, ceil(H / 2), ceil(W / 2), C]``."""
    if known(*x.shape[1:3]):
        return x[:, ::2, ::2]
    # For a symbolic size the expression is that of a convolution, so that JAX recognises that both sizes are equal.
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 1, 1), (1, 2, 2, 1), "VALID")


def _average(x: jax.Array, *, dtype: DTypeLike) -> jax.Array:
    return x.astype(dtype).mean((1, 2))


def _average_on_cpu(x: jax.Array, *, dtype: DTypeLike, devices: int) -> jax.Array:
    """The global average on a CPU, one axis at a time: for 32 images of 7x7 pixels and 2,048 channels it takes 0.3 ms; XLA's
    sum over both axes at once takes 5.6 ms.

    Dtypes narrower than ``dtype`` are summed by a matrix product with ones. With jax 0.12.0.1, sums in float32 of
    max(convolution(max(x, 0)), 0) in bfloat16, with which a fused network ends, are partly NaN (a fault of its YNN fusions).
    """
    if not known(*x.shape):
        return _average(x, dtype=dtype)
    pixels = x.shape[1] * x.shape[2]
    if x.dtype == dtype:
        return lax.optimization_barrier(x.sum(1)).sum(1) / pixels
    ones = jnp.ones((len(x), 1, pixels), x.dtype)
    flat = x.reshape(len(x), -1, x.shape[-1])
    total = lax.dot_general(ones, flat, (((2,), (1,)), ((0,), (0,))), preferred_element_type=dtype)
    return total[:, 0] / pixels


_global_average = Kernel("global_average", _average, _average_on_cpu, images=(0,))


def global_average_pool(x: jax.Array) -> jax.Array:
    """The mean over H and W, ``[N, H, W, C] -> [N, C]``, accumulated and returned in float32 or wider."""
    return _global_average(x, dtype=jnp.promote_types(x.dtype, jnp.float32))
