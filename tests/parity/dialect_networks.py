"""Networks whose tensors are named as each dialect of ``jresnet.pytorch.keymap`` names them, in as few lines as that takes.

Written from the keys and the papers, not from the repositories' code; with PyTorch's initial parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import networks
import torch.nn.functional as F
from torch import Tensor, nn

from convert import reference
from jresnet.models import zoo

WIDTHS, CIFAR_WIDTHS = (64, 128, 256, 512), (16, 32, 64)
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet20_cifar": (3, 3, 3)}


def conv(inplanes: int, planes: int, size: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, size, stride, size // 2, bias=bias)


def projection(inplanes: int, planes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(conv(inplanes, planes, 1, stride), nn.BatchNorm2d(planes))


def matching(inplanes: int, planes: int, stride: int) -> nn.Sequential:
    """The projection where the shape changes, else an empty Sequential."""
    return projection(inplanes, planes, stride) if stride > 1 or inplanes != planes else nn.Sequential()


def stages(
    block: Callable[[int, int, int], nn.Module], widths: tuple[int, ...], depths: tuple[int, ...], expansion: int = 1
) -> Iterator[nn.Sequential]:
    """One Sequential a stage, of ``block(inplanes, planes, stride)``."""
    inplanes = widths[0]
    for i, (planes, depth) in enumerate(zip(widths, depths, strict=True)):
        stage = nn.Sequential()
        for j in range(depth):
            stage.append(block(inplanes, planes, 2 if i > 0 and j == 0 else 1))
            inplanes = planes * expansion
        yield stage


class Pad(nn.Module):
    """The paper's option A: every second pixel, zero channels on both sides."""

    def __init__(self, added: int):
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))


# --- akamaster/pytorch_resnet_cifar10 and kuangliu/pytorch-cifar: conv1, bn1, ..., shortcut, linear


class Basic(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int, pads: bool):
        super().__init__()
        self.conv1 = conv(inplanes, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = Pad(planes - inplanes) if pads and stride > 1 else matching(inplanes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Bottleneck(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = conv(inplanes, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, 4 * planes, 1)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.shortcut = matching(inplanes, 4 * planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class Linear(nn.Module):
    """CIFAR stem, ``layer1`` to ``layer3`` or ``layer4``, ``linear``."""

    def __init__(self, layers: Iterator[nn.Sequential], width: int, outputs: int):
        super().__init__()
        self.conv1 = conv(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.layers = []  # a plain list: it registers nothing
        for i, stage in enumerate(layers):
            setattr(self, f"layer{i + 1}", stage)
            self.layers.append(stage)
        self.linear = nn.Linear(outputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.layers:
            x = stage(x)
        return self.linear(x.mean((2, 3)))


def akamaster(arch: str) -> nn.Module:
    return Linear(stages(partial(Basic, pads=True), CIFAR_WIDTHS, DEPTHS[arch]), 16, 64)


def kuangliu(arch: str) -> nn.Module:
    if arch == "resnet20_cifar":  # akamaster's option B
        return Linear(stages(partial(Basic, pads=False), CIFAR_WIDTHS, DEPTHS[arch]), 16, 64)
    if arch == "resnet50":
        return Linear(stages(Bottleneck, WIDTHS, DEPTHS[arch], 4), 64, 2048)
    return Linear(stages(partial(Basic, pads=False), WIDTHS, DEPTHS[arch]), 64, 512)


# --- weiaicunzai/pytorch-cifar100: Sequentials throughout


class Residual(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int, bottleneck: bool):
        super().__init__()
        sizes = ((inplanes, planes, 1, 1), (planes, planes, 3, stride), (planes, 4 * planes, 1, 1))
        if not bottleneck:
            sizes = ((inplanes, planes, 3, stride), (planes, planes, 3, 1))
        layers = [layer for size in sizes for layer in (conv(*size), nn.BatchNorm2d(size[1]), nn.ReLU())]
        self.residual_function = nn.Sequential(*layers[:-1])  # the last ReLU is the sum's
        self.shortcut = matching(inplanes, sizes[-1][1], stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual_function(x) + self.shortcut(x))


class Weiaicunzai(nn.Module):
    def __init__(self, arch: str):
        super().__init__()
        bottleneck = arch == "resnet50"
        self.conv1 = nn.Sequential(conv(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        layers = stages(partial(Residual, bottleneck=bottleneck), WIDTHS, DEPTHS[arch], 4 if bottleneck else 1)
        self.conv2_x, self.conv3_x, self.conv4_x, self.conv5_x = layers
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048 if bottleneck else 512, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5_x(self.conv4_x(self.conv3_x(self.conv2_x(self.conv1(x)))))
        return self.fc(self.avg_pool(x).flatten(1))


# --- The tutorial's ResNet-34: a projection in every stage, and the stages registered twice


class LeftRight(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int, first: bool):
        super().__init__()
        layers = (conv(inplanes, planes, 3, stride), nn.BatchNorm2d(planes), nn.ReLU())
        self.left = nn.Sequential(*layers, conv(planes, planes, 3), nn.BatchNorm2d(planes))
        self.right = projection(inplanes, planes, stride) if first else None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.left(x) + (x if self.right is None else self.right(x)))


class Projection34(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        inplanes = 64
        for i, (planes, depth) in enumerate(zip(WIDTHS, DEPTHS["resnet34"], strict=True)):
            first = LeftRight(inplanes, planes, 2 if i > 0 else 1, first=True)
            rest = [LeftRight(planes, planes, 1, first=False) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(first, *rest))
            inplanes = planes
        self.Conv = nn.Sequential(self.layer1, self.layer2, self.layer3, self.layer4)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.Conv(self.pre(x)).mean((2, 3)))


# --- Dive into Deep Learning, section 8.6: biased convolutions, and no BN behind a projection


class D2LResidual(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = conv(inplanes, planes, 3, stride, bias=True)
        self.conv2 = conv(planes, planes, 3, bias=True)
        self.conv3 = conv(inplanes, planes, 1, stride, bias=True) if stride > 1 else None
        self.bn1 = nn.BatchNorm2d(planes)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.conv3 is None else self.conv3(x)))


def d2l() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(1, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    layers = stages(D2LResidual, WIDTHS, DEPTHS["resnet18"])
    return nn.Sequential(stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


# --- huggingface/transformers: ResNetForImageClassification


class Convolution(nn.Module):
    def __init__(self, inplanes: int, planes: int, size: int, stride: int, relu: bool = True):
        super().__init__()
        self.convolution = conv(inplanes, planes, size, stride)
        self.normalization = nn.BatchNorm2d(planes)
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.normalization(self.convolution(x)))


class TransformersLayer(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int, bottleneck: bool):
        super().__init__()
        sizes = ((inplanes, planes, 1, 1), (planes, planes, 3, stride), (planes, 4 * planes, 1, 1))
        if not bottleneck:
            sizes = ((inplanes, planes, 3, stride), (planes, planes, 3, 1))
        outplanes = sizes[-1][1]
        self.shortcut = (
            Convolution(inplanes, outplanes, 1, stride, relu=False)
            if stride > 1 or inplanes != outplanes
            else nn.Identity()
        )
        self.layer = nn.Sequential(*[Convolution(*size, relu=size is not sizes[-1]) for size in sizes])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x) + self.shortcut(x))


class Transformers(nn.Module):
    def __init__(self, arch: str):
        super().__init__()
        bottleneck = arch == "resnet50"
        layers = stages(partial(TransformersLayer, bottleneck=bottleneck), WIDTHS, DEPTHS[arch], 4 if bottleneck else 1)
        embedder, encoder = nn.Module(), nn.Module()
        embedder.embedder = Convolution(3, 64, 7, 2)
        encoder.stages = nn.ModuleList()
        for stage in layers:
            encoder.stages.append(nn.ModuleDict({"layers": stage}))
        self.resnet = nn.ModuleDict({"embedder": embedder, "encoder": encoder})
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(2048 if bottleneck else 512, 1000))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.resnet["embedder"].embedder(x), 3, 2, 1)
        for stage in self.resnet["encoder"].stages:
            x = stage["layers"](x)
        return self.classifier(F.adaptive_avg_pool2d(x, 1))


def children() -> nn.Module:
    *body, last = networks.models.resnet18().children()
    return nn.Sequential(*body, nn.Flatten(), last)


def chenyaofo() -> nn.Module:
    config = zoo.configure("resnet20_cifar", shortcut="projection")
    return reference.network("resnet20_cifar", config)  # torchvision's names at the depths of the CIFAR family


DIALECT_NETWORKS: dict[str, list[tuple[str, Callable[[], nn.Module]]]] = {
    "torchvision": [(arch, getattr(networks.models, arch)) for arch in ("resnet18", "resnet50")],
    "akamaster": [("resnet20_cifar", partial(akamaster, "resnet20_cifar"))],
    "kuangliu": [(arch, partial(kuangliu, arch)) for arch in ("resnet18", "resnet50", "resnet20_cifar")],
    "weiaicunzai": [(arch, partial(Weiaicunzai, arch)) for arch in ("resnet18", "resnet50")],
    "chenyaofo": [("resnet20_cifar", chenyaofo)],
    "resnet34_projection": [("resnet34_projection", Projection34)],
    "resnet18_d2l": [("resnet18_d2l", d2l)],
    "transformers": [(arch, partial(Transformers, arch)) for arch in ("resnet18", "resnet50")],
    "children": [("resnet18", children)],
}
