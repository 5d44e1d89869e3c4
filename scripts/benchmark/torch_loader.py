"""torchvision's image loader for the loader benchmark: ``ImageFolder``, v2 transforms and ``DataLoader``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from convert.installed import import_torchvision

import_torchvision()

from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def batches(root: Path, size: int, batch: int, workers: int) -> Callable[[], object]:
    """A function that returns the next batch of augmented images, for any number of epochs."""
    views = v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(root), views), batch, shuffle=True, num_workers=workers, drop_last=True,
        persistent_workers=workers > 0, prefetch_factor=2 if workers else None,
    )  # fmt: skip

    def endless() -> Iterator[object]:
        while True:
            yield from loader

    found = endless()
    return lambda: next(found)
