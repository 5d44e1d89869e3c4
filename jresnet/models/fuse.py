"""Folds BatchNorm into the convolutions of a trained network for faster inference (:func:`fuse`)."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jresnet.errors import InputError
from jresnet.kernels import in_pieces
from jresnet.models.layers import BatchNorm, Conv, Images
from jresnet.models.resnet import ResNet, checked

_UNTRAINABLE = "a fused model has no BatchNorm left to train: train the model that was passed to jresnet.fuse"


class Fused(nnx.Module):
    """The identity, which replaces a BatchNorm that :func:`fuse` folded into the preceding convolution."""

    def __call__(self, x: Float[Array, "n h w c"], train: bool | None = None) -> Float[Array, "n h w c"]:
        if train:
            raise InputError(_UNTRAINABLE)
        return x


class FusedResNet(ResNet):
    """A ResNet without BatchNorm, for inference only; returned by :func:`fuse`."""

    def train(self, **attributes: Any) -> None:
        """Raises :class:`InputError`."""
        raise InputError(_UNTRAINABLE)

    def __call__(self, x: Images, train: bool | None = None) -> Float[Array, "n classes"]:
        """As :class:`ResNet` in evaluation mode. Inside ``jax.jit`` on a CPU, a batch is split to fit the cache."""
        if train or not isinstance(x, jax.core.Tracer):
            return super().__call__(x, train)
        config, x = self.config, checked(x, self.config.in_channels)
        first = self.conv1[0] if isinstance(self.conv1, nnx.List) else self.conv1
        kernel = first.kernel[...]
        dtype = jnp.dtype(first.dtype or jnp.promote_types(x.dtype, kernel.dtype))
        pooled = (x.shape[0], config.num_features), jnp.promote_types(dtype, jnp.float32)
        logits = jax.eval_shape(lambda pooled: self._head(pooled, train), jax.ShapeDtypeStruct(*pooled))
        # The first stage has the largest output, unless later stages are dilated.
        strides = accumulate((stride for stride, _ in config.strides), operator.mul, initial=config.stem_stride)
        stages = zip(list(strides)[1:], config.outputs, strict=True)
        stride, width = max(stages, key=lambda stage: stage[1] / stage[0] ** 2)
        pixels = math.prod(x.shape[1:3]) // stride**2
        return in_pieces(
            *_as_a_function(self, x),
            outputs=(logits.shape[-1], logits.dtype),
            bytes_an_image=pixels * width * dtype.itemsize,
        )


def _as_a_function(model: FusedResNet, x: jax.Array) -> tuple[Any, ...]:
    """The model as a function of images and of the weights that jit traces; returns it, the images and these weights."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    traced = [leaf for leaf in leaves if isinstance(leaf, jax.core.Tracer)]
    constants = [None if isinstance(leaf, jax.core.Tracer) else leaf for leaf in leaves]

    def logits(x: jax.Array, *weights: jax.Array) -> jax.Array:
        given = iter(weights)
        filled = [next(given) if leaf is None else leaf for leaf in constants]
        return ResNet.__call__(nnx.merge(graph, jax.tree.unflatten(tree, filled)), x)

    return logits, x, *traced


def fuse(model: ResNet) -> FusedResNet:
    """Returns a copy of a model for inference, with every BatchNorm folded into the preceding convolution.

    In evaluation mode, a convolution followed by BN equals one convolution with another kernel and bias (Jacob et al. 2018,
    arXiv:1712.05877, section 3.2; ``torch.nn.utils.fuse_conv_bn_weights``). Kernel and bias are computed in float64 and
    rounded once.

    >>> import jax.numpy as jnp, jresnet
    >>> fused = jresnet.fuse(jresnet.create("resnet20_cifar"))
    >>> fused(jnp.zeros((2, 32, 32, 3))).shape
    (2, 10)

    Args:
        model: the model, which is not changed.

    Returns:
        A model in evaluation mode with the same submodules, whose convolutions have biases. It cannot be trained, saved
        or fused again.

    Raises:
        InputError: the model is already fused, or has a BatchNorm without a preceding convolution.
    """
    if isinstance(model, FusedResNet):
        raise InputError("this model is already fused: use it as it is")
    fused = nnx.clone(model)
    fused.eval()
    for path, owner, name, conv in list(_norms(fused)):
        if conv is None:
            raise InputError(f"{'.'.join(map(str, path))} cannot be folded: there is no convolution before it")
        _fold(conv, _child(owner, name))
        if isinstance(name, int):
            owner[name] = Fused()
        else:
            setattr(owner, name, Fused())
    object.__setattr__(fused, "__class__", FusedResNet)  # nnx's __setattr__ would register it as a submodule
    return fused  # type: ignore[return-value]


def _fold(conv: Conv, norm: BatchNorm) -> None:
    kernel, mean, var, scale, bias = (
        np.asarray(value[...], np.float64) for value in (conv.kernel, norm.mean, norm.var, norm.scale, norm.bias)
    )
    factor = scale / np.sqrt(var + norm.eps)
    start = 0.0 if conv.bias is None else np.asarray(conv.bias[...], np.float64)
    dtype = conv.kernel[...].dtype
    conv.bias = nnx.data(nnx.Param(jnp.asarray(bias + (start - mean) * factor, dtype)))
    conv.kernel[...] = jnp.asarray(kernel * factor, dtype)


def _norms(model: ResNet) -> Iterator[tuple[tuple[Any, ...], Any, Any, Conv | None]]:
    """Yields for every BatchNorm its path, owner, attribute name, and the preceding convolution (``conv1`` for ``bn1``)."""
    modules = {path: module for path, module in nnx.iter_graph(model) if isinstance(module, nnx.Module)}
    for path, module in modules.items():
        if isinstance(module, BatchNorm):
            *above, name = path
            before = name - 1 if isinstance(name, int) else str(name).replace("bn", "conv")
            conv = modules.get((*above, before))
            if isinstance(conv, nnx.List):  # a stem with several convolutions
                conv = conv[-1]
            yield path, modules[tuple(above)], name, conv if isinstance(conv, Conv) else None


def _child(owner: Any, name: str | int) -> Any:
    return owner[name] if isinstance(name, int) else getattr(owner, name)
