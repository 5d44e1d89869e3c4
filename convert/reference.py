"""PyTorch reference networks with torchvision's tensor names: from torchvision, from timm, or from this file.

This module needs torch and torchvision, and timm for timm's networks. Only ``convert.verify``, the benchmark and the tests
import it. It does not import JAX, because the benchmark would count JAX's memory and start-up time as PyTorch's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convert.installed import import_torchvision
from jresnet.models import zoo
from jresnet.models.config import STEMS, ResNetConfig


def network(arch: str | None, config: ResNetConfig) -> nn.Module:
    """Builds the float32 PyTorch network of a configuration, with PyTorch's initial parameters.

    Args:
        arch: the architecture's name, if it has one. torchvision's network of this name is preferred to the one in this file
            if it has the same configuration, because it is an independent implementation.
        config: the configuration to build.
    """
    if config.has_parts:
        return _timms(arch, config)
    plain = config.stem == "imagenet" and config.shortcut == "projection" and config.stride_in == "3x3"
    build = getattr(import_torchvision().models, arch or "", None)
    if build is None or not plain or config.conv_bias or not config.num_classes or config.in_channels != 3:
        return ResNet(config)
    if not config.output_stride:
        return build(num_classes=config.num_classes)
    if config.block == "basic":  # torchvision does not dilate basic blocks
        return ResNet(config)
    dilated = [stride == 1 for stride, _ in config.strides[1:]]
    return build(num_classes=config.num_classes, replace_stride_with_dilation=dilated)


def _timms(arch: str | None, config: ResNetConfig) -> nn.Module:
    """Builds timm's network of that name if it has this configuration, else a network from timm's building blocks.

    Raises:
        LookupError: timm is not installed, or cannot build the configuration.
    """
    import_torchvision()  # timm imports torchvision, which needs this with a CPU build of torch
    try:
        import timm
        from timm.layers import BlurPool2d, get_attn
        from timm.models import resnet
    except ImportError as error:
        raise LookupError(f"this network needs timm, which cannot be imported ({error}): pip install timm") from error
    given: dict[str, Any] = {
        "num_classes": config.num_classes,
        "in_chans": config.in_channels,
        "output_stride": config.output_stride or 32,
    }
    if arch and zoo.configure(arch, **{name: getattr(config, name) for name in OWN}) == config:
        return timm.create_model(arch, **given)  # type: ignore[no-any-return]
    deep = bool(STEMS[config.stem].inner)
    if config.shortcut not in ("projection", "average", "projection_3x3") or config.pruned or config.conv_bias:
        raise LookupError(f"timm has no network of this configuration: {config}")
    if not deep and (config.stem != "imagenet" or config.stem_outputs != 64):
        raise LookupError(f"timm has no stem {config.stem!r} of {config.stem_outputs} channels")
    blocks = [resnet.Bottleneck if block == "bottleneck" else resnet.BasicBlock for block in config.blocks]
    attention: Any = config.attention
    if config.reduction:
        attention = partial(get_attn("se"), rd_ratio=1 / config.reduction)
    return resnet.ResNet(
        blocks,  # type: ignore[arg-type]
        config.depths,
        **given,
        channels=config.widths,  # type: ignore[arg-type]
        cardinality=config.groups,
        base_width=config.width_per_group,
        stem_width=config.stem_outputs // 2,
        stem_type={"imagenet": "", "deep_tiered": "deep_tiered"}.get(config.stem, "deep"),
        replace_stem_pool=config.stem == "deep_conv",
        block_reduce_first=config.reduce_first or 1,
        down_kernel_size=3 if config.shortcut == "projection_3x3" else 1,
        avg_down=config.shortcut == "average",
        norm_layer="groupnorm" if config.norm else nn.BatchNorm2d,
        aa_layer={"average": nn.AvgPool2d, "blur": BlurPool2d}.get(config.antialias or ""),
        block_args={"attn_layer": attention} if attention else {},
    )


OWN = ("num_classes", "in_channels", "output_stride")  # fields that timm.create_model sets


def randomise(model: nn.Module) -> None:
    """Draws every normalisation's scale, bias, mean and variance at random: the default values would hide swapped tensors.

    In networks with more than 100 blocks, the last scale of each block is small, because activations that grow by a third in
    each block overflow float32. With attention this starts at more than 30 blocks: otherwise the attention factors depend on
    rounding errors, and PyTorch's own float32 logits have no correct digit.
    """
    blocks: list[Any] = [block for block in model.modules() if hasattr(block, "bn2")]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    attention = any(getattr(block, "se", None) is not None for block in blocks)
    if len(blocks) > (30 if attention else 100):
        for block in blocks:
            nn.init.uniform_(getattr(block, "bn3", block.bn2).weight, 0.05, 0.15)


class Block(nn.Module):
    """A basic block or a Bottleneck. ``wide`` contains the dilations of its first and second 3x3 convolution."""

    def __init__(
        self, inplanes: int, planes: int, stride: int, wide: tuple[int, int], first: bool, config: ResNetConfig
    ):
        super().__init__()

        def conv(
            inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1, groups: int = 1
        ) -> nn.Conv2d:
            padding = dilation * (size // 2)
            return nn.Conv2d(inputs, outputs, size, stride, padding, dilation, groups, bias=config.conv_bias)

        if config.block == "bottleneck":
            width, outplanes = planes * config.width_per_group // 64 * config.groups, 4 * planes
            early, late = (stride, 1) if config.stride_in == "1x1" else (1, stride)
            self.conv1 = conv(inplanes, width, 1, early)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = conv(width, width, 3, late, wide[0], config.groups)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = conv(width, outplanes, 1)
            self.bn3 = nn.BatchNorm2d(outplanes)
        else:
            outplanes = planes
            self.conv1 = conv(inplanes, planes, 3, stride, wide[0])
            self.bn1 = nn.BatchNorm2d(planes)
            self.conv2 = conv(planes, planes, 3, 1, wide[1])
            self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.added = stride, outplanes - inplanes
        self.downsample = None
        if config.shortcut != "pad" and (first or self.added):
            norm = [] if config.shortcut == "conv" else [nn.BatchNorm2d(outplanes)]
            self.downsample = nn.Sequential(conv(inplanes, outplanes, 1, stride), *norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if hasattr(self, "conv3"):
            y = self.bn3(self.conv3(F.relu(y)))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.added or self.stride > 1:  # option A: every second pixel, and zero channels on both sides
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2)
            )
        return F.relu(y + x)


class ResNet(nn.Module):
    """The ResNet of He et al. 2016, for configurations without timm's parts."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        inplanes = config.widths[0]
        kernel, stride = (3, 1) if config.stem.startswith("cifar") else (7, 2)
        self.conv1 = nn.Conv2d(config.in_channels, inplanes, kernel, stride, kernel // 2, bias=config.conv_bias)
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if config.stem in ("imagenet", "cifar_pool") else nn.Identity()
        self.stages = len(config.depths)
        before = 1
        for i, (depth, planes) in enumerate(zip(config.depths, config.widths, strict=True)):
            stage, (stride, dilation) = nn.Sequential(), config.strides[i]
            for j in range(depth):
                wide = (dilation if j else before, dilation)
                first = j == 0 and (i > 0 or config.shortcut == "projection_first")
                stage.append(Block(inplanes, planes, 1 if j else stride, wide, first, config))
                inplanes = planes * (4 if config.block == "bottleneck" else 1)
            setattr(self, f"layer{i + 1}", stage)
            before = dilation
        if config.num_classes:
            self.fc = nn.Linear(inplanes, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        x = x.mean((2, 3))
        return self.fc(x) if hasattr(self, "fc") else x
