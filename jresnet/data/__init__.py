"""Data sets in memory, by name: ``load("cifar10", data_dir)``.

A data set is added by a module with a function that returns a :class:`~jresnet.data.dataset.Dataset`, and a line in
``DATASETS`` and ``CLASSES``; how its images are normalised and trained on stands in :mod:`jresnet.training.recipes`.
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

# By name, what reads it from a folder, or from its usual places where that is None.
DATASETS: dict[str, Callable[[str | Path | None], Dataset]] = {
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "digits": lambda data_dir: load_digits(),
}

# The names of a data set's labels, in their order, known before it is read.
CLASSES: dict[str, tuple[str, ...]] = {
    "cifar10": cifar10.CLASSES,
    "cifar100": cifar100.CLASSES,
    "digits": digits.CLASSES,
}


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """The data set of a name.

    Args:
        name: of ``DATASETS``.
        data_dir: a folder, or an archive; what a data set that needs no files does not look at.

    Raises:
        InputError: there is no such data set.
        DataError: it cannot be found or used.
    """
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}: there are {', '.join(DATASETS)}")
    return DATASETS[name](data_dir)
