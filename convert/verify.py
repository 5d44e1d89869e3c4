"""Is a converted model the same function? Its logits against PyTorch's in float64.

An absolute tolerance says nothing where logits may have any size. The yardstick is PyTorch itself: the relative L2
distance of its own float32 logits to its float64 ones, which is 2e-7 to 7e-7 for torchvision's ResNets.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jresnet.errors import InputError, WeightsError

if TYPE_CHECKING:
    from jresnet.resnet import ResNet, ResNetConfig

# jresnet's float32 distance to PyTorch's float64 over PyTorch's own float32 distance. A wrong weight gives 1e5 and more;
# this allows for another order of summation and for the difference between two draws of rounding errors.
ALLOWED = 3.0


@dataclass(frozen=True)
class Check:
    """What the comparison found, or why it was left out."""

    done: bool
    reason: str = ""  # why it was left out
    jresnet: float = float("nan")  # relative L2 distance of our float32 logits to PyTorch's float64
    torch: float = float("nan")  # the same of PyTorch's float32 logits

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without NaN."""
        return asdict(self) if self.done else {"done": False, "reason": self.reason}

    def __str__(self) -> str:
        if not self.done:
            return f"not against PyTorch: {self.reason}"
        return (
            f"relative distance of the logits to PyTorch's in float64: {self.jresnet:.1e} "
            f"(PyTorch's own in float32: {self.torch:.1e})"
        )


def check(model: ResNet, arch: str, state_dict: dict[str, np.ndarray], mode: str = "auto") -> Check:
    """Compares ``model`` with torchvision's network of the same weights on two random images.

    Args:
        model: of ``arch``, in float32.
        state_dict: the weights by torchvision's keys, in PyTorch's layout.
        mode: ``"auto"`` leaves the comparison out where there is nothing to compare with, ``"always"`` raises there,
            ``"never"`` leaves it out.

    Raises:
        InputError: with ``"always"``, where torch or a reference network is missing.
        WeightsError: where the logits are further from PyTorch's than rounding explains.
    """
    if mode == "never":
        return Check(False, "left out, as --verify never asks")
    try:
        reference = torchvision_model(arch, model.config, state_dict)
    except LookupError as error:
        if mode == "always":
            raise InputError(f"--verify always, but {error}") from error
        return Check(False, f"left out, since {error}")
    result = compare(model, reference)
    if not result.jresnet <= ALLOWED * result.torch:  # NaN fails too
        raise WeightsError(f"the converted {arch} is not the network PyTorch computes: {result}")
    return result


def compare(model: ResNet, reference: Any, size: int | None = None, batch: int = 2) -> Check:
    """The distances of both float32 logits to those of ``reference``, a torch module, in float64.

    ``size`` is the random images' height and width, by default 224, or 32 for the CIFAR stem.
    """
    import copy

    import jax
    import torch
    from flax import nnx

    size = size or (224 if model.config.stem == "imagenet" else 32)
    shape = (batch, model.config.in_channels, size, size)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    with torch.no_grad():
        exact = copy.deepcopy(reference).double().eval()(torch.from_numpy(images).double()).numpy()
        theirs = reference.eval()(torch.from_numpy(images)).numpy()
    with jax.default_matmul_precision("highest"):  # no TF32 on a GPU
        ours = nnx.jit(lambda model, x: model(x))(model, np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
    return Check(True, jresnet=relative(np.asarray(ours), exact), torch=relative(theirs, exact))


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    """‖value - reference‖ / ‖reference‖ in float64."""
    reference = np.asarray(reference, np.float64)
    return float(np.linalg.norm(np.asarray(value, np.float64) - reference) / np.linalg.norm(reference))


def torchvision_model(arch: str, config: ResNetConfig, state_dict: dict[str, np.ndarray]) -> Any:
    """torchvision's float32 network of this configuration and these weights.

    Raises:
        LookupError: where torch or torchvision is missing, or torchvision has no such network.
    """
    torchvision = import_torchvision()
    import torch

    if not hasattr(torchvision.models, arch):
        raise LookupError(f"torchvision has no {arch} to compare with")
    model = getattr(torchvision.models, arch)(num_classes=config.num_classes)
    width = model.conv1.out_channels
    if config.stem == "cifar":
        model.conv1 = torch.nn.Conv2d(config.in_channels, width, 3, 1, 1, bias=False)
        model.maxpool = torch.nn.Identity()
    elif config.in_channels != 3:
        model.conv1 = torch.nn.Conv2d(config.in_channels, width, 7, 2, 3, bias=False)
    tensors = {key: torch.from_numpy(value.copy()) for key, value in state_dict.items()}
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    model.load_state_dict(tensors | counters, strict=True)
    return model


def import_torchvision() -> Any:
    """torchvision, also beside a CPU build of torch.

    torchvision's wheel on PyPI is built against torch with CUDA; beside a CPU build its compiled part does not load and
    the import stops at two detection operators, which no ResNet uses. They are declared here, without a body, only where
    that import failed.

    Raises:
        LookupError: where it or torch is not installed, or does not import.
    """
    try:
        import torch
    except ImportError as error:
        raise LookupError("torch is not installed (pip install 'jresnet[torch]')") from error
    try:
        import torchvision
    except ImportError as error:
        raise LookupError("torchvision is not installed (pip install 'jresnet[torch]')") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise LookupError(f"torchvision does not import: {error}") from error
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the broken import left behind
        _LIBRARIES.append(torch.library.Library("torchvision", "DEF"))
        _LIBRARIES[-1].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES[-1].define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    import torchvision.models

    return torchvision


_LIBRARIES: list[Any] = []  # a declaration lives as long as its library object
