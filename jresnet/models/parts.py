"""Parts of ResNets that He et al.'s do not have: deep stems, other shortcuts, attention, anti-aliasing, GroupNorm.

:class:`Parts` builds them from a configuration, and ``resnet.py`` uses them. The names of submodules and their indices in
lists are those of timm's ``models/resnet.py``, so that weights can be converted.
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
    """Applies layers one after the other."""
    for layer in layers:
        x = layer(x, train)
    return x


class Function(nnx.Module):
    """A layer without parameters, so that a list of layers has timm's indices."""

    def __init__(self, function: Callable[[Maps], Maps]):
        self.function = function

    def __call__(self, x: Maps, train: bool | None = None) -> Float[Array, "n h2 w2 c"]:
        return self.function(x)


def identity(x: Maps) -> Maps:
    return x


def average_even(x: Maps) -> Float[Array, "n h2 w2 c"]:
    """:func:`average_halves` inside a block, where an odd last row or column would be dropped but the shortcut keeps it.

    Raises:
        InputError: the height or the width is odd.
    """
    if any(isinstance(size, int) and size % 2 for size in x.shape[1:3]):
        raise InputError(
            f"this network averages 2x2 pixels in its blocks, but a block's input has {x.shape[1]}x{x.shape[2]} pixels: "
            "give images whose height and width are multiples of the network's stride, usually 32"
        )
    return average_halves(x)


class GroupNorm(nnx.Module):
    """Group normalisation with 32 groups (Wu & He 2018, arXiv:1803.08494), as ``torch.nn.GroupNorm``.

    Statistics are computed and applied in float32 (float64 for float64 input), and the output has the input's dtype. There
    is no difference between training and evaluation.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.eps = eps

    def __call__(self, x: Maps, train: bool | None = None) -> Maps:
        channels = x.shape[-1]

        def over_groups(values: Float[Array, "n c"]) -> Float[Array, "n c"]:
            # All channels have the same number of pixels, so that the mean of their means is the group's mean.
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
    """Squeeze-and-excitation: scales each channel by a factor that two 1x1 convolutions compute from all channels' means.

    Hu et al. 2018, arXiv:1709.01507; ``timm.layers.SEModule``, which rounds the reduced channels to a multiple of 8.
    """

    def __init__(self, channels: int, conv: Callable[..., Conv], reduction: int = 16):
        squeezed = squeezed_channels(channels, reduction)
        self.fc1 = conv(channels, squeezed, 1, bias=True)
        self.fc2 = conv(squeezed, channels, 1, bias=True)

    def __call__(self, x: Maps) -> Maps:
        average = jnp.expand_dims(global_average_pool(x), (1, 2)).astype(x.dtype)
        return x * jax.nn.sigmoid(self.fc2(relu(self.fc1(average)))).astype(x.dtype)


def squeezed_channels(channels: int, reduction: int) -> int:
    """``channels / reduction`` rounded to the nearest multiple of 8, at least 8."""
    return max(8, int(channels / reduction + 4) // 8 * 8)


class EfficientChannelAttention(nnx.Module):
    """Efficient channel attention: scales each channel by a factor computed from neighbouring channels' means.

    Wang et al. 2020, arXiv:1910.03151; ``timm.layers.EcaModule``.

    Args:
        channels: number of channels before pruning, which determines the kernel's length.
        rngs: source of the initial parameters; ``None``: shapes only.
    """

    def __init__(self, channels: int, rngs: nnx.Rngs | None):
        length = eca_length(channels)
        self.conv = ChannelConv(length, rngs)

    def __call__(self, x: Maps) -> Maps:
        return x * jnp.expand_dims(jax.nn.sigmoid(self.conv(global_average_pool(x))), (1, 2)).astype(x.dtype)


def eca_length(channels: int) -> int:
    """The kernel length of ECA (section 3.2.3): ``(log2(channels) + 1) / 2``, rounded as in timm to an odd number >= 3."""
    half = int((math.log2(channels) + 1) / 2)
    return max(half if half % 2 else half + 1, 3)


class ChannelConv(nnx.Module):
    """A convolution along the channels of ``[N, C]`` with zero padding, as ``torch.nn.Conv1d(1, 1, k)``."""

    def __init__(self, length: int, rngs: nnx.Rngs | None):
        self.kernel = param(uniform_fan_in(length), (length, 1, 1), rngs)

    def __call__(self, averages: Float[Array, "n c"]) -> Float[Array, "n c"]:
        taps = self.kernel[...][:, 0, 0]
        length, channels = len(taps), averages.shape[-1]
        padded = jnp.pad(averages, ((0, 0), (length // 2, length // 2)))
        return sum(padded[:, i : i + channels] * taps[i] for i in range(length))  # type: ignore[return-value]


class Parts:
    """Builds the layers of a network; every block receives it. Methods return None for layers that the network lacks.

    Args:
        config: configuration of the network.
        conv: :class:`Conv` with the network's bias, dtype and random numbers.
        rngs: random numbers for all other layers.
    """

    def __init__(self, config: ResNetConfig, conv: Callable[..., Conv], rngs: nnx.Rngs | None):
        self.config, self.conv, self.rngs = config, conv, rngs
        self.norm: Callable[[int], BatchNorm | GroupNorm] = GroupNorm if config.norm == "group" else BatchNorm

    def stem(self) -> Conv | nnx.List:
        """The stem's convolution, or its three convolutions with normalisation and ReLU between them."""
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
        """The layers that downsample the stem's output by 2; empty if there are none."""
        kind, channels = STEMS[self.config.stem], self.config.stem_outputs
        if kind.pool == "conv":
            return nnx.List([self.conv(channels, channels, 3, 2, 1), self.norm(channels), Function(relu)])
        if kind.pool is None:
            return nnx.List([])
        if self.config.antialias == "blur":
            return nnx.List([Function(max_pool_dense), Function(blur)])
        return nnx.List([Function(average_halves if self.config.antialias else max_pool)])

    def projection(self, inputs: int, outputs: int, stride: int, dilations: tuple[int, int]) -> nnx.List:
        """The layers of a shortcut whose input and output differ in shape.

        Args:
            inputs, outputs: numbers of channels.
            stride: stride of the block.
            dilations: dilation of the previous stage, and of the block's stage.
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
        """The attention module of a block with ``channels`` output channels."""
        if self.config.attention == "se":
            return SqueezeExcite(channels, self.conv, self.config.reduction or 16)
        if self.config.attention == "eca":
            block = self.config.blocks[stage]
            return EfficientChannelAttention(self.config.widths[stage] * EXPANSION[block], self.rngs)
        return None

    def antialias(self, stride: int, dilations: tuple[int, int]) -> Function | None:
        """The filter that has the stride instead of the convolution before it. In a dilated stage, only "blur" has one."""
        kind = self.config.antialias
        if kind is None or (stride == 1 and dilations[0] == dilations[1]):
            return None
        if stride == 1:
            return Function(blur_dense) if kind == "blur" else None
        return Function(blur if kind == "blur" else average_even)
