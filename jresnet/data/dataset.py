"""A data set in memory: two splits of uint8 images with their labels, and what is known about where they come from.

An image travels as a record, CIFAR-10's official binary form: a label byte, then the red, green and blue planes of 32 x 32
bytes. The digest of a data set is that of its records, so it depends on the images and their order, not on the source.
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
    """Two splits, and what is known about where they come from."""

    name: str  # of jresnet.data.DATASETS
    classes: tuple[str, ...]  # names of the labels, in their order
    train: Split
    test: Split
    source: str  # one line for people
    notes: tuple[str, ...]  # lines to show: what is not official, what could not be kept
    verified: dict[str, bool]  # official batch -> do its records here equal the official ones?
    digest: str  # SHA-256 over the records of train, then test, in hex; of a folder over the files
    skipped: tuple[tuple[str, str], ...] = ()  # images that were passed over: the file, and what is wrong with it


def from_records(
    name: str, classes: tuple[str, ...], train: Sequence[np.ndarray], test: Sequence[np.ndarray], source: str
) -> Dataset:
    """A data set with its digest, nothing verified.

    Args:
        name: of the data set.
        classes: names of the labels.
        train: batches of records, uint8 ``[n, RECORD]`` each, C-contiguous.
        test: the same.
        source: where they come from, for people.
    """
    digest = hashlib.sha256()
    for batch in (*train, *test):
        digest.update(batch.data)
    source = source.replace("\n", "\\n")  # a path may hold one, a line must not
    return Dataset(name, classes, _split(train), _split(test), source, (), {}, digest.hexdigest())


def _split(batches: Sequence[np.ndarray]) -> Split:
    labels = np.concatenate([batch[:, 0] for batch in batches]).astype(np.int32)
    images = np.empty((len(labels), 32, 32, 3), np.uint8)  # C-contiguous, which concatenate alone does not promise
    np.concatenate([batch[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for batch in batches], out=images)
    return Split(images, labels)


def not_importable(package: str, error: ImportError) -> DataError:
    """The error for an optional package: not installed, or installed and broken, as where memory is short."""
    advice = '; install it with: pip install "jresnet[train]"' if isinstance(error, ModuleNotFoundError) else ""
    return DataError(f"{package} cannot be imported: {error}{advice}")
