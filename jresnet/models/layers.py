"""The four layers a ResNet is made of, with PyTorch's arithmetic: convolution, batch normalisation, max-pool, linear.

Images are NHWC and kernels HWIO. Padding is an integer on both sides, as in PyTorch; ``SAME`` would shift strided
windows by a pixel. Parameters are float32. ``dtype`` is the dtype a layer computes in; ``None`` promotes the input with
the parameters, so that a model whose leaves were cast to float64 computes in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jresnet.kernels import cpu

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]


@jax.jit
def _normal_block(key: jax.Array, index: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, index), (2**16,), jnp.float32)


def kaiming_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """He et al. 2015, fan-out mode, not truncated: ``torch.nn.init.kaiming_normal_(mode="fan_out")`` for an HWIO kernel.

    Drawn in blocks of one size, since XLA compiles the generator anew for each shape, for up to a second.
    """
    blocks = [_normal_block(key, np.uint32(i)) for i in range(-(-math.prod(shape) // 2**16))]
    fan_out = math.prod(shape[:-2]) * shape[-1]  # PyTorch does not divide by the groups either
    std, values = np.float32(math.sqrt(2.0 / fan_out)), math.prod(shape)
    if isinstance(blocks[0], jax.core.Tracer):
        return jnp.concatenate(blocks)[:values].reshape(shape) * std
    return jnp.asarray(np.concatenate(blocks)[:values].reshape(shape) * std)  # nothing to compile


def uniform_fan_in(fan_in: int) -> Init:
    """PyTorch's default for the weights of ``nn.Linear`` and for every bias: uniform in ±1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def param(init: Init, shape: tuple[int, ...], rngs: nnx.Rngs | None) -> nnx.Param:
    """A parameter drawn from ``init``, or, with ``rngs=None``, its float32 shape alone, to be filled from a file."""
    return nnx.Param(init(rngs.params(), shape) if rngs else jax.ShapeDtypeStruct(shape, jnp.float32))


class Conv(nnx.Module):
    """2-D convolution (cross-correlation), as ``torch.nn.Conv2d`` with zero padding.

    ``[N, H, W, in_channels] -> [N, H', W', out_channels]`` with ``H' = (H + 2 * padding - kernel_size) // stride + 1``.
    The kernel is ``[kernel_size, kernel_size, in_channels // groups, out_channels]``. ``train`` changes how the gradient
    is computed on the CPU, not what it is (see :mod:`jresnet.kernels.cpu`).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
        *,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None,
    ):
        shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        self.kernel = param(kaiming_normal, shape, rngs)
        self.bias = param(uniform_fan_in(math.prod(shape[:3])), shape[3:], rngs) if bias else None
        self.stride, self.padding, self.groups, self.dtype = stride, padding, groups, dtype

    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h2 w2 c2"]:
        kernel = self.kernel[...]
        dtype = self.dtype or jnp.promote_types(x.dtype, kernel.dtype)
        function = cpu.convolve
        if jax.default_backend() == "cpu":
            function = cpu.convolve_to_train if train else cpu.convolve_on_cpu
        y = function(x.astype(dtype), kernel.astype(dtype), self.stride, self.padding, self.groups)
        return y if self.bias is None else y + self.bias[...].astype(dtype)


def _normalize(x, mean, var, scale, bias, eps):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return ((wide - mean) * (cpu.inverse_sqrt(var + eps) * scale) + bias).astype(x.dtype)


def _normalize_batch(x, scale, bias, eps):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean((0, 1, 2))
    # Two passes: E[x²] - E[x]² cancels where the mean is large against the deviation.
    var = jnp.square(wide - mean).mean((0, 1, 2))
    return _normalize(x, mean, var, scale, bias, eps), mean, var


@partial(jax.jit, static_argnums=2)  # traced once for each number of channels
def _newer(running, new, momentum):
    return (1 - momentum) * running + momentum * new.astype(running.dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation over N, H and W, as ``torch.nn.BatchNorm2d`` (Ioffe & Szegedy 2015).

    ``momentum`` has PyTorch's meaning, the weight of the newest batch; Flax's means the opposite. Training normalises
    with the batch's biased variance and puts the unbiased one, times n / (n - 1), into the running average.
    Statistics are taken, kept and applied in float32 (float64 for float64 input), whatever the input's dtype, and the
    output has the input's dtype.

    Raises:
        ValueError: in training, for a batch with one value per channel, whose unbiased variance does not exist.
    """

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5):
        zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        self.scale = nnx.Param(jnp.array(ones))
        self.bias = nnx.Param(jnp.array(zeros))
        self.mean = nnx.BatchStat(jnp.array(zeros))
        self.var = nnx.BatchStat(jnp.array(ones))
        self.momentum, self.eps = momentum, eps

    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h w c"]:
        scale, bias = self.scale[...], self.bias[...]
        if not train:
            return _normalize(x, self.mean[...], self.var[...], scale, bias, self.eps)
        n = math.prod(x.shape[:-1])
        if n < 2:
            raise ValueError(
                f"training needs more than one value per channel, got activations of shape {x.shape}: "
                "use a larger batch or larger images"
            )
        function = cpu.normalize_to_train if jax.default_backend() == "cpu" else _normalize_batch
        y, mean, var = function(x, scale, bias, self.eps)
        for running, new in ((self.mean, mean), (self.var, var * (n / (n - 1)))):
            # Not running[...] = value: that asks a traced value for its sharding, in time quadratic in the depth.
            running.set_value(_newer(running[...], lax.stop_gradient(new), self.momentum))
        return y


class Fused(nnx.Module):
    """Where a BatchNorm was before :func:`jresnet.fuse` moved it into the convolution before it: x -> x."""

    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h w c"]:
        if train:
            raise ValueError(
                "a fused model has no BatchNorm left to train: train the model that was given to jresnet.fuse"
            )
        return x


class Linear(nnx.Module):
    """``[N, in_features] -> [N, out_features]``, as ``torch.nn.Linear``; the kernel is its weight transposed."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs | None):
        self.kernel = param(uniform_fan_in(in_features), (in_features, out_features), rngs)
        self.bias = param(uniform_fan_in(in_features), (out_features,), rngs)

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d2"]:
        return x @ self.kernel[...] + self.bias[...]


def relu(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """max(x, 0) as ``torch.relu``, whose derivative at 0 is 0.

    bfloat16 goes through float32 on the CPU, where XLA computes it so anyway: written so, XLA hands it to oneDNN together
    with the convolution before it.
    """
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return jax.nn.relu(x.astype(jnp.float32)).astype(x.dtype)
    return jax.nn.relu(x)


def computed_once(x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h w c"]:
    """x itself, in training on the CPU behind a barrier, as its gradient then is.

    Without it XLA's CPU compiler computes a block's output anew in every fusion that reads it, from the block's input, and
    that from the one before: ResNet-110's step took 1.98 s instead of 1.29.
    """
    return lax.optimization_barrier(x) if train and jax.default_backend() == "cpu" else x


def added_in_place(x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h w c"]:
    """x itself, in evaluation on the CPU behind a barrier: for a sum that is the last to read it.

    So XLA sees no other reader, and has oneDNN's convolution add to x where it lies. Else the sum goes to memory of its own,
    which makes every such 1x1 convolution a tenth slower.
    """
    return x if train or jax.default_backend() != "cpu" else lax.optimization_barrier(x)


def in_pieces(
    function: Callable[[jax.Array], jax.Array], x: Float[Array, "n h w c"], stride: int, channels: int, dtype: DTypeLike
) -> Float[Array, "n classes"]:
    """``function(x)``, on the CPU a few images at a time, so that each layer finds in the cache what the one before it left.

    ``stride``, ``channels`` and ``dtype`` are those of the first stage, whose output is the largest.
    """
    if jax.default_backend() != "cpu" or x.ndim != 4 or not all(isinstance(size, int) for size in x.shape):
        return function(x)  # a size without a number is one of a network that is exported
    return cpu.in_pieces(function, x, math.prod(x.shape[1:3]) // stride**2 * channels * jnp.dtype(dtype).itemsize)


def max_pool(x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h2 w2 c"]:
    """The stem's 3x3 maximum at stride 2; the padding of one pixel is -inf, as in ``torch.nn.MaxPool2d(3, 2, 1)``.

    ``train`` changes how the gradient is computed on the CPU, not what it is (see :mod:`jresnet.kernels.cpu`).
    """
    if jax.default_backend() == "cpu":
        return cpu.max_pool_to_train(x) if train else cpu.max_pool_on_cpu(x)
    return cpu.max_pool(x)


def global_average_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n c"]:
    """Mean over H and W, accumulated and returned in float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if jax.default_backend() == "cpu":
        return cpu.average_on_cpu(x, wide)
    return x.astype(wide).mean((1, 2))
