"""jresnet: ResNets in JAX and Flax NNX that compute the same function as PyTorch's, in training as well.

Public names are imported on first use (PEP 562), so that ``import jresnet`` is quick and does not import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jresnet.errors import DataError, DownloadError, InputError, JresnetError, WeightsError
from jresnet.version import __version__

if TYPE_CHECKING:  # the same for type checkers and editors
    from jresnet import explain
    from jresnet import sharing as hub
    from jresnet.exporting import export
    from jresnet.factory import (
        create,
        list_models,
        load,
        resnet8_cifar,
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
    from jresnet.models.config import ResNetConfig
    from jresnet.models.fuse import fuse
    from jresnet.models.resnet import BasicBlock, Bottleneck, ResNet
    from jresnet.pretrained import PretrainedWeights, get_weights, list_weights
    from jresnet.training import optim
    from jresnet.weights.native import save
    from jresnet.weights.preprocessing import Preprocessing


__all__ = [
    "BasicBlock",
    "Bottleneck",
    "DataError",
    "DownloadError",
    "InputError",
    "JresnetError",
    "Preprocessing",
    "PretrainedWeights",
    "ResNet",
    "ResNetConfig",
    "WeightsError",
    "__version__",
    "compiler_options",
    "create",
    "explain",
    "export",
    "fuse",
    "get_weights",
    "hub",
    "list_models",
    "list_weights",
    "load",
    "optim",
    "resnet8_cifar",
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

# Modules that are public as a whole. `jresnet.hub` is jresnet/sharing.py; the file jresnet/hub.py is its command line.
_ROOMS = {"explain": "jresnet.explain", "hub": "jresnet.sharing", "optim": "jresnet.training.optim"}
_MODULES = {  # the module of each public name; names not listed here are in jresnet.factory
    "BasicBlock": "jresnet.models.resnet",
    "Bottleneck": "jresnet.models.resnet",
    "Preprocessing": "jresnet.weights.preprocessing",
    "PretrainedWeights": "jresnet.pretrained",
    "ResNet": "jresnet.models.resnet",
    "ResNetConfig": "jresnet.models.config",
    "compiler_options": "jresnet.kernels.compiler",
    "export": "jresnet.exporting",
    "fuse": "jresnet.models.fuse",
    "get_weights": "jresnet.pretrained",
    "list_weights": "jresnet.pretrained",
    "save": "jresnet.weights.native",
}


if not TYPE_CHECKING:  # with __getattr__ visible, type checkers would accept any attribute

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            message = f"module {__name__!r} has no attribute {name!r}"
            if name in importlib.import_module("jresnet.models.zoo").ZOO:
                message += f": build this model by jresnet.create({name!r})"
            raise AttributeError(message)
        if name in _ROOMS:
            return importlib.import_module(_ROOMS[name])
        globals()[name] = value = getattr(importlib.import_module(_MODULES.get(name, "jresnet.factory")), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
