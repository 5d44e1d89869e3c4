"""What tells one ResNet from another: :class:`ResNetConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jresnet.errors import InputError

Block = Literal["basic", "bottleneck"]
Stem = Literal["imagenet", "cifar", "cifar_pool", "imagenet_no_pool"]
# What a block adds its output to. The letters are the paper's (section 3.3):
#   "pad"              A: every second pixel, zero-padded channels; no parameters
#   "projection"       B: 1x1 convolution and BN where the shape changes, else the input itself
#   "projection_first" B, and also at the first block of a stage that keeps the shape
#   "conv"             B without the BN
Shortcut = Literal["pad", "projection", "projection_first", "conv"]

# Which convolution of a Bottleneck carries the stride of a stage: the 3x3 ("v1.5", torchvision), or the first 1x1 (the
# paper, Caffe's and detectron2's weights, transformers' downsample_in_bottleneck): two functions of the same tensors.
StrideIn = Literal["3x3", "1x1"]

# Kernel size and stride of the stem's convolution, and whether a 3x3 max-pool at stride 2 follows. Those with a pool or
# without are two functions of the same tensors: small images are often given a 3x3 whose max-pool was left in place, or a
# 7x7 whose max-pool was taken out.
STEMS: dict[str, tuple[int, int, bool]] = {
    "imagenet": (7, 2, True),
    "cifar": (3, 1, False),
    "cifar_pool": (3, 1, True),
    "imagenet_no_pool": (7, 2, False),
}

EXPANSION: dict[Block, int] = {"basic": 1, "bottleneck": 4}  # a block's output channels by its stage's width


@dataclass(frozen=True)
class ResNetConfig:
    """Everything that tells one ResNet from another."""

    block: Block
    depths: tuple[int, ...]  # blocks in each stage
    widths: tuple[int, ...] = (64, 128, 256, 512)  # channels of each stage, before a Bottleneck's expansion
    num_classes: int = 1000  # logits; 0: no head, the network gives pooled features
    in_channels: int = 3  # channels of the images
    stem: Stem = "imagenet"  # 7x7 at stride 2 and max-pool, or "cifar": 3x3 at stride 1 and no pool; see STEMS
    shortcut: Shortcut = "projection"
    groups: int = 1  # groups of a Bottleneck's 3x3 (ResNeXt, arXiv:1611.05431: cardinality)
    width_per_group: int = 64  # channels per group in the first stage (Wide ResNet, arXiv:1605.07146: 128)
    conv_bias: bool = False  # biased convolutions: BN makes them redundant, but resnet18_d2l's weights hold them
    # Pixels of an image, a side, for one pixel of the last stage: from where the strides would exceed it, convolutions are
    # dilated instead (torchvision's replace_stride_with_dilation, timm's output_stride). None: as the strides make it.
    output_stride: int | None = None
    stride_in: StrideIn = "3x3"  # a Bottleneck's; a basic block has its stride in its first 3x3

    def __post_init__(self) -> None:
        """Raises :class:`jresnet.InputError` with everything that is wrong."""
        if problems := _problems(self):
            raise InputError("; ".join(problems))
        if self.output_stride == self.full_stride:
            object.__setattr__(self, "output_stride", None)  # one way to write a network without dilation

    @property
    def full_stride(self) -> int:
        """The output stride without dilation: 32 with the ImageNet stem and four stages."""
        return self.stem_stride * 2 ** (len(self.depths) - 1)

    @property
    def stem_stride(self) -> int:
        """Pixels of an image, a side, for one pixel of the stem's output."""
        _, stride, pool = STEMS[self.stem]
        return stride * 2 if pool else stride

    @property
    def strides(self) -> tuple[tuple[int, int], ...]:
        """The stride of each stage, and the dilation of its 3x3 convolutions from the first block's second one on.

        The stage's first 3x3 convolution has the dilation of the stage before.
        """
        found, total, dilation = [], self.stem_stride, 1
        for stage in range(len(self.depths)):
            stride = 2 if stage else 1
            if total * stride > (self.output_stride or self.full_stride):
                dilation, stride = dilation * stride, 1
            total *= stride
            found.append((stride, dilation))
        return tuple(found)

    @property
    def num_features(self) -> int:
        """Channels of the last stage's output, and so of the pooled features that the head takes."""
        return self.widths[-1] * EXPANSION[self.block]


MOST = 1_000_000  # of anything that is counted: more would be wrong, and XLA ends the process where memory lacks
KINDS: dict[str, tuple[str, ...]] = {
    "block": get_args(Block),
    "stem": get_args(Stem),
    "shortcut": get_args(Shortcut),
    "stride_in": get_args(StrideIn),
}


def _problems(config: ResNetConfig) -> list[str]:
    def counts(value: object, least: int = 1) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    problems = [
        f"{name} must be {' or '.join(map(repr, kinds))}, got {getattr(config, name)!r}"
        for name, kinds in KINDS.items()
        if getattr(config, name) not in kinds
    ]
    for name in ("num_classes", "in_channels", "groups", "width_per_group"):
        least = 0 if name == "num_classes" else 1
        if not counts(value := getattr(config, name), least):
            problems.append(f"{name} must be a whole number of at least {least}, got {value!r:.80}")
        elif value > MOST:
            problems.append(
                f"{name} must be at most {MOST:,}, got {value if value < 10**20 else 'one of more than 20 digits'}"
            )
    for name in ("depths", "widths"):
        value = getattr(config, name)
        if not isinstance(value, tuple) or not value or not all(map(counts, value)):
            problems.append(f"{name} must be a tuple of whole numbers of at least 1, got {value!r}")
    if not isinstance(config.conv_bias, bool):
        problems.append(f"conv_bias must be True or False, got {config.conv_bias!r}")
    if problems:
        return problems
    if config.output_stride is not None:
        fitting = [config.stem_stride * 2**stage for stage in range(len(config.depths))]
        if not counts(config.output_stride) or config.output_stride not in fitting:
            problems.append(
                f"output_stride must be {' or '.join(map(str, fitting))} for {len(fitting)} stages and the "
                f"{config.stem} stem, got {config.output_stride!r}"
            )
    if len(config.depths) != len(config.widths):
        problems.append(
            f"there are {len(config.depths)} depths and {len(config.widths)} widths: give both for each stage"
        )
    if config.block == "basic" and (config.groups, config.width_per_group) != (1, 64):
        problems.append(
            f"groups {config.groups} and width_per_group {config.width_per_group} are for bottlenecks: "
            "basic blocks have 1 and 64"
        )
    if config.block == "basic" and config.stride_in != "3x3":
        problems.append(f"stride_in {config.stride_in!r} is for bottlenecks: basic blocks have 3x3 convolutions only")
    if config.block == "bottleneck" and min(config.widths) * config.width_per_group < 64:
        problems.append(
            f"width_per_group {config.width_per_group} leaves a stage of {min(config.widths)} without channels"
        )
    if config.shortcut == "pad" and config.block != "basic":
        problems.append("shortcut 'pad' is defined for basic blocks (He et al. 2016, section 4.2), not for bottlenecks")
    if config.shortcut == "pad" and list(config.widths) != sorted(config.widths):
        problems.append(f"shortcut 'pad' needs widths that never fall, got {config.widths}")
    return problems
