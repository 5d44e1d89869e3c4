"""scikit-learn's handwritten digits as CIFAR-shaped images: a data set that needs no network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from jresnet.data.dataset import Dataset, from_records, not_importable

CLASSES = tuple("0123456789")


def _rows() -> np.ndarray:
    """int64 ``[1797, 65]``: 64 pixels and the label of each digit.

    scikit-learn's file is read directly where it is, since importing the package takes a second.
    """
    found = importlib.util.find_spec("sklearn")
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return np.loadtxt(path, np.int64, delimiter=",")
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise not_importable("scikit-learn", error) from error
    return np.column_stack(sklearn_digits(return_X_y=True)).astype(np.int64)


def load_digits() -> Dataset:
    """Loads the 1,797 handwritten digits in scikit-learn as CIFAR-shaped images; needs no network.

    Images of 8x8 pixels with values from 0 to 16 are enlarged to 32x32 with values from 0 to 255, bilinearly with
    half-pixel centres and in integer arithmetic, so that every machine gets the same bytes. The three channels are equal. 36
    images of each class (360) are for testing, the other 1,437 for training.

    Raises:
        DataError: scikit-learn cannot be imported.
    """
    rows = _rows()
    pixels, labels = rows[:, :64].reshape(-1, 8, 8), rows[:, 64]

    # The centre of output pixel i is at (i + 1/2) / 4 - 1/2 in the input; edges are repeated.
    eighths = np.clip(2 * np.arange(32) - 3, 0, 7 * 8)
    weights = np.maximum(8 - abs(eighths[:, None] - 8 * np.arange(8)), 0)  # [32, 8]; each row sums to 8
    scaled = (weights @ pixels @ weights.T * 255 + 512) // 1024  # 1024 is 8 * 8 * 16; rounded to nearest
    planes = np.repeat(scaled.reshape(-1, 1024), 3, axis=0).reshape(-1, 3072)
    records = np.concatenate([labels[:, None], planes], axis=1).astype(np.uint8)

    order = np.random.RandomState(0).permutation(len(labels))  # its stream never changes (NEP 19)
    test = np.concatenate([order[labels[order] == digit][:36] for digit in range(10)])
    train = order[~np.isin(order, test)]
    source = "scikit-learn's digits (1,797 images, 8x8 scaled to 32x32)"
    return from_records("digits", CLASSES, [records[train]], [records[test]], source)
