"""Layers with PyTorch's arithmetic: convolution, batch normalisation and linear.

Images are NHWC and kernels HWIO. Padding is the same integer on both sides, as in PyTorch; ``SAME`` would shift strided
windows by a pixel. Parameters are float32. ``dtype`` is a layer's compute dtype; ``None`` promotes the dtypes of input and
parameters, so that a model whose leaves were cast to float64 computes in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jresnet import kernels
from jresnet.errors import InputError

Images = Float[Array | np.ndarray, "n h w c"]  # the input of a model, a JAX or numpy array
Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]


_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}


def as_dtype(dtype: Any) -> np.dtype | None:
    """Converts a JAX or numpy dtype or its name (also ``bf16``, ``fp32``) to a floating-point dtype; None stays None.

    Raises:
        InputError: the argument is anything else.
    """
    if dtype is None:
        return None
    try:
        found = jnp.dtype(_SHORT.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise InputError(f"dtype must be a floating-point dtype such as 'bfloat16' or 'float32', got {dtype!r}")
    return found


@jax.jit
def _normal_block(key: jax.Array, index: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, index), (2**16,), jnp.float32)


def kaiming_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Kaiming initialisation (He et al. 2015) of an HWIO kernel: ``torch.nn.init.kaiming_normal_(mode="fan_out")``.

    Values are drawn in blocks of one size, because XLA would compile the generator for every shape, in up to a second.
    """
    blocks = [_normal_block(key, np.uint32(i)) for i in range(-(-math.prod(shape) // 2**16))]
    fan_out = math.prod(shape[:-2]) * shape[-1]  # PyTorch does not divide by the groups either
    std, values = np.float32(math.sqrt(2.0 / fan_out)), math.prod(shape)
    if isinstance(blocks[0], jax.core.Tracer):
        return jnp.concatenate(blocks)[:values].reshape(shape) * std
    return jnp.asarray(np.concatenate(blocks)[:values].reshape(shape) * std)  # numpy, so that nothing is compiled


def uniform_fan_in(fan_in: int) -> Init:
    """PyTorch's default initialisation of ``nn.Linear`` weights and of every bias: uniform in ±1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def param(init: Init, shape: tuple[int, ...], rngs: nnx.Rngs | None) -> nnx.Param:
    """A parameter drawn from ``init``. With ``rngs=None`` only its float32 shape, to be filled from a file."""
    return nnx.Param(init(rngs.params(), shape) if rngs else jax.ShapeDtypeStruct(shape, jnp.float32))


class Conv(nnx.Module):
    """2-D convolution (cross-correlation) with zero padding, as ``torch.nn.Conv2d``.

    ``[N, H, W, in_channels] -> [N, H', W', out_channels]`` with
    ``H' = (H + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1``.
    The kernel is ``[kernel_size, kernel_size, in_channels // groups, out_channels]``.
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
        dilation: int = 1,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None,
    ):
        assert stride == 1 or dilation == 1, "a convolution cannot have both a stride and a dilation"
        shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        self.kernel = param(kaiming_normal, shape, rngs)
        self.bias = param(uniform_fan_in(math.prod(shape[:3])), shape[3:], rngs) if bias else None
        self.stride, self.padding, self.groups, self.dilation, self.dtype = stride, padding, groups, dilation, dtype

    def __call__(self, x: Float[Array, "n h w c"], train: bool | None = None) -> Float[Array, "n h2 w2 c2"]:
        del train  # has no effect; all layers have the same signature
        kernel = self.kernel[...]
        dtype = self.dtype or jnp.promote_types(x.dtype, kernel.dtype)
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        if self.dilation > 1:
            y = kernels.convolve_dilated(x, kernel, self.dilation, self.padding, self.groups)
        else:
            y = kernels.convolve(x, kernel, self.stride, self.padding, self.groups)
        return y if self.bias is None else y + jnp.expand_dims(self.bias[...].astype(dtype), (0, 1, 2))


@partial(jax.jit, static_argnums=2)  # traced once for each number of channels
def _newer(running, new, momentum):
    return (1 - momentum) * running + momentum * new.astype(running.dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation over N, H and W, as ``torch.nn.BatchNorm2d`` (Ioffe & Szegedy 2015).

    ``momentum`` is the weight of the newest batch, as in PyTorch; in Flax it is the weight of the old average. Training
    normalises with the batch's biased variance, and updates the running average with the unbiased one, which is larger by
    the factor n / (n - 1). Statistics are computed, stored and applied in float32 (float64 for float64 input), whatever the
    input's dtype. The output has the input's dtype.

    ``use_running_average`` is the mode, set by ``model.train()`` and ``model.eval()`` as in ``nnx.BatchNorm``. The argument
    ``train`` of a call takes precedence over it. ``frozen``, set by ``model.freeze_statistics()``, takes precedence over
    both: the layer then uses the running statistics and does not update them, even in training.

    Raises:
        ValueError: in training, a batch has only one value per channel, so that the unbiased variance is undefined.
    """

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5):
        zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        self.scale = nnx.Param(jnp.array(ones))
        self.bias = nnx.Param(jnp.array(zeros))
        self.mean = nnx.BatchStat(jnp.array(zeros))
        self.var = nnx.BatchStat(jnp.array(ones))
        self.momentum, self.eps = momentum, eps
        self.use_running_average = True
        self.frozen = False

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the mode of a copy; called by ``nnx.view``."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: Float[Array, "n h w c"], train: bool | None = None) -> Float[Array, "n h w c"]:
        scale, bias = self.scale[...], self.bias[...]
        if self.frozen or (self.use_running_average if train is None else not train):
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            factor = kernels.inverse_sqrt(self.var[...] + self.eps) * scale
            mean, factor, bias = (jnp.expand_dims(value, (0, 1, 2)) for value in (self.mean[...], factor, bias))
            return ((wide - mean) * factor + bias).astype(x.dtype)
        n = math.prod(x.shape[:-1])
        if isinstance(n, int) and n < 2:  # n is symbolic if a program is exported for batches of any size
            raise ValueError(
                f"training needs more than one value per channel, got activations of shape {x.shape}: "
                "use a larger batch or larger images"
            )
        y, mean, var = kernels.normalise(x, scale, bias, self.mean[...], self.eps)
        for running, new in ((self.mean, mean), (self.var, var * (n / (n - 1)))):
            # Not running[...] = value: that queries a traced value's sharding, which takes time quadratic in the depth.
            running.set_value(_newer(running[...], lax.stop_gradient(new), self.momentum))
        return y


class Linear(nnx.Module):
    """Linear layer ``[N, in_features] -> [N, out_features]``; the kernel is ``torch.nn.Linear``'s weight transposed."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs | None):
        self.kernel = param(uniform_fan_in(in_features), (in_features, out_features), rngs)
        self.bias = param(uniform_fan_in(in_features), (out_features,), rngs)

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d2"]:
        return x @ self.kernel[...] + jnp.expand_dims(self.bias[...], 0)
