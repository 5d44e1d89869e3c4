"""What some ResNets have beyond He et al.'s: deep stems, other shortcuts, attention, anti-aliasing, GroupNorm.

:class:`Parts` makes each from a configuration, and ``resnet.py`` puts them where they belong. Names of submodules and
their numbers in a list are those of timm's ``models/resnet.py``, for the weights' sake.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jresnet.errors import InputError
from jresnet.kernels import (
    average_halves,
    average_pairs,
    average_same,
    blur,
    blur_dense,
    global_average_pool,
    inverse_sqrt,
    max_pool,
    max_pool_dense,
    relu,
)
from jresnet.models.config import EXPANSION, NORM_GROUPS, STEMS, ResNetConfig
from jresnet.models.layers import BatchNorm, Conv, param, uniform_fan_in

Maps = Float[Array, "n h w c"]


def through(layers: nnx.List, x: Maps, train: bool | None) -> Float[Array, "n h2 w2 c2"]:
    """``x`` through layers one after the other."""
    for layer in layers:
        x = layer(x, train)
    return x


class Function(nnx.Module):
    """A layer without parameters, which has a number in a list all the same."""

    def __init__(self, function: Callable[[Maps], Maps]):
        self.function = function

    def __call__(self, x: Maps, train: bool | None = None) -> Float[Array, "n h2 w2 c"]:
        return self.function(x)


def identity(x: Maps) -> Maps:
    return x


def average_even(x: Maps) -> Float[Array, "n h2 w2 c"]:
    """:func:`average_halves` of a block's maps, where an odd row would be left out and the shortcut would have it.

    Raises:
        InputError: for an odd height or width.
    """
    if any(isinstance(size, int) and size % 2 for size in x.shape[1:3]):
        raise InputError(
            f"this network averages 2x2 pixels in its blocks, and one of them has {x.shape[1]}x{x.shape[2]}: give images "
            "whose height and width are multiples of the network's stride, 32 as a rule"
        )
    return average_halves(x)


class GroupNorm(nnx.Module):
    """Normalisation over the pixels and the channels of each of 32 groups, image by image, as ``torch.nn.GroupNorm``.

    Wu & He 2018, arXiv:1803.08494. Statistics are taken and applied in float32 (float64 for float64 input), and the output
    has the input's dtype. Training and evaluation are the same.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.eps = eps

    def __call__(self, x: Maps, train: bool | None = None) -> Maps:
        channels = x.shape[-1]

        def over_groups(values: Float[Array, "n c"]) -> Float[Array, "n c"]:
            # Each is of equally many pixels, so that their average is the group's.
            grouped = values.reshape(-1, NORM_GROUPS, channels // NORM_GROUPS).mean(-1, keepdims=True)
            return jnp.broadcast_to(grouped, (values.shape[0], NORM_GROUPS, channels // NORM_GROUPS)).reshape(
                values.shape
            )

        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.expand_dims(over_groups(global_average_pool(wide)), (1, 2))
        var = over_groups(global_average_pool(jnp.square(centred)))
        factor = inverse_sqrt(var + self.eps) * self.scale[...]
        return (centred * jnp.expand_dims(factor, (1, 2)) + jnp.expand_dims(self.bias[...], (0, 1, 2))).astype(x.dtype)


class SqueezeExcite(nnx.Module):
    """Each channel times a factor that a network of two layers finds from all channels' averages.

    Hu et al. 2018, arXiv:1709.01507; ``timm.layers.SEModule``, which squeezes to a multiple of 8 channels.
    """

    def __init__(self, channels: int, conv: Callable[..., Conv], reduction: int = 16):
        squeezed = squeezed_channels(channels, reduction)
        self.fc1 = conv(channels, squeezed, 1, bias=True)
        self.fc2 = conv(squeezed, channels, 1, bias=True)

    def __call__(self, x: Maps) -> Maps:
        average = jnp.expand_dims(global_average_pool(x), (1, 2)).astype(x.dtype)
        return x * jax.nn.sigmoid(self.fc2(relu(self.fc1(average)))).astype(x.dtype)


def squeezed_channels(channels: int, reduction: int) -> int:
    """A fraction of the channels, to the nearest multiple of 8, and 8 at least."""
    return max(8, int(channels / reduction + 4) // 8 * 8)


class EfficientChannelAttention(nnx.Module):
    """Each channel times a factor that a convolution along the channels finds from its neighbours' averages.

    Wang et al. 2020, arXiv:1910.03151; ``timm.layers.EcaModule``.

    Args:
        channels: of the network as it was before pruning: their logarithm is the kernel's length.
    """

    def __init__(self, channels: int, rngs: nnx.Rngs | None):
        length = eca_length(channels)
        self.conv = ChannelConv(length, rngs)

    def __call__(self, x: Maps) -> Maps:
        return x * jnp.expand_dims(jax.nn.sigmoid(self.conv(global_average_pool(x))), (1, 2)).astype(x.dtype)


def eca_length(channels: int) -> int:
    """The odd number at or above half of ``log2(channels) + 1``, from 3 (section 3.2.3, with timm's rounding)."""
    half = int((math.log2(channels) + 1) / 2)
    return max(half if half % 2 else half + 1, 3)


class ChannelConv(nnx.Module):
    """A convolution along the channels of averages ``[N, C]``, with zeros beyond both ends: ``torch.nn.Conv1d(1, 1, k)``."""

    def __init__(self, length: int, rngs: nnx.Rngs | None):
        self.kernel = param(uniform_fan_in(length), (length, 1, 1), rngs)

    def __call__(self, averages: Float[Array, "n c"]) -> Float[Array, "n c"]:
        taps = self.kernel[...][:, 0, 0]
        length, channels = len(taps), averages.shape[-1]
        padded = jnp.pad(averages, ((0, 0), (length // 2, length // 2)))
        return sum(padded[:, i : i + channels] * taps[i] for i in range(length))  # type: ignore[return-value]


class Parts:
    """How the layers of a network are made: handed to every block. Of ``None`` a network has none.

    Args:
        config: of the network.
        conv: :class:`Conv` with the network's bias, dtype and random numbers.
        rngs: those of what is no convolution of images.
    """

    def __init__(self, config: ResNetConfig, conv: Callable[..., Conv], rngs: nnx.Rngs | None):
        self.config, self.conv, self.rngs = config, conv, rngs
        self.norm: Callable[[int], BatchNorm | GroupNorm] = GroupNorm if config.norm == "group" else BatchNorm

    def stem(self) -> Conv | nnx.List:
        """The stem's convolution, or its three with normalisation and ReLU between them."""
        kind, outputs = STEMS[self.config.stem], self.config.stem_outputs
        conv = partial(self.conv, kernel_size=kind.kernel, padding=kind.kernel // 2)
        if not kind.inner:
            return conv(self.config.in_channels, outputs, stride=kind.stride)
        layers: list[nnx.Module] = []
        inputs, stride = self.config.in_channels, kind.stride
        for share in kind.inner:
            width = outputs * share // 8
            layers += [conv(inputs, width, stride=stride), self.norm(width), Function(relu)]
            inputs, stride = width, 1
        return nnx.List([*layers, conv(inputs, outputs)])

    def stem_pool(self) -> nnx.List:
        """What halves the stem's output; empty where nothing does."""
        kind, channels = STEMS[self.config.stem], self.config.stem_outputs
        if kind.pool == "conv":
            return nnx.List([self.conv(channels, channels, 3, 2, 1), self.norm(channels), Function(relu)])
        if kind.pool is None:
            return nnx.List([])
        if self.config.antialias == "blur":
            return nnx.List([Function(max_pool_dense), Function(blur)])
        return nnx.List([Function(average_halves if self.config.antialias else max_pool)])

    def projection(self, inputs: int, outputs: int, stride: int, dilations: tuple[int, int]) -> nnx.List:
        """What a block's input goes through where it has not the output's shape.

        Args:
            inputs, outputs: channels.
            stride: of the block.
            dilations: that of the stage before, and that of the block's.
        """
        kind, (before, dilation) = self.config.shortcut, dilations
        if kind == "average":
            pool = average_same if dilation > 1 else average_pairs if stride > 1 else identity
            return nnx.List([Function(pool), self.conv(inputs, outputs, 1), self.norm(outputs)])
        if kind == "projection_3x3" and (stride > 1 or dilation > 1):
            conv = self.conv(inputs, outputs, 3, stride, before, dilation=before)
        else:
            conv = self.conv(inputs, outputs, 1, stride)
        return nnx.List([conv] if kind == "conv" else [conv, self.norm(outputs)])

    def attention(self, stage: int, channels: int) -> SqueezeExcite | EfficientChannelAttention | None:
        """What multiplies the channels of a block's output, of which there are ``channels``."""
        if self.config.attention == "se":
            return SqueezeExcite(channels, self.conv, self.config.reduction or 16)
        if self.config.attention == "eca":
            block = self.config.blocks[stage]
            return EfficientChannelAttention(self.config.widths[stage] * EXPANSION[block], self.rngs)
        return None

    def antialias(self, stride: int, dilations: tuple[int, int]) -> Function | None:
        """What has the stride instead of the convolution before it. Where a stage is dilated instead, a filter stays."""
        kind = self.config.antialias
        if kind is None or (stride == 1 and dilations[0] == dilations[1]):
            return None
        if stride == 1:
            return Function(blur_dense) if kind == "blur" else None
        return Function(blur if kind == "blur" else average_even)
