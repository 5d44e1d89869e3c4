"""Loads data sets into memory by name: ``load("cifar10", data_dir)``.

To add a data set, write a module with a function that returns a :class:`~jresnet.data.dataset.Dataset`, and add a line to
``DATASETS`` and ``CLASSES``. Normalisation and training settings are in :mod:`jresnet.training.recipes`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jresnet.data import cifar10, cifar100, digits
from jresnet.data.cifar10 import load_cifar10
from jresnet.data.cifar100 import load_cifar100
from jresnet.data.dataset import Dataset, Split
from jresnet.data.digits import load_digits
from jresnet.data.tfds import prepare_tfds
from jresnet.errors import InputError

__all__ = [
    "CLASSES",
    "DATASETS",
    "Dataset",
    "Split",
    "load",
    "load_cifar10",
    "load_cifar100",
    "load_digits",
    "prepare_tfds",
]

# The function that reads a data set from a folder; from its usual places if the argument is None.
DATASETS: dict[str, Callable[[str | Path | None], Dataset]] = {
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "digits": lambda data_dir: load_digits(),
}

# The names of a data set's labels in order, available without reading the data set.
CLASSES: dict[str, tuple[str, ...]] = {
    "cifar10": cifar10.CLASSES,
    "cifar100": cifar100.CLASSES,
    "digits": digits.CLASSES,
}


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Loads a data set by name.

    Args:
        name: a key of ``DATASETS``.
        data_dir: a folder or an archive; ignored by data sets that need no files. ``None``: the usual places.

    Raises:
        InputError: unknown data set.
        DataError: the data set cannot be found or used.
    """
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}: there are {', '.join(DATASETS)}")
    return DATASETS[name](data_dir)
