"""A data set in memory: two splits of uint8 images with labels, and information on their source.

Readers exchange images as records in CIFAR-10's official binary format: a label byte, then the red, green and blue planes of
32 x 32 bytes. The digest of a data set is computed from its records, so that it depends only on the images and their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, UInt8

from jresnet.errors import DataError

PIXELS = 3 * 32 * 32  # bytes of an image: three planes
RECORD = 1 + PIXELS  # bytes: a label and the image


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels, in a fixed order."""

    images: UInt8[np.ndarray, "n 32 32 3"]  # RGB, C-contiguous
    labels: Int32[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits, and information on their source."""

    name: str  # a key of jresnet.data.DATASETS
    classes: tuple[str, ...]  # names of the labels, in order
    train: Split
    test: Split
    source: str  # one line to print
    notes: tuple[str, ...]  # lines to print, such as deviations from the official data set
    verified: dict[str, bool]  # official batch -> whether its records equal the official ones
    digest: str  # SHA-256 in hex over the records of train, then test; for a folder over its files
    skipped: tuple[tuple[str, str], ...] = ()  # (file, reason) of each image that cannot be used


def from_records(
    name: str, classes: tuple[str, ...], train: Sequence[np.ndarray], test: Sequence[np.ndarray], source: str
) -> Dataset:
    """Builds a data set from records and computes its digest. Nothing is verified.

    Args:
        name: name of the data set.
        classes: names of the labels.
        train: batches of records, uint8 ``[n, RECORD]`` each, C-contiguous.
        test: the same for the test split.
        source: description of the source, to print.
    """
    digest = hashlib.sha256()
    for batch in (*train, *test):
        digest.update(batch.data)
    source = source.replace("\n", "\\n")  # a path may contain a line break
    return Dataset(name, classes, _split(train), _split(test), source, (), {}, digest.hexdigest())


def _split(batches: Sequence[np.ndarray]) -> Split:
    labels = np.concatenate([batch[:, 0] for batch in batches]).astype(np.int32)
    images = np.empty((len(labels), 32, 32, 3), np.uint8)  # concatenate alone need not return a C-contiguous array
    np.concatenate([batch[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for batch in batches], out=images)
    return Split(images, labels)


def not_importable(package: str, error: ImportError) -> DataError:
    """The error for an optional package that is not installed, or fails to import, for example for lack of memory."""
    advice = '; install it with: pip install "jresnet[train]"' if isinstance(error, ModuleNotFoundError) else ""
    return DataError(f"{package} cannot be imported: {error}{advice}")
