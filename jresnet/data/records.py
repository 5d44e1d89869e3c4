"""Reads labelled images of any prepared TensorFlow Datasets (TFDS) store one by one, without TensorFlow.

Stores are untrusted: as in :mod:`jresnet.data.tfds`, files are opened by the usual names of a store, and nothing in a store
can select code to run.
"""

from __future__ import annotations

import functools
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jresnet.data.dataset import not_importable
from jresnet.data.index import Found, Record, Sources, kept
from jresnet.data.tfds import MAX_INFO, TEMPLATE
from jresnet.errors import DataError
from jresnet.files import few, printable

MAX_RECORD = 2**28  # bytes; a photo has a few million
MAX_IMAGES = 100_000_000  # largest number of images in a split
HELD = ("validation", "val", "test")  # names of validation splits; the first one that exists is used


class Store(NamedTuple):
    """The content of a store: the records of its splits with their labels, int32 ``[n]``."""

    folder: Path
    classes: tuple[str, ...]
    parts: dict[str, tuple[Sources, np.ndarray]]

    @property
    def held(self) -> tuple[Sources, np.ndarray] | None:
        """The validation split; None if there is none."""
        return next((self.parts[name] for name in HELD if name in self.parts), None)


def find(name: str, data_dir: str | Path | None = None) -> Store:
    """Finds a prepared store by its name ``NAME[/CONFIG][:VERSION]``.

    Every record is parsed once for its label. The result is cached (:func:`jresnet.data.index.kept`).

    Args:
        name: name of a data set with features "image" and "label" and a split "train".
        data_dir: folder of the stores; ``None``: ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.

    Raises:
        DataError: the store does not exist, is damaged, or has another format.
    """
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    if not re.fullmatch(r"\w+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", name, re.ASCII) or ".." in name:
        raise DataError(
            f"expected a TFDS store as tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:1.0.0, got tfds:{printable(name)}"
        )
    path, _, version = name.partition(":")
    versions = [
        folder
        for folder in sorted((root / path).glob(version or "*.*.*"))
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) and (folder / "dataset_info.json").is_file()
    ]
    if not versions:
        raise DataError(
            f"there is no prepared store {root / path}/VERSION: prepare it with "
            f"tfds.builder({path!r}).download_and_prepare(), or give the folder of stores as `data_dir`"
        )
    store = max(versions, key=lambda folder: [int(part) for part in folder.name.split(".")])
    try:
        return _read(store, path.partition("/")[0])
    except DataError as error:
        raise DataError(f"the TFDS store {store} cannot be used: {error}") from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"the TFDS store {store} cannot be used: {error!r:.300}") from error


def _read(store: Path, name: str) -> Store:
    info = store / "dataset_info.json"
    if info.stat().st_size > MAX_INFO:
        raise DataError(f"{info.name} has {info.stat().st_size:,} bytes; expected a few thousand")
    described = json.loads(info.read_bytes())
    kind = described.get("fileFormat", "tfrecord")
    if kind not in ("array_record", "tfrecord"):
        raise DataError(f"its format is {str(kind)[:40]!r}; expected array_record or tfrecord")
    parts = {}
    for split in described["splits"]:
        if split["name"] not in ("train", *HELD):
            continue
        if split.get("filepathTemplate", TEMPLATE) != TEMPLATE:
            raise DataError(f"its files are named {str(split['filepathTemplate'])[:80]!r}; expected {TEMPLATE!r}")
        lengths = [int(length) for length in split["shardLengths"]]
        if min(lengths, default=-1) < 0 or not 0 < sum(lengths) <= MAX_IMAGES or len(lengths) > 100_000:
            raise DataError(f"{info.name} states an impossible number of images of {split['name']}")
        files = [
            store / f"{name}-{split['name']}.{kind}-{number:05d}-of-{len(lengths):05d}"
            for number in range(len(lengths))
        ]
        found = kept(
            f"tfds {os.path.abspath(store)} {split['name']}",
            lambda files=files, lengths=lengths: _listed(files, lengths, kind),  # type: ignore[misc]
        )
        arrays = found.arrays
        parts[split["name"]] = (Sources(str(store), arrays["text"], arrays["ends"], arrays["parts"]), arrays["labels"])
    if "train" not in parts:
        raise DataError(f"it has no split train, but {few(str(split['name']) for split in described['splits'])}")
    most = max(labels.max() for _, labels in parts.values())
    if min(labels.min() for _, labels in parts.values()) < 0 or most > 1_000_000:
        raise DataError("a label is not a number from 0 to a million")
    return Store(
        store, _classes(store, int(most)), {k: (r, labels.astype(np.int32)) for k, (r, labels) in parts.items()}
    )


def _listed(files: list[Path], lengths: list[int], kind: str) -> Found:
    """The records and labels of a split's files; ``lengths`` are the expected numbers of records."""
    records: list[Record] = []
    for path, length in zip(files, lengths, strict=True):
        if not path.is_file():  # reading a pipe may never end
            raise DataError(f"{path.name} is {'not a regular file' if path.exists() else 'missing'}")
        own = list(_records(path, kind))
        if len(own) != length:
            raise DataError(f"{path.name} has {len(own):,} records; expected {length:,}")
        records += own
    labels = np.array([_label(record) for record in records], np.int64)
    sources = Sources.of(record._replace(path=os.path.basename(record.path)) for record in records)
    assert sources.parts is not None
    arrays = {"text": sources.text, "ends": sources.ends, "parts": sources.parts, "labels": labels}
    return Found(arrays, {}, [str(path) for path in files])


def _classes(store: Path, most: int) -> tuple[str, ...]:
    """The names of the classes, from the file that TFDS writes beside ``features.json``; numbers if there is none."""
    path = store / "label.labels.txt"
    if not path.is_file():
        return tuple(map(str, range(most + 1)))
    names = tuple(path.read_text("utf-8").splitlines()) if path.stat().st_size <= 2**26 else ()
    if len(names) <= most or len(set(names)) != len(names) or not all(name and name.isprintable() for name in names):
        raise DataError(f"{path.name} must contain at least {most + 1:,} names, all different")
    return names


def _records(path: Path, kind: str) -> Iterator[Record]:
    if kind == "array_record":
        for position in range(_reader(str(path)).num_records()):
            yield Record(str(path), position, -1)
        return
    size = path.stat().st_size
    with open(path, "rb") as file:
        position = 0
        while head := file.read(12):  # uint64 length, its CRC, the record, its CRC
            length = struct.unpack("<Q4x", head)[0] if len(head) == 12 else MAX_RECORD + 1
            if length > MAX_RECORD or position + 12 + length + 4 > size:
                raise DataError(f"{path.name} is truncated or damaged")
            yield Record(str(path), position + 12, length)
            position += 12 + length + 4
            file.seek(position)


@functools.lru_cache(64)
def _reader(path: str) -> Any:
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise not_importable("array_record", error) from error
    return ArrayRecordReader(path)


def _features(record: Record) -> Any:
    try:
        from tensorflow_datasets.proto import tf_example_pb2
    except ImportError as error:
        raise not_importable("tensorflow-datasets", error) from error
    if record.length < 0:
        (content,) = _reader(record.path).read([record.position])
    else:
        with open(record.path, "rb") as file:
            file.seek(record.position)
            content = file.read(record.length)
    try:
        return tf_example_pb2.Example.FromString(content).features.feature
    except Exception as error:  # of protobuf
        raise DataError(f"{record} is not a tf.train.Example") from error


def _label(record: Record) -> int:
    features = _features(record)
    if "image" not in features or "label" not in features:
        raise DataError(f"its records have the features {few(features)}: expected image and label")
    (label,) = features["label"].int64_list.value
    return label


def read(record: Record) -> bytes:
    """The encoded image in a record."""
    (content,) = _features(record)["image"].bytes_list.value
    return content
