"""Reads CIFAR-10 and CIFAR-100 stores of TensorFlow Datasets (TFDS) without TensorFlow, and writes those of CIFAR-10.

Stores are untrusted. TFDS's own reader imports the modules that ``features.json`` names, so it is not used. Instead, record
files are opened by their usual names, and each record is parsed as a ``tf.train.Example``. Nothing in a store can select
code to run.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jresnet.data.dataset import PIXELS, Dataset, Split, not_importable
from jresnet.errors import DataError

NAME, VERSION = "cifar10", "3.0.2"  # name and version of CIFAR-10 in TFDS; other versions can be read as well
LABELS = {"label": 10}  # features that are labels, in the order of a record, with their numbers of classes
# TFDS's template of file names; TFDS before 4.8 does not store it.
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
MAX_INFO = 2**20  # largest dataset_info.json in bytes; TFDS writes about 700
MAX_SHARD = 2**30  # largest record file in bytes; all of CIFAR-10 has about 130 million
MAX_RECORD = 2**20  # bytes; an image has about 3,000
MAX_IMAGES = 1_000_000  # images in a split; CIFAR-10 has 50,000


class Stored(NamedTuple):
    """A split of a store."""

    records: np.ndarray  # uint8 [n, labels + PIXELS], in the official order
    places: np.ndarray  # int64 [n]: index of each record in the official order


def find_tfds(root: Path, name: str = NAME) -> Path | None:
    """The newest prepared version of a TFDS data set under ``root``, found by its files without importing TFDS."""
    versions = [
        folder
        for folder in (root / name).glob("*.*.*")
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)  # not incomplete.XXXXXX_3.0.2, left by an interruption
        and all((folder / file).is_file() for file in ("dataset_info.json", "features.json"))
    ]
    return max(versions, key=lambda folder: [int(part) for part in folder.name.split(".")], default=None)


def read_tfds(store: Path, name: str = NAME, labels: Mapping[str, int] = LABELS) -> tuple[dict[str, Stored], str]:
    """Reads the splits "train" and "test" of a store.

    Args:
        store: the folder found by :func:`find_tfds`.
        name: name of the data set in TFDS.
        labels: the label features, as ``LABELS``.

    Returns:
        The splits in the official order, and the format of the store's files.

    Raises:
        DataError: TFDS cannot be imported, or the store is damaged or of another data set.
    """
    try:
        import tensorflow_datasets  # noqa: F401 - imported first, so that the error below names it if it is missing
        from array_record.python.array_record_module import ArrayRecordReader
        from tensorflow_datasets.proto import tf_example_pb2
    except ImportError as error:
        raise not_importable("tensorflow-datasets", error) from error

    def records(path: Path, length: int) -> Sequence[bytes]:
        if kind == "tfrecord":
            found = list(_tfrecords(path))
            count = len(found)
        else:
            reader = ArrayRecordReader(str(path))
            count = reader.num_records()
            found = reader.read_all() if count == length else []
        if count != length:
            raise DataError(f"{path.name} has {count:,} records; expected {length:,}")
        return found

    splits = {}
    try:
        kind, lengths = _describe(store)
        for split in ("train", "test"):
            shards = _shards(store, f"{name}-{split}", kind, lengths[split])
            raw = [record for path, length in shards for record in records(path, length)]
            splits[split] = _decode(split, raw, tf_example_pb2.Example, labels)
    except Exception as error:  # array_record, protobuf and Pillow raise many kinds of errors
        raise DataError(
            f"the TFDS store {store} cannot be used: {error or type(error).__name__}\n"
            "  remove it, and the next run will use another source"
        ) from error
    return splits, kind


def _describe(store: Path) -> tuple[str, dict[str, list[int]]]:
    """The format of a store's files, and the number of records in each file by split."""
    path = store / "dataset_info.json"
    if path.stat().st_size > MAX_INFO:
        raise DataError(f"{path.name} has {path.stat().st_size:,} bytes; expected about 700")
    described = json.loads(path.read_bytes())
    kind = described.get("fileFormat", "tfrecord")  # old versions of TFDS do not state it
    if kind not in ("array_record", "tfrecord"):
        raise DataError(f"its format is {str(kind)[:40]!r}; expected array_record or tfrecord")
    lengths = {}
    for split in described["splits"]:
        if split.get("filepathTemplate", TEMPLATE) != TEMPLATE:
            raise DataError(f"its files are named {str(split['filepathTemplate'])[:80]!r}; expected {TEMPLATE!r}")
        lengths[split["name"]] = [int(length) for length in split["shardLengths"]]
    for name in ("train", "test"):
        if name not in lengths or min(lengths[name], default=-1) < 0 or not 0 < sum(lengths[name]) <= MAX_IMAGES:
            raise DataError(f"{path.name} states an impossible number of images of {name}")
    return kind, lengths


def _shards(store: Path, name: str, kind: str, lengths: Sequence[int]) -> Iterator[tuple[Path, int]]:
    """Yields each file of a split (such as cifar10-train) and its number of records; checks kind and size of the file."""
    for number, length in enumerate(lengths):
        path = store / f"{name}.{kind}-{number:05d}-of-{len(lengths):05d}"
        if not path.is_file():  # reading a pipe may never end
            raise DataError(f"{path.name} is {'not a regular file' if path.exists() else 'missing'}")
        if path.stat().st_size > MAX_SHARD:
            raise DataError(f"{path.name} has {path.stat().st_size:,} bytes; expected at most 130 million")
        yield path, length


def _decode(name: str, raw: Sequence[bytes], example: Any, labels: Mapping[str, int]) -> Stored:
    """Converts a split's serialised tf.train.Examples to records in the official order."""
    from PIL import Image

    records = np.empty((len(raw), len(labels) + PIXELS), np.uint8)
    index, found = np.arange(len(raw)), np.empty((len(raw), len(labels)), np.int64)
    for i, message in enumerate(raw):
        feature = example.FromString(message).features.feature  # TFDS's deserialize_example_np takes twice as long
        # Only PNG: Pillow would pass PostScript to a program.
        image = Image.open(io.BytesIO(feature["image"].bytes_list.value[0]), formats=["PNG"])
        if image.size != (32, 32) or image.mode != "RGB":
            raise DataError(f"an image of {name} is {image.size} {image.mode}; expected (32, 32) RGB")
        records[i, len(labels) :] = np.asarray(image).transpose(2, 0, 1).reshape(-1)
        found[i] = [feature[key].int64_list.value[0] for key in labels]
        if "id" in feature:  # old versions of the data set have no ids; their order is kept
            index[i] = int(feature["id"].bytes_list.value[0].removeprefix(f"{name}_".encode()))
    for column, classes in zip(found.T, labels.values(), strict=True):
        if len(wrong := column[(column < 0) | (column >= classes)]):
            raise DataError(f"an image of {name} has the label {wrong[0]}; expected 0 to {classes - 1}")
    records[:, : len(labels)] = found
    order = np.argsort(index)
    if (np.diff(index[order]) == 0).any():
        raise DataError(f"the ids of {name} are not unique")
    return Stored(records[order], index[order])


def _tfrecords(path: Path) -> Iterator[bytes]:
    """Yields the records of a TFRecord file, whose format is: uint64 length, its CRC, the record, its CRC.

    The CRCs (CRC-32C) are not checked: that is slow in Python, and official batches are verified by their SHA-256.
    """
    with open(path, "rb") as file:
        while head := file.read(12):
            (length,) = struct.unpack("<Q4x", head)
            record = file.read(length + 4) if length <= MAX_RECORD else b""
            if len(record) != length + 4:
                raise DataError(f"{path.name} is truncated or damaged")
            yield record[:-4]


def prepare_tfds(dataset: Dataset, data_dir: str | Path, *, progress: bool = True) -> Path:
    """Writes CIFAR-10 as a TFDS store, which ``tfds.data_source("cifar10", data_dir=...)`` reads without TensorFlow.

    TFDS writes to a temporary folder and renames it at the end, so that an interruption leaves no incomplete store.

    Args:
        dataset: the result of ``load_cifar10``.
        data_dir: the store is written to ``data_dir/cifar10/3.0.2``.
        progress: whether to print a line, and show TFDS's progress bars on a terminal.

    Returns:
        The folder of the store.

    Raises:
        DataError: TFDS cannot be imported, or the store already exists or cannot be written.
    """
    store = Path(data_dir).expanduser() / NAME / VERSION
    if dataset.name != NAME:
        raise DataError(f"expected CIFAR-10 for the TFDS store {store}, got {dataset.name}")
    if store.exists():
        raise DataError(f"{store} already exists; remove it to prepare it again")
    try:
        import array_record  # noqa: F401 - otherwise TFDS would fail at the first image with an error of its own
        import tensorflow_datasets as tfds
        from PIL import Image
    except ImportError as error:
        raise not_importable("tensorflow-datasets", error) from error

    with tfds.core.registered.skip_registration():  # TFDS's builder has the same name, but needs TensorFlow

        class Cifar10(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc, name-defined]
            VERSION = tfds.core.Version("3.0.2")

            def _info(self) -> Any:
                features = {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(32, 32, 3)),
                    "label": tfds.features.ClassLabel(names=dataset.classes),
                }
                features = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {name: self._generate_examples(name, getattr(dataset, name)) for name in ("train", "test")}

            def _generate_examples(self, name: str, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
                # Keys and ids as in TFDS's builder. TFDS encodes arrays with TensorFlow, but PIL images without it.
                for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
                    yield i, {"id": f"{name}_{i:05d}", "image": Image.fromarray(image), "label": int(label)}

    if progress:
        images = len(dataset.train.labels) + len(dataset.test.labels)
        print(f"preparing the TFDS store {store} ({images:,} images)", file=sys.stderr)
    tfds.display_progress_bar(progress and sys.stderr.isatty())
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # suppresses an announcement of a download
            Cifar10(data_dir=str(store.parents[1]), file_format="array_record").download_and_prepare()
    except Exception as error:  # TFDS and array_record raise many kinds of errors, such as RuntimeError for a full disk
        if find_tfds(store.parents[1]) != store:  # otherwise another process wrote the same store first
            raise DataError(f"cannot write the TFDS store {store}: {error}") from error
    finally:
        tfds.display_progress_bar(True)
    return store
