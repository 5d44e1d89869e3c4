"""The configuration of a ResNet: :class:`ResNetConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from jresnet.errors import InputError

Block = Literal["basic", "bottleneck"]
Stem = Literal["imagenet", "cifar", "cifar_pool", "imagenet_no_pool", "deep", "deep_tiered", "deep_conv"]
# The kind of shortcut connection. A and B are the options of the paper (section 3.3):
#   "pad"              A: subsampling (every second pixel) and zero-padded channels; no parameters
#   "projection"       B: 1x1 convolution and BN where the shape changes, else the identity
#   "projection_first" B, and a projection also in the first block of a stage that keeps the shape
#   "conv"             B without the BN
#   "average"          B, in strided blocks with 2x2 average pooling before the convolution (ResNet-D, arXiv:1812.01187)
#   "projection_3x3"   B, in strided blocks with a 3x3 convolution (SENet-154)
Shortcut = Literal["pad", "projection", "projection_first", "conv", "average", "projection_3x3"]

# Which convolution of a Bottleneck has the stride of a stage: the 3x3 ("v1.5", torchvision), or the first 1x1 (the paper,
# Caffe's and detectron2's weights, transformers' downsample_in_bottleneck). Both are valid for the same tensors.
StrideIn = Literal["3x3", "1x1"]

# Channel attention: a factor per channel that multiplies a block's output before the shortcut is added:
#   "se"   squeeze-and-excitation (arXiv:1709.01507)
#   "eca"  efficient channel attention (arXiv:1910.03151)
Attention = Literal["se", "eca"]

# Anti-aliased downsampling: strided convolutions get stride 1, and a filter after them has the stride:
#   "blur"     a 3x3 binomial filter (arXiv:1904.11486); also after the stem's max-pool, which gets stride 1
#   "average"  2x2 average pooling; also replaces the stem's max-pool
Antialias = Literal["blur", "average"]

Norm = Literal["group"]  # the layer that replaces BatchNorm: GroupNorm with 32 groups (arXiv:1803.08494)


class StemKind(NamedTuple):
    """The layers of a stem."""

    kernel: int  # kernel size of each convolution
    stride: int  # stride of the first convolution
    # layer of stride 2 at the end: a 3x3 max-pool, or a 3x3 convolution, BN and ReLU
    pool: Literal["max", "conv"] | None
    inner: tuple[int, ...] = ()  # output channels of all convolutions but the last, in eighths of the last one's


# Stems with and without a pool can have the same tensors: networks for small images are often a 3x3 stem that keeps the
# max-pool, or a 7x7 stem without it. The deep stems are those of ResNet-C and -D (arXiv:1812.01187), of timm's "t" networks
# and of ResNet-RS (arXiv:2103.07579).
STEMS: dict[str, StemKind] = {
    "imagenet": StemKind(7, 2, "max"),
    "cifar": StemKind(3, 1, None),
    "cifar_pool": StemKind(3, 1, "max"),
    "imagenet_no_pool": StemKind(7, 2, None),
    "deep": StemKind(3, 2, "max", (4, 4)),
    "deep_tiered": StemKind(3, 2, "max", (3, 4)),
    "deep_conv": StemKind(3, 2, "conv", (4, 4)),
}

EXPANSION: dict[Block, int] = {"basic": 1, "bottleneck": 4}  # a block's output channels divided by its stage's width


@dataclass(frozen=True)
class ResNetConfig:
    """All settings that define the architecture of a ResNet."""

    block: Block | tuple[Block, ...]  # block type of all stages, or one per stage
    depths: tuple[int, ...]  # number of blocks in each stage
    widths: tuple[int, ...] = (64, 128, 256, 512)  # channels of each stage, before a Bottleneck's expansion
    num_classes: int = 1000  # number of logits; 0: no head, the network returns pooled features
    in_channels: int = 3  # channels of the images
    stem: Stem = "imagenet"  # 7x7 at stride 2 and max-pool, or "cifar": 3x3 at stride 1 and no pool; see STEMS
    shortcut: Shortcut = "projection"
    groups: int = 1  # groups of a Bottleneck's 3x3 (ResNeXt, arXiv:1611.05431: cardinality)
    width_per_group: int = 64  # channels per group in the first stage (Wide ResNet, arXiv:1605.07146: 128)
    conv_bias: bool = False  # convolutions with a bias: redundant before BN, but resnet18_d2l's weights contain them
    # Ratio of the image's height and width to the last stage's. Where the strides would exceed it, convolutions are dilated
    # instead (torchvision's replace_stride_with_dilation, timm's output_stride). None: no dilation.
    output_stride: int | None = None
    stride_in: StrideIn = "3x3"  # for Bottlenecks; a basic block has its stride in its first 3x3
    # The remaining fields are None in most networks, and None is left out of files.
    stem_channels: int | None = None  # output channels of the stem; None: the first stage's width
    attention: Attention | None = None
    reduction: int | None = None  # "se" reduces the channels by this factor, to a multiple of 8; None: by 16
    antialias: Antialias | None = None
    norm: Norm | None = None  # None: BatchNorm
    # Divides the output channels of a Bottleneck's first convolution; 2 in SENet-154, to save arithmetic (arXiv:1709.01507,
    # section 6.1).
    reduce_first: int | None = None
    # Channels after pruning (arXiv:2002.08258): for each stage its output channels, and for each of its blocks those of the
    # first and the second convolution. `widths` are those before pruning, which determine the size of ECA's kernels.
    pruned: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] | None = None

    def __post_init__(self) -> None:
        """Raises :class:`jresnet.InputError` that lists all invalid fields."""
        if problems := _problems(self):
            raise InputError("; ".join(problems))
        if self.output_stride == self.full_stride:
            object.__setattr__(self, "output_stride", None)  # so that equal networks have equal configurations

    @property
    def full_stride(self) -> int:
        """The output stride without dilation: 32 with the ImageNet stem and four stages."""
        return self.stem_stride * 2 ** (len(self.depths) - 1)

    @property
    def stem_stride(self) -> int:
        """The ratio of the image's height and width to those of the stem's output."""
        stem = STEMS[self.stem]
        return stem.stride * 2 if stem.pool else stem.stride

    @property
    def strides(self) -> tuple[tuple[int, int], ...]:
        """The stride of each stage and the dilation of its 3x3 convolutions.

        The dilation applies to all 3x3 convolutions of the stage but the first, which has the previous stage's dilation.
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
    def blocks(self) -> tuple[Block, ...]:
        """The block type of each stage."""
        return self.block if isinstance(self.block, tuple) else (self.block,) * len(self.depths)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The output channels of each stage."""
        if self.pruned is not None:
            return tuple(outputs for outputs, _ in self.pruned)
        return tuple(planes * EXPANSION[block] for block, planes in zip(self.blocks, self.widths, strict=True))

    def channels(self, stage: int, block: int) -> tuple[int, int, int]:
        """Output channels of a block's first and second convolution, and of the block; indices count from 0."""
        if self.pruned is not None:
            outputs, blocks = self.pruned[stage]
            return (*blocks[block], outputs)
        width = self.widths[stage]
        if self.blocks[stage] == "basic":
            return width, width, width
        width = width * self.width_per_group // 64 * self.groups
        return width // (self.reduce_first or 1), width, self.outputs[stage]

    @property
    def has_parts(self) -> bool:
        """Whether the network has parts that neither torchvision's ResNets nor the CIFAR family have."""
        parts = (self.stem_channels, self.attention, self.antialias, self.norm, self.reduce_first, self.pruned)
        kinds = self.shortcut in ("average", "projection_3x3") or isinstance(self.block, tuple)
        return kinds or bool(STEMS[self.stem].inner) or any(parts)

    @property
    def stem_outputs(self) -> int:
        """The output channels of the stem."""
        return self.stem_channels or self.widths[0]

    @property
    def num_features(self) -> int:
        """The output channels of the last stage, which is also the number of features that the head takes."""
        return self.outputs[-1]


MOST = 1_000_000  # upper bound of every count: larger ones are mistakes, and XLA aborts the process if memory runs out
KINDS: dict[str, tuple[str, ...]] = {
    "stem": get_args(Stem),
    "shortcut": get_args(Shortcut),
    "stride_in": get_args(StrideIn),
    "attention": get_args(Attention),
    "antialias": get_args(Antialias),
    "norm": get_args(Norm),
}


def _counts(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _problems(config: ResNetConfig) -> list[str]:
    return _wrong_alone(config) or _wrong_together(config)


def _wrong_alone(config: ResNetConfig) -> list[str]:
    """Problems of single fields."""
    blocks = config.block if isinstance(config.block, tuple) and config.block else (config.block,)
    problems = [
        f"block must be {' or '.join(map(repr, get_args(Block)))}, or a tuple of these, got {config.block!r:.80}"
        for _ in range(any(block not in get_args(Block) for block in blocks))
    ]
    problems += [
        f"{name} must be {' or '.join(map(repr, kinds))}, got {getattr(config, name)!r}"
        for name, kinds in KINDS.items()
        if getattr(config, name) not in (kinds if name in ("stem", "shortcut", "stride_in") else (*kinds, None))
    ]
    for name in ("num_classes", "in_channels", "groups", "width_per_group", *OPTIONAL):
        least = 0 if name == "num_classes" else 1
        value = getattr(config, name)
        if name in OPTIONAL and value is None:
            continue
        if not _counts(value, least):
            problems.append(f"{name} must be a whole number of at least {least}, got {value!r:.80}")
        elif value > MOST:
            problems.append(
                f"{name} must be at most {MOST:,}, got {value if value < 10**20 else 'one of more than 20 digits'}"
            )
    for name in ("depths", "widths"):
        value = getattr(config, name)
        if not isinstance(value, tuple) or not value or not all(map(_counts, value)):
            problems.append(f"{name} must be a tuple of whole numbers of at least 1, got {value!r}")
    if not isinstance(config.conv_bias, bool):
        problems.append(f"conv_bias must be True or False, got {config.conv_bias!r}")
    return problems


OPTIONAL = ("stem_channels", "reduction", "reduce_first")  # numbers that may be None


def _wrong_together(config: ResNetConfig) -> list[str]:
    problems = []
    if len(config.depths) != len(config.widths):
        problems.append(
            f"there are {len(config.depths)} depths and {len(config.widths)} widths: give both for each stage"
        )
    if isinstance(config.block, tuple) and len(config.block) != len(config.depths):
        problems.append(f"there are {len(config.block)} blocks for {len(config.depths)} stages: give one for each")
    basic = "bottleneck" not in config.blocks
    if config.output_stride is not None:
        fitting = [config.stem_stride * 2**stage for stage in range(len(config.depths))]
        if not _counts(config.output_stride) or config.output_stride not in fitting:
            problems.append(
                f"output_stride must be {' or '.join(map(str, fitting))} for {len(fitting)} stages and the "
                f"{config.stem} stem, got {config.output_stride!r}"
            )
    if basic and (config.groups, config.width_per_group) != (1, 64):
        problems.append(
            f"groups {config.groups} and width_per_group {config.width_per_group} are for bottlenecks: "
            "basic blocks have 1 and 64"
        )
    if basic and config.stride_in != "3x3":
        problems.append(f"stride_in {config.stride_in!r} is for bottlenecks: basic blocks have 3x3 convolutions only")
    if basic and config.reduce_first:
        problems.append(f"reduce_first {config.reduce_first} is for bottlenecks")
    if not basic and min(config.widths) * config.width_per_group < 64:
        problems.append(
            f"width_per_group {config.width_per_group} leaves a stage of {min(config.widths)} without channels"
        )
    if config.shortcut == "pad" and "bottleneck" in config.blocks:
        problems.append("shortcut 'pad' is defined for basic blocks (He et al. 2016, section 4.2), not for bottlenecks")
    if config.shortcut == "pad" and list(config.widths) != sorted(config.widths):
        problems.append(f"shortcut 'pad' needs widths that never fall, got {config.widths}")
    if config.reduction and config.attention != "se":
        problems.append(f"reduction {config.reduction} is for attention 'se', not {config.attention!r}")
    if config.antialias and config.stride_in != "3x3":
        problems.append("antialias is for strides in the 3x3 convolution: leave stride_in out")
    if config.antialias and STEMS[config.stem].pool == "conv":
        problems.append(f"antialias is for a stem with a max-pool or none, not for {config.stem!r}")
    if not problems and config.pruned is not None:
        problems += _wrong_in_pruned(config)
    if not problems:
        problems += _wrong_channels(config)
    return problems


def _wrong_in_pruned(config: ResNetConfig) -> list[str]:
    def is_stage(stage: object, depth: int) -> bool:
        return (
            isinstance(stage, tuple)
            and len(stage) == 2
            and _counts(stage[0])
            and isinstance(stage[1], tuple)
            and len(stage[1]) == depth
            and all(isinstance(inner, tuple) and len(inner) == 2 and all(map(_counts, inner)) for inner in stage[1])
        )

    stages = config.pruned
    if not isinstance(stages, tuple) or len(stages) != len(config.depths):
        return [f"pruned must be a tuple with an entry for each of {len(config.depths)} stages, got {stages!r:.80}"]
    return [
        f"pruned must be (channels, ((channels, channels), ...)) with {depth} pairs for stage {i + 1}, got {stage!r:.80}"
        for i, (stage, depth) in enumerate(zip(stages, config.depths, strict=True))
        if not is_stage(stage, depth)
    ]


def _wrong_channels(config: ResNetConfig) -> list[str]:
    """Combinations of valid fields whose channels cannot be divided as required."""
    problems = []
    kind, stem = STEMS[config.stem], config.stem_outputs
    if any(stem * share % 8 for share in kind.inner):
        problems.append(f"a {config.stem} stem's channels must be a multiple of 8, got {stem}")
    for i, block in enumerate(config.blocks if config.pruned is None else ()):
        first, second, outputs = config.channels(i, 0)
        if block == "bottleneck" and (second % first or first % config.groups):
            problems.append(
                f"stage {i + 1} has {second} channels, which reduce_first {config.reduce_first} and groups "
                f"{config.groups} must divide"
            )
        if config.norm == "group" and (odd := [n for n in (first, second, outputs) if n % NORM_GROUPS]):
            problems.append(f"GroupNorm needs multiples of {NORM_GROUPS} channels, got {odd[0]} in stage {i + 1}")
    if config.pruned is not None and (config.groups > 1 or config.norm):
        problems.append("pruned networks have no groups and no GroupNorm")
    inner = [stem * share // 8 for share in kind.inner]
    if config.norm == "group" and (odd := [n for n in (stem, *inner) if n % NORM_GROUPS]):
        problems.append(f"GroupNorm needs multiples of {NORM_GROUPS} channels, got {odd[0]} in the stem")
    return problems


NORM_GROUPS = 32  # number of groups of GroupNorm in the paper and in timm
