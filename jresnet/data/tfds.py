"""CIFAR-10 and CIFAR-100 as stores of TensorFlow Datasets (TFDS): found and read without TensorFlow; CIFAR-10's written.

A store's folder may come from anyone. TFDS's own reader imports the modules that ``features.json`` names, so it is not
used: the record files are opened by the names that a store of this data set has, and each record is parsed as a
``tf.train.Example``. Nothing in the folder names code that is run.
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

NAME, VERSION = "cifar10", "3.0.2"  # TFDS's for CIFAR-10; other versions are read as well
LABELS = {"label": 10}  # the features that are labels, in the order of a record, and how many classes each has
# How TFDS names a store's files; versions before 4.8 do not write it down.
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
MAX_INFO = 2**20  # bytes of dataset_info.json; TFDS writes some 700
MAX_SHARD = 2**30  # bytes of a file of records; all of CIFAR-10 has some 130 million
MAX_RECORD = 2**20  # bytes; an image has some 3,000
MAX_IMAGES = 1_000_000  # of a split; CIFAR-10 has 50,000


class Stored(NamedTuple):
    """A split of a store."""

    records: np.ndarray  # uint8 [n, labels + PIXELS], by ascending place
    places: np.ndarray  # int64 [n]: in the official order


def find_tfds(root: Path, name: str = NAME) -> Path | None:
    """The newest prepared version of TFDS's ``name`` under ``root``; told by its files, without TFDS's slow import."""
    versions = [
        folder
        for folder in (root / name).glob("*.*.*")
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)  # not incomplete.XXXXXX_3.0.2, which an interruption leaves
        and all((folder / file).is_file() for file in ("dataset_info.json", "features.json"))
    ]
    return max(versions, key=lambda folder: [int(part) for part in folder.name.split(".")], default=None)


def read_tfds(store: Path, name: str = NAME, labels: Mapping[str, int] = LABELS) -> tuple[dict[str, Stored], str]:
    """The splits "train" and "test" of a store, in the official order, and the format of its files.

    Args:
        store: a folder, of :func:`find_tfds`.
        name: TFDS's of the data set.
        labels: as ``LABELS``.

    Raises:
        DataError: TFDS cannot be imported, or the store is damaged or of another data set.
    """
    try:
        import tensorflow_datasets  # noqa: F401 - the error below then names it where it is missing
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
            raise DataError(f"{path.name} has {count:,} of {length:,} records")
        return found

    splits = {}
    try:
        kind, lengths = _describe(store)
        for split in ("train", "test"):
            shards = _shards(store, f"{name}-{split}", kind, lengths[split])
            raw = [record for path, length in shards for record in records(path, length)]
            splits[split] = _decode(split, raw, tf_example_pb2.Example, labels)
    except Exception as error:  # array_record, protobuf and pillow fail in ways of their own
        raise DataError(
            f"the TFDS store {store} cannot be used: {error or type(error).__name__}\n"
            "  remove it, and the next run looks for another source"
        ) from error
    return splits, kind


def _describe(store: Path) -> tuple[str, dict[str, list[int]]]:
    """The format of a store's files, and by split the number of records in each of its files."""
    path = store / "dataset_info.json"
    if path.stat().st_size > MAX_INFO:
        raise DataError(f"{path.name} has {path.stat().st_size:,} bytes; expected some 700")
    described = json.loads(path.read_bytes())
    kind = described.get("fileFormat", "tfrecord")  # old versions of TFDS do not say
    if kind not in ("array_record", "tfrecord"):
        raise DataError(f"its format is {str(kind)[:40]!r}; expected array_record or tfrecord")
    lengths = {}
    for split in described["splits"]:
        if split.get("filepathTemplate", TEMPLATE) != TEMPLATE:
            raise DataError(f"its files are named {str(split['filepathTemplate'])[:80]!r}; expected {TEMPLATE!r}")
        lengths[split["name"]] = [int(length) for length in split["shardLengths"]]
    for name in ("train", "test"):
        if name not in lengths or min(lengths[name], default=-1) < 0 or not 0 < sum(lengths[name]) <= MAX_IMAGES:
            raise DataError(f"{path.name} says nothing that can be true about the images of {name}")
    return kind, lengths


def _shards(store: Path, name: str, kind: str, lengths: Sequence[int]) -> Iterator[tuple[Path, int]]:
    """The files of a split (cifar10-train, say), each an ordinary one of a size that can be, and how many records it has."""
    for number, length in enumerate(lengths):
        path = store / f"{name}.{kind}-{number:05d}-of-{len(lengths):05d}"
        if not path.is_file():  # a pipe would never end
            raise DataError(f"{path.name} is {'no ordinary file' if path.exists() else 'missing'}")
        if path.stat().st_size > MAX_SHARD:
            raise DataError(f"{path.name} has {path.stat().st_size:,} bytes; expected some 130 million at most")
        yield path, length


def _decode(name: str, raw: Sequence[bytes], example: Any, labels: Mapping[str, int]) -> Stored:
    """A split's serialised tf.train.Examples -> its records in the official order."""
    from PIL import Image

    records = np.empty((len(raw), len(labels) + PIXELS), np.uint8)
    index, found = np.arange(len(raw)), np.empty((len(raw), len(labels)), np.int64)
    for i, message in enumerate(raw):
        feature = example.FromString(message).features.feature  # TFDS's deserialize_example_np takes twice as long
        # PNG alone: Pillow would hand PostScript to a program.
        image = Image.open(io.BytesIO(feature["image"].bytes_list.value[0]), formats=["PNG"])
        if image.size != (32, 32) or image.mode != "RGB":
            raise DataError(f"an image of {name} is {image.size} {image.mode}; expected (32, 32) RGB")
        records[i, len(labels) :] = np.asarray(image).transpose(2, 0, 1).reshape(-1)
        found[i] = [feature[key].int64_list.value[0] for key in labels]
        if "id" in feature:  # old versions of the dataset have none: their order stays as it is
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
    """A TFRecord file's records: uint64 length, its CRC, the record, its CRC.

    The CRCs (Castagnoli's) are not checked: that is slow in Python, and an official batch is known by its SHA-256.
    """
    with open(path, "rb") as file:
        while head := file.read(12):
            (length,) = struct.unpack("<Q4x", head)
            record = file.read(length + 4) if length <= MAX_RECORD else b""
            if len(record) != length + 4:
                raise DataError(f"{path.name} is cut short or damaged")
            yield record[:-4]


def prepare_tfds(dataset: Dataset, data_dir: str | Path, *, progress: bool = True) -> Path:
    """Write CIFAR-10 as a TFDS store, which ``tfds.data_source("cifar10", data_dir=...)`` reads without TensorFlow.

    TFDS writes into a folder beside the store and renames it at the end, so what an interruption leaves is no store.

    Args:
        dataset: what ``load_cifar10`` gave.
        data_dir: the store becomes ``data_dir/cifar10/3.0.2``.
        progress: whether to say so, with TFDS's progress bars on a terminal.

    Returns:
        The store's folder.

    Raises:
        DataError: TFDS cannot be imported, a store is there already, or it cannot be written.
    """
    store = Path(data_dir).expanduser() / NAME / VERSION
    if dataset.name != NAME:
        raise DataError(f"only CIFAR-10 can become the TFDS store {store}, not {dataset.name}")
    if store.exists():
        raise DataError(f"{store} exists already; remove it to have it prepared anew")
    try:
        import array_record  # noqa: F401 - else TFDS would fail with an error of its own at the first image
        import tensorflow_datasets as tfds
        from PIL import Image
    except ImportError as error:
        raise not_importable("tensorflow-datasets", error) from error

    with tfds.core.registered.skip_registration():  # the stock builder has this name, and needs TensorFlow to prepare

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
                # Keys and ids as in the stock builder. TFDS encodes arrays with TensorFlow, PIL images without.
                for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
                    yield i, {"id": f"{name}_{i:05d}", "image": Image.fromarray(image), "label": int(label)}

    if progress:
        images = len(dataset.train.labels) + len(dataset.test.labels)
        print(f"preparing the TFDS store {store} ({images:,} images)", file=sys.stderr)
    tfds.display_progress_bar(progress and sys.stderr.isatty())
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it would announce a download of unknown size
            Cifar10(data_dir=str(store.parents[1]), file_format="array_record").download_and_prepare()
    except Exception as error:  # TFDS and array_record fail in ways of their own: of a full disk by a RuntimeError
        if find_tfds(store.parents[1]) != store:  # else another process was quicker, and its store is as good
            raise DataError(f"cannot write the TFDS store {store}: {error}") from error
    finally:
        tfds.display_progress_bar(True)
    return store
