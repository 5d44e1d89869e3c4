"""A trained network made faster for inference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jresnet.errors import InputError
from jresnet.models.layers import BatchNorm, Conv, Fused
from jresnet.models.resnet import ResNet


def fuse(model: ResNet) -> ResNet:
    """The same function for inference, with every BatchNorm folded into the convolution before it.

    A convolution followed by BN in evaluation is a convolution with another kernel and bias (Jacob et al. 2018,
    arXiv:1712.05877, section 3.2; ``torch.nn.utils.fuse_conv_bn_weights``). They are computed in float64 and rounded once.
    On the CPU, inside ``jax.jit``, a batch goes through in pieces that fit the cache (:func:`jresnet.kernels.cpu.in_pieces`).

    >>> import jax.numpy as jnp, jresnet
    >>> fused = jresnet.fuse(jresnet.create("resnet20_cifar"))
    >>> fused(jnp.zeros((2, 32, 32, 3))).shape
    (2, 10)

    Args:
        model: stays as it is.

    Returns:
        A model with the same submodules whose convolutions have biases. It cannot be trained, saved or fused again.

    Raises:
        InputError: for a model that is fused already.
    """
    if isinstance(model.bn1, Fused):
        raise InputError("this model is fused already: its convolutions hold what was its BatchNorm")
    fused = nnx.clone(model)
    for owner, conv, name in _pairs(fused):
        norm: BatchNorm = owner[name] if isinstance(name, int) else getattr(owner, name)
        kernel, mean, var, scale, bias = (
            np.asarray(value[...], np.float64) for value in (conv.kernel, norm.mean, norm.var, norm.scale, norm.bias)
        )
        factor = scale / np.sqrt(var + norm.eps)
        start = 0.0 if conv.bias is None else np.asarray(conv.bias[...], np.float64)
        dtype = conv.kernel[...].dtype
        conv.bias = nnx.data(nnx.Param(jnp.asarray(bias + (start - mean) * factor, dtype)))
        conv.kernel[...] = jnp.asarray(kernel * factor, dtype)
        if isinstance(name, int):
            owner[name] = Fused()
        else:
            setattr(owner, name, Fused())
    return fused


def _pairs(model: ResNet) -> Iterator[tuple[Any, Conv, str | int]]:
    """Every BatchNorm as its owner and the name there, with the convolution before it."""
    yield model, model.conv1, "bn1"
    for i in range(len(model.config.depths)):
        for block in getattr(model, f"layer{i + 1}"):
            for j in (1, 2, 3):
                if hasattr(block, f"bn{j}"):
                    yield block, getattr(block, f"conv{j}"), f"bn{j}"
            if len(block.downsample) == 2:
                yield block.downsample, block.downsample[0], 1
