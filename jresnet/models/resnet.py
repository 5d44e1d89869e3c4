"""ResNets (He et al. 2016, arXiv:1512.03385) in Flax NNX: the file to read first.

    images [N, H, W, C] -> stem -> layer1 ... layer4 (or layer3) -> global average -> fc -> logits [N, num_classes]

Submodules carry torchvision's names, so that a weight's path differs from PyTorch's key only in its leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jresnet.errors import InputError
from jresnet.kernels import add_relu, every_second, global_average_pool, max_pool, relu
from jresnet.models.layers import BatchNorm, Conv, Linear

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Block = Literal["basic", "bottleneck"]
Stem = Literal["imagenet", "cifar"]
# What a block adds its output to. The letters are the paper's (section 3.3):
#   "pad"              A: every second pixel, zero-padded channels; no parameters
#   "projection"       B: 1x1 convolution and BN where the shape changes, else the input itself
#   "projection_first" B, and also at the first block of a stage that keeps the shape
#   "conv"             B without the BN
Shortcut = Literal["pad", "projection", "projection_first", "conv"]


@dataclass(frozen=True)
class ResNetConfig:
    """Everything that tells one ResNet from another."""

    block: Block
    depths: tuple[int, ...]  # blocks in each stage
    widths: tuple[int, ...] = (64, 128, 256, 512)  # channels of each stage, before a Bottleneck's expansion
    num_classes: int = 1000  # logits
    in_channels: int = 3  # channels of the images
    stem: Stem = "imagenet"  # 7x7 at stride 2 and max-pool, or "cifar": 3x3 at stride 1 and no pool
    shortcut: Shortcut = "projection"
    groups: int = 1  # groups of a Bottleneck's 3x3 (ResNeXt, arXiv:1611.05431: cardinality)
    width_per_group: int = 64  # channels per group in the first stage (Wide ResNet, arXiv:1605.07146: 128)
    conv_bias: bool = False  # biased convolutions: BN makes them redundant, but resnet18_d2l's weights hold them

    def __post_init__(self) -> None:
        """Raises :class:`jresnet.InputError` with everything that is wrong."""
        if problems := _problems(self):
            raise InputError("; ".join(problems))


KINDS: dict[str, tuple[str, ...]] = {"block": get_args(Block), "stem": get_args(Stem), "shortcut": get_args(Shortcut)}


def _problems(config: ResNetConfig) -> list[str]:
    def counts(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    problems = [
        f"{name} must be {' or '.join(map(repr, kinds))}, got {getattr(config, name)!r}"
        for name, kinds in KINDS.items()
        if getattr(config, name) not in kinds
    ]
    for name in ("num_classes", "in_channels", "groups", "width_per_group"):
        if not counts(value := getattr(config, name)):
            problems.append(f"{name} must be a whole number of at least 1, got {value!r}")
    for name in ("depths", "widths"):
        value = getattr(config, name)
        if not isinstance(value, tuple) or not value or not all(map(counts, value)):
            problems.append(f"{name} must be a tuple of whole numbers of at least 1, got {value!r}")
    if problems:
        return problems
    if len(config.depths) != len(config.widths):
        problems.append(
            f"there are {len(config.depths)} depths and {len(config.widths)} widths: give both for each stage"
        )
    if config.block == "basic" and (config.groups, config.width_per_group) != (1, 64):
        problems.append(
            f"groups {config.groups} and width_per_group {config.width_per_group} are for bottlenecks: "
            "basic blocks have 1 and 64"
        )
    if config.block == "bottleneck" and min(config.widths) * config.width_per_group < 64:
        problems.append(
            f"width_per_group {config.width_per_group} leaves a stage of {min(config.widths)} without channels"
        )
    if config.shortcut == "pad" and config.block != "basic":
        problems.append("shortcut 'pad' is defined for basic blocks (He et al. 2016, section 4.2), not for bottlenecks")
    return problems


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions; the stride is on the first. Paper: figure 5, left."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, config: ResNetConfig, downsample: list, conv: Callable):
        self.conv1 = conv(inplanes, planes, 3, stride, 1)
        self.bn1 = BatchNorm(planes)
        self.conv2 = conv(planes, planes, 3, 1, 1)
        self.bn2 = BatchNorm(planes)
        self.downsample = nnx.List(downsample)

    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h2 w2 c2"]:
        y = relu(self.bn1(self.conv1(x), train))
        y = self.bn2(self.conv2(y), train)
        return add_relu(y, shortcut(self.downsample, x, y.shape[-1], train))


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 convolutions; the stride is on the 3x3 ("v1.5", as torchvision), not on the first 1x1 (paper)."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int, config: ResNetConfig, downsample: list, conv: Callable):
        width = planes * config.width_per_group // 64 * config.groups
        self.conv1 = conv(inplanes, width, 1)
        self.bn1 = BatchNorm(width)
        self.conv2 = conv(width, width, 3, stride, 1, config.groups)
        self.bn2 = BatchNorm(width)
        self.conv3 = conv(width, planes * self.expansion, 1)
        self.bn3 = BatchNorm(planes * self.expansion)
        self.downsample = nnx.List(downsample)

    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h2 w2 c2"]:
        y = relu(self.bn1(self.conv1(x), train))
        y = relu(self.bn2(self.conv2(y), train))
        y = self.bn3(self.conv3(y), train)
        return add_relu(y, shortcut(self.downsample, x, y.shape[-1], train))


def shortcut(
    downsample: nnx.List, x: Float[Array, "n h w c"], channels: int, train: bool
) -> Float[Array, "n h2 w2 c2"]:
    """The input as the block's output can take it: projected by ``downsample``, padded (option A), or unchanged."""
    if downsample:
        conv, *norm = downsample  # a 1x1 convolution, then its BN unless the kind is "conv"
        return norm[0](conv(x), train) if norm else conv(x)
    if x.shape[-1] == channels:
        return x
    new = channels - x.shape[-1]
    return jnp.pad(every_second(x), ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


# block(x, train), whose backward pass keeps x alone and computes the rest again
_rematerialized: Callable = nnx.remat(lambda block, x, train: block(x, train), static_argnums=2)


class ResNet(nnx.Module):
    """A ResNet; :func:`jresnet.create` builds one by name.

    Evaluation is the default. ``model(x, train=True)`` normalises with the batch's statistics and updates the running
    ones in place.

    Args:
        config: what to build.
        zero_init_residual: start each block's last BN scale at 0, so that every block begins as its shortcut
            (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        dtype: what the convolutions compute in, for example ``jnp.bfloat16``. Parameters, BN statistics, the global
            average and the logits stay float32. ``None``: the wider of the input's and the parameters' dtypes.
        remat: in training, keep only each block's input for the backward pass and compute the rest again there: less
            memory for a third more arithmetic (Chen et al. 2016, arXiv:1604.06174; ``torch.utils.checkpoint``).
        rngs: the source of the initial parameters; ``None`` leaves their shapes alone, to be filled from a file.
    """

    def __init__(
        self,
        config: ResNetConfig,
        *,
        zero_init_residual: bool = False,
        dtype: DTypeLike | None = None,
        remat: bool = False,
        rngs: nnx.Rngs | None,
    ):
        conv = partial(Conv, bias=config.conv_bias, dtype=dtype, rngs=rngs)
        block: type[BasicBlock | Bottleneck] = Bottleneck if config.block == "bottleneck" else BasicBlock
        self.config, self.remat = config, remat
        inplanes = config.widths[0]
        self.conv1 = conv(config.in_channels, inplanes, *((3, 1, 1) if config.stem == "cifar" else (7, 2, 3)))
        self.bn1 = BatchNorm(inplanes)
        for i, (depth, planes) in enumerate(zip(config.depths, config.widths, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                outplanes = planes * block.expansion
                projects = stride > 1 or inplanes != outplanes or (config.shortcut == "projection_first" and j == 0)
                downsample: list[nnx.Module] = []
                if projects and config.shortcut != "pad":
                    downsample.append(conv(inplanes, outplanes, 1, stride))
                    if config.shortcut != "conv":
                        downsample.append(BatchNorm(outplanes))
                blocks.append(block(inplanes, planes, stride, config, downsample, conv))
                if zero_init_residual:
                    last = blocks[-1].bn3 if isinstance(blocks[-1], Bottleneck) else blocks[-1].bn2
                    last.scale[...] = jnp.zeros_like(last.scale[...])
                inplanes = outplanes
            setattr(self, f"layer{i + 1}", nnx.List(blocks))
        self.fc = Linear(inplanes, config.num_classes, rngs=rngs)

    def features(self, x: Float[Array, "n h w c"], train: bool = False) -> dict[str, Float[Array, "n h2 w2 c2"]]:
        """Every stage's output by its name: ``stem``, ``layer1``, ``layer2``, ...; arguments and errors as the call."""
        x = checked(x, self.config.in_channels)
        x = relu(self.bn1(self.conv1(x), train))
        if self.config.stem == "imagenet":
            x = max_pool(x)
        outputs = {"stem": x}
        for i in range(len(self.config.depths)):
            for block in getattr(self, f"layer{i + 1}"):
                x = _rematerialized(block, x, train) if self.remat and train else block(x, train)
            outputs[f"layer{i + 1}"] = x
        return outputs

    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n classes"]:
        """Logits of normalised images.

        Args:
            x: floating-point images ``[N, H, W, in_channels]``; H and W are free (224 for the ImageNet stem, 32 for
                the CIFAR stem, as a rule).
            train: normalise with this batch's statistics, and update the running ones.

        Returns:
            ``[N, num_classes]``, float32 or wider.

        Raises:
            ValueError: for another rank or number of channels, or, in training, one value per channel.
            TypeError: for integer images.
        """
        x = self.features(x, train)[f"layer{len(self.config.depths)}"]
        return self.fc(global_average_pool(x))


def checked(x: Float[Array, "n h w c"], channels: int) -> Float[Array, "n h w c"]:
    """``x`` as an array of JAX's.

    Raises:
        ValueError: for another rank or number of channels.
        TypeError: for integers.
    """
    x = jnp.asarray(x)  # numpy's float64 becomes JAX's default
    if x.ndim != 4 or x.shape[-1] != channels:
        raise ValueError(f"expected images [N, H, W, {channels}] (channels last), got shape {tuple(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"expected normalised floating-point images, got {x.dtype}: (x / 255 - mean) / std, say")
    return x
