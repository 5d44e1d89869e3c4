"""PyTorch networks to compare with: those of ``convert.reference`` with random statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from convert import reference
from convert.installed import import_torchvision
from convert.reference import randomise
from jresnet.models import zoo

models = import_torchvision().models

TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip


def CifarResNet(depth: int, num_classes: int = 10) -> nn.Module:
    """The paper's CIFAR network of this depth, with PyTorch's initial parameters."""
    arch = f"resnet{depth}_cifar"
    return reference.network(arch, zoo.configure(arch, num_classes=num_classes))


def build(arch: str, shallow: bool = False, **chosen: Any) -> nn.Module:
    """The PyTorch network of a row of the zoo, with random BN parameters and statistics: default ones hide swaps.

    ``shallow`` leaves two blocks of the first stage and one of the second: every kind of layer, compiled in a fraction
    of the time.
    """
    torch.manual_seed(0)
    model: Any = reference.network(arch, zoo.configure(arch, **chosen))
    if shallow:
        model.layer1, model.layer2 = model.layer1[:2], model.layer2[:1]
        model.layer3 = model.layer4 = nn.Identity()
        block = model.layer2[0]
        features = getattr(block, "conv3", block.conv2).out_channels
        model.fc = nn.Linear(features, model.fc.out_features)
    randomise(model)
    return model.eval()
