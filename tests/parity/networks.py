"""PyTorch networks to compare with: torchvision's, and those that torchvision has not, in torchvision's naming."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from convert.verify import import_torchvision

models = import_torchvision().models

TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip


class PaddedBlock(nn.Module):
    """A basic block with the paper's option A: every second pixel, and zero channels on both sides."""

    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.added = planes - inplanes

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2: 6n + 2 layers with 16, 32 and 64 channels."""

    def __init__(self, depth: int, num_classes: int = 10):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[PaddedBlock(16, 16, 1) for _ in range(n)])
        self.layer2 = nn.Sequential(PaddedBlock(16, 32, 2), *[PaddedBlock(32, 32, 1) for _ in range(n - 1)])
        self.layer3 = nn.Sequential(PaddedBlock(32, 64, 2), *[PaddedBlock(64, 64, 1) for _ in range(n - 1)])
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def projection34(num_classes: int = 1000) -> nn.Module:
    """torchvision's resnet34 with a projection in the first block of the first stage too."""
    model = models.resnet34(num_classes=num_classes)
    model.layer1[0].downsample = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64))
    return model


def d2l18(num_classes: int = 10) -> nn.Module:
    """resnet18 as Dive into Deep Learning writes it: biased convolutions, shortcuts without BN, one input channel."""
    model = models.resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.empty(module.out_channels).uniform_(-0.1, 0.1))
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].downsample = nn.Sequential(stage[0].downsample[0])
    return model


def build(arch: str) -> nn.Module:
    """The PyTorch network of a row of the zoo, with random BN parameters and statistics: default ones hide swaps."""
    torch.manual_seed(0)
    if arch.endswith("_cifar"):
        model = CifarResNet(int(arch.removeprefix("resnet").removesuffix("_cifar")))
    else:
        special = {"resnet34_projection": projection34, "resnet18_d2l": d2l18}
        model = special[arch]() if arch in special else getattr(models, arch)()
    randomise(model)
    return model.eval()


def randomise(model: nn.Module) -> None:
    """Draws every BN's scale, bias, mean and variance at random."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
