"""PyTorch's networks to compare with, in torchvision's naming: torchvision's own, and the few that it has not.

Needs torch and torchvision, and is imported only where a comparison is made (``convert.verify``, the tests). Brings in no
JAX, which would count as PyTorch's memory and start where the two are measured beside each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert.installed import import_torchvision

if TYPE_CHECKING:
    from jresnet.models.resnet import ResNetConfig

# Where the networks that torchvision has not begin from; what their configurations say is then changed.
_RELATIVES = {"resnet34_projection": "resnet34", "resnet18_d2l": "resnet18"}


def network(arch: str, config: ResNetConfig) -> nn.Module:
    """The float32 PyTorch network of a row of the zoo and its configuration, with PyTorch's initial parameters.

    Raises:
        LookupError: for a shortcut that no PyTorch network of this kind has.
    """
    cifar = len(config.depths) == 3
    if cifar and config.output_stride:
        raise LookupError(f"there is no PyTorch network like {arch} with dilated convolutions to compare with")
    if config.shortcut not in (("pad", "projection") if cifar else ("projection", "projection_first", "conv")):
        raise LookupError(f"there is no PyTorch network like {arch} with shortcut {config.shortcut!r} to compare with")
    if cifar:
        return CifarResNet(config)
    how: dict[str, Any] = {}
    if config.output_stride:
        if config.block == "basic":
            raise LookupError(f"torchvision has no {arch} with dilated convolutions to compare with")
        how["replace_stride_with_dilation"] = [stride == 1 for stride, _ in config.strides[1:]]
    model: Any = getattr(import_torchvision().models, _RELATIVES.get(arch, arch))(num_classes=config.num_classes, **how)
    width = config.widths[0]
    if config.stem == "cifar":
        model.conv1 = nn.Conv2d(config.in_channels, width, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    elif config.in_channels != 3:
        model.conv1 = nn.Conv2d(config.in_channels, width, 7, 2, 3, bias=False)
    if config.shortcut == "projection_first" and model.layer1[0].downsample is None:
        model.layer1[0].downsample = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
    if config.shortcut == "conv":
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            if stage[0].downsample is not None:
                stage[0].downsample = nn.Sequential(stage[0].downsample[0])
    if config.conv_bias:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                bound = (module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]) ** -0.5
                module.bias = nn.Parameter(torch.empty(module.out_channels).uniform_(-bound, bound))
    return model


def randomise(model: nn.Module) -> None:
    """Draws every BN's scale, bias, mean and variance at random: default ones hide swaps.

    Beyond a hundred blocks, what each adds is weakened: activations that grow by a third in each overflow float32.
    """
    blocks: list[Any] = [block for block in model.modules() if hasattr(block, "bn2")]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    if len(blocks) > 100:
        for block in blocks:
            nn.init.uniform_(getattr(block, "bn3", block.bn2).weight, 0.05, 0.15)


class CifarBlock(nn.Module):
    """A basic block whose shortcut is the paper's option A, every second pixel and zero channels on both sides, or B."""

    def __init__(self, inplanes: int, planes: int, stride: int, projects: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.added = planes - inplanes
        self.downsample = None
        if self.added and projects:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2: 6n + 2 layers with 16, 32 and 64 channels."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        inplanes = config.widths[0]
        stem = (3, 1, 1) if config.stem == "cifar" else (7, 2, 3)
        self.conv1 = nn.Conv2d(config.in_channels, inplanes, *stem, bias=False)
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.pool = nn.Identity() if config.stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        for i, (depth, planes) in enumerate(zip(config.depths, config.widths, strict=True)):
            stage = nn.Sequential()
            for j in range(depth):
                stage.append(CifarBlock(inplanes, planes, 2 if i > 0 and j == 0 else 1, config.shortcut != "pad"))
                inplanes = planes
            setattr(self, f"layer{i + 1}", stage)
        self.fc = nn.Linear(inplanes, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))  # type: ignore[operator]
        return self.fc(x.mean((2, 3)))
