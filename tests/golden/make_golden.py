"""Writes the golden file: small inputs, weights drawn by a rule, and the logits PyTorch gives in float64.

    python tests/golden/make_golden.py

The weights are not kept, since they would fill megabytes: :func:`golden_weights` draws them again, by name and shape,
from numpy's generator, which promises the same stream for ever. Needs torch and torchvision.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("logits.npz")
CASES = {  # architecture -> image size; every kind of block, stem, shortcut and convolution
    "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 48, "wide_resnet50_2": 40, "resnet20_cifar": 32,
    "resnet34_projection": 40, "resnet18_d2l": 40,
}  # fmt: skip


def golden_weights(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor of a torchvision key: Kaiming-sized weights, and BN statistics away from 0 and 1."""
    draw = np.random.RandomState(zlib.crc32(key.encode()))
    leaf = key.rpartition(".")[2]
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        values = draw.uniform(0.5, 1.5, shape)
    elif leaf == "weight":
        values = draw.uniform(-1, 1, shape) * np.sqrt(6 / np.prod(shape[1:]))
    else:
        values = draw.uniform(-0.3, 0.3, shape)
    return values.astype(np.float32)


def golden_images(arch: str, channels: int) -> np.ndarray:
    """Two float32 images, NHWC."""
    size = CASES[arch]
    values = np.random.RandomState(zlib.crc32(arch.encode())).uniform(-2, 2, (2, size, size, channels))
    return values.astype(np.float32)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
    import networks
    import torch

    logits = {}
    for arch in CASES:
        model = networks.build(arch)
        state = {
            key: torch.from_numpy(golden_weights(key, tuple(value.shape))) if value.is_floating_point() else value
            for key, value in model.state_dict().items()
        }
        model.load_state_dict(state)
        images = golden_images(arch, model.conv1.in_channels).transpose(0, 3, 1, 2)
        with torch.no_grad():
            exact = model.double()(torch.from_numpy(np.ascontiguousarray(images)).double()).numpy()
            single = model.float()(torch.from_numpy(np.ascontiguousarray(images))).numpy()
        distance = np.linalg.norm(single - exact) / np.linalg.norm(exact)
        print(f"{arch:20} logits {exact.shape}, PyTorch's float32 to float64: {distance:.1e}")
        logits[arch], logits[f"{arch}.distance"] = exact, distance
    np.savez_compressed(FILE, **logits)
    print(f"{FILE.name}: {FILE.stat().st_size / 1e3:.0f} kB, torch {torch.__version__}")


if __name__ == "__main__":
    main()
