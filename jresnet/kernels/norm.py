"""Batch normalisation of a batch in training, and sums over its pixels.

A sum over N, H and W of something computed on the way runs on one core of a CPU and pixel by pixel, since XLA gives each
core a part of the result and the result is one row of channels. Summed over H first, everything is read in order by all
cores. :func:`normalise` and its gradient need two such sums each. The derivative is written in operations that are linear in
the tangents, of which :data:`channel_sum` and :data:`spread` are each the other's transpose; so forward mode and higher
orders have it, too.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jresnet.kernels.platforms import Kernel, known


def inverse_sqrt(x: jax.Array) -> jax.Array:
    """1 / sqrt(x) to rounding.

    XLA turns that, however it is written, into an approximation that is off by 1e-7 on the CPU: the same way for every
    pixel of a channel, so that nothing averages it out, and the logits of resnet56_cifar are twice as far from float64's
    as PyTorch's. One Newton step (f(r) = 1/r² - x) brings it back to rounding.
    """
    r = lax.rsqrt(x)
    return r + lax.stop_gradient(0.5 * r * (1 - x * r * r))  # the derivative is rsqrt's own


def _columns(x: jax.Array, narrow: bool) -> jax.Array:
    """[N, H, W, C] -> [N, W, C], summed over H; the barriers keep XLA from joining sums that follow one another.

    XLA's sum goes number by number over what it computes of a ``narrow`` dtype, at a tenth of the speed, and window by
    window over more than 32 rows, at half of it: there up to eight stretches of rows, as many as divide H, are added before.
    """
    if narrow or x.shape[1] > 32:
        rows = x.shape[1] // max(d for d in range(1, 9) if x.shape[1] % d == 0)
        stretches = [x[:, start : start + rows] for start in range(0, x.shape[1], rows)]
        x = lax.optimization_barrier(sum(stretches[1:], stretches[0]))
    return lax.optimization_barrier(x.sum(1))


def _total(columns: jax.Array) -> jax.Array:
    """[N, W, C] -> [C], one axis after the other, which is faster and rounds less than both at once."""
    return lax.optimization_barrier(columns.sum(1)).sum(0)


def _sum(x: jax.Array, *, narrow: bool) -> jax.Array:
    return x.sum((0, 1, 2))


def _sum_on_cpu(x: jax.Array, *, narrow: bool, devices: int) -> jax.Array:
    return _total(_columns(x, narrow)) if known(*x.shape) else _sum(x, narrow=narrow)


def _mean(x: jax.Array, *, narrow: bool) -> jax.Array:
    return x.mean((0, 1, 2))


def _mean_on_cpu(x: jax.Array, *, narrow: bool, devices: int) -> jax.Array:
    """Rounding grows along a sum of thousands of numbers that are large against their deviation, as in PyTorch's
    channels-last kernel: a second sum, of the columns less their own mean, takes that back.
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
    """In the same pass over ``x`` as its mean: E[d²] - E[d]² of d = x - about.

    That cancels where the mean is far from ``about`` against the deviation, which BatchNorm's running mean is not.
    """
    d = x - about[None, None, None]
    return jnp.maximum(jnp.square(d).mean((0, 1, 2)) - jnp.square(d.mean((0, 1, 2))), 0)


def _variance_on_cpu(x: jax.Array, centred: jax.Array, about: jax.Array, *, narrow: bool, devices: int) -> jax.Array:
    """In a second pass, of what is already centred: memory is not what a CPU waits for."""
    return _sum_on_cpu(jnp.square(centred), narrow=narrow, devices=devices) / math.prod(x.shape[:-1])


# [N, H, W, C] -> [C] and back; ``narrow``: the numbers are computed from ones of fewer bits.
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
    """``x [N, H, W, C]`` normalised over N, H and W; and the batch's mean and biased variance, ``[C]``.

    Sums and statistics are of the wider of the input's dtype and float32; the result has the input's dtype. ``about [C]``
    is a guess at the mean, which an accelerator's sums are taken about; the result does not depend on it.
    """
    return _normalised(x, scale, bias, about, eps)


@partial(jax.jit, static_argnums=4)  # here and below: traced once for each shape
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
    # Of y = (x - mean) inverse scale + bias, where the derivative of inverse is -inverse³ dvar / 2.
    dy = dwide * along(factor) + centred * along(inverse * dscale - factor * inverse**2 * dvar / 2)
    dy = dy + along(dbias - factor * dmean)
    return (y.astype(x.dtype), mean, var), (dy.astype(x.dtype), dmean, dvar)
