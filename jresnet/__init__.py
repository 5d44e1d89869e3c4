"""jresnet: ResNets in JAX and Flax NNX, the same function as PyTorch's, training included."""

from jresnet.errors import DataError, DownloadError, InputError, WeightsError
from jresnet.factory import (
    create,
    list_models,
    resnet18,
    resnet18_d2l,
    resnet20_cifar,
    resnet32_cifar,
    resnet34,
    resnet34_projection,
    resnet44_cifar,
    resnet50,
    resnet56_cifar,
    resnet101,
    resnet110_cifar,
    resnet152,
    resnet1202_cifar,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from jresnet.kernels.compiler import compiler_options
from jresnet.models.fuse import fuse
from jresnet.models.resnet import BasicBlock, Bottleneck, ResNet, ResNetConfig
from jresnet.training import optim
from jresnet.weights.native import load, save

__version__ = "0.1.0"

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "DataError",
    "DownloadError",
    "InputError",
    "ResNet",
    "ResNetConfig",
    "WeightsError",
    "__version__",
    "compiler_options",
    "create",
    "fuse",
    "list_models",
    "load",
    "optim",
    "resnet18",
    "resnet18_d2l",
    "resnet20_cifar",
    "resnet32_cifar",
    "resnet34",
    "resnet34_projection",
    "resnet44_cifar",
    "resnet50",
    "resnet56_cifar",
    "resnet101",
    "resnet110_cifar",
    "resnet152",
    "resnet1202_cifar",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "save",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
