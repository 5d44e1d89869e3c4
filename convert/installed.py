"""Import of torch and torchvision, if they are installed."""

from __future__ import annotations

import sys
from typing import Any

_LIBRARIES: list[Any] = []  # keeps the declarations below alive


def import_torchvision() -> Any:
    """Imports torchvision, also with a CPU build of torch.

    torchvision's wheel on PyPI is built for torch with CUDA. With a CPU build, its extension does not load, and the import
    fails at two detection operators, which no ResNet uses. If that happens, this function declares the two operators without
    an implementation and imports torchvision again.

    Raises:
        LookupError: torch or torchvision is not installed or cannot be imported.
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
            raise LookupError(f"torchvision cannot be imported: {error}") from error
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # left by the failed import
        _LIBRARIES.append(torch.library.Library("torchvision", "DEF"))
        _LIBRARIES[-1].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES[-1].define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    import torchvision.models

    return torchvision
