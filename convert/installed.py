"""torch and torchvision, where they are installed."""

from __future__ import annotations

import sys
from typing import Any

_LIBRARIES: list[Any] = []  # a declaration lives as long as its library object


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
