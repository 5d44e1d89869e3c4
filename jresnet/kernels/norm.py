"""Batch normalisation in training, and sums over pixels.

On a CPU, XLA runs a fused sum over N, H and W on one core and pixel by pixel, because it distributes the result over the
cores, and the result is a single row of channels. If H is summed first, all cores read memory in order. :func:`normalise`
and its gradient need two such sums each. The derivative is written in operations linear in the tangents, among which
:data:`channel_sum` and :data:`spread` are transposes of each other, so that forward mode and higher orders use them, too.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jresnet.kernels.platforms import Kernel, known


def inverse_sqrt(x: jax.Array) -> jax.Array:
    """Computes 1 / sqrt(x), accurate to rounding.

    On the CPU, XLA uses an approximation with a relative error of 1e-7, however the expression is written. The error is the
    same for all pixels of a channel and does not average out: the logits of resnet56_cifar would be twice as far from the
    float64 result as PyTorch's. One Newton step (f(r) = 1/r² - x) reduces the error to rounding.
    """
    r = lax.rsqrt(x)
    return r + lax.stop_gradient(0.5 * r * (1 - x * r * r))  # the derivative is that of rsqrt


def _columns(x: jax.Array, narrow: bool) -> jax.Array:
    """Sums [N, H, W, C] over H to [N, W, C]; the barriers keep XLA from fusing consecutive sums.

    XLA's sum is slow for values computed from a ``narrow`` dtype (a tenth of the speed) and for more than 32 rows (half of
    the speed). In these cases up to eight stretches of rows, a number that divides H, are added first.
    """
    if narrow or x.shape[1] > 32:
        rows = x.shape[1] // max(d for d in range(1, 9) if x.shape[1] % d == 0)
        stretches = [x[:, start : start + rows] for start in range(0, x.shape[1], rows)]
        x = lax.optimization_barrier(sum(stretches[1:], stretches[0]))
    return lax.optimization_barrier(x.sum(1))


def _total(columns: jax.Array) -> jax.Array:
    """Sums [N, W, C] to [C], one axis after the other, which is faster and more accurate than both at once."""
    return lax.optimization_barrier(columns.sum(1)).sum(0)


def _sum(x: jax.Array, *, narrow: bool) -> jax.Array:
    return x.sum((0, 1, 2))


def _sum_on_cpu(x: jax.Array, *, narrow: bool, devices: int) -> jax.Array:
    return _total(_columns(x, narrow)) if known(*x.shape) else _sum(x, narrow=narrow)


def _mean(x: jax.Array, *, narrow: bool) -> jax.Array:
    return x.mean((0, 1, 2))


def _mean_on_cpu(x: jax.Array, *, narrow: bool, devices: int) -> jax.Array:
    """The mean on a CPU. Rounding errors accumulate in a sum of thousands of numbers that are large compared with their
    deviation, as in PyTorch's channels-last kernel. A second sum, of the columns minus that mean, corrects this.
    """
    if not known(*x.shape):
        return _mean(x, narrow=narrow)
    columns = _columns(x, narrow)
    n = math.prod(columns.shape[:-1])
    about = _total(columns) / n
    return (about + _total(columns - about[None, None]) / n) / x.shape[1]


def _spread(y: jax.Array, *, shape: tuple[int, ...], narrow: bool) -> jax.Array:
    return jnp.broadcast_to(y, shape)


def _variance(x: jax.Array, centred: jax.Array, about: jax.Array, *, narrow: bool) -> jax.Array:
    """The variance in the same pass over ``x`` as the mean: E[d²] - E[d]² with d = x - about.

    It suffers from cancellation if ``about`` is far from the mean compared with the deviation; BatchNorm's running mean is
    close to it.
    """
    d = x - about[None, None, None]
    return jnp.maximum(jnp.square(d).mean((0, 1, 2)) - jnp.square(d.mean((0, 1, 2))), 0)


def _variance_on_cpu(x: jax.Array, centred: jax.Array, about: jax.Array, *, narrow: bool, devices: int) -> jax.Array:
    """The variance in a second pass over the centred values: a CPU is not limited by memory bandwidth here."""
    return _sum_on_cpu(jnp.square(centred), narrow=narrow, devices=devices) / math.prod(x.shape[:-1])


# [N, H, W, C] -> [C] and back; ``narrow``: the values are computed from a dtype of fewer bits.
channel_sum = Kernel("channel_sum", _sum, _sum_on_cpu)
channel_mean = Kernel("channel_mean", _mean, _mean_on_cpu)
channel_variance = Kernel("channel_variance", _variance, _variance_on_cpu)
spread = Kernel("spread", _spread, lambda y, *, devices, **how: _spread(y, **how))
channel_sum.multilinear(lambda dy, *, argument, narrow: spread(dy, shape=argument, narrow=narrow))
channel_mean.multilinear(
    lambda dy, *, argument, narrow: spread(dy / math.prod(argument[:-1]), shape=argument, narrow=narrow)
)
spread.multilinear(lambda dx, *, argument, shape, narrow: channel_sum(dx, narrow=narrow))


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, about: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises ``x [N, H, W, C]`` over N, H and W; also returns the batch's mean and biased variance, ``[C]``.

    Sums and statistics use the wider of the input's dtype and float32; the result has the input's dtype. ``about [C]`` is an
    estimate of the mean that improves the accuracy of an accelerator's sums; the exact result does not depend on it.
    """
    return _normalised(x, scale, bias, about, eps)


@partial(jax.jit, static_argnums=4)  # jit here and below, so that each shape is traced once
def _normalised(x, scale, bias, about, eps):
    _, along, _, mean, var, inverse, centred = _statistics(x, about, eps)
    return (centred * along(inverse * scale) + along(bias)).astype(x.dtype), mean, var


def _statistics(x, about, eps):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    narrow = x.dtype != wide.dtype
    add, along = partial(channel_sum, narrow=narrow), partial(spread, shape=x.shape, narrow=narrow)
    mean = channel_mean(wide, narrow=narrow)
    centred = wide - along(mean)
    var = channel_variance(wide, centred, about.astype(wide.dtype), narrow=narrow)
    return add, along, wide, mean, var, inverse_sqrt(var + eps), centred


@normalise.defjvp
@partial(jax.jit, static_argnums=0)
def _derivative(eps, primals, tangents):
    (x, scale, bias, about), (dx, dscale, dbias, _) = primals, tangents
    add, along, wide, mean, var, inverse, centred = _statistics(x, about, eps)
    n, dwide = math.prod(x.shape[:-1]), dx.astype(wide.dtype)
    dmean, dvar = add(dwide) / n, 2 * add(dwide * centred) / n
    factor = inverse * scale
    y = centred * along(factor) + along(bias)
    # The derivative of y = (x - mean) inverse scale + bias, where that of inverse is -inverse³ dvar / 2.
    dy = dwide * along(factor) + centred * along(inverse * dscale - factor * inverse**2 * dvar / 2)
    dy = dy + along(dbias - factor * dmean)
    return (y.astype(x.dtype), mean, var), (dy.astype(x.dtype), dmean, dvar)
