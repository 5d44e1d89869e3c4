"""Labelled images of any prepared store of TensorFlow Datasets, read one by one, without TensorFlow.

A store may come from anyone: as in :mod:`jresnet.data.tfds`, its files are opened by the names that a store has, and nothing
in it names code that is run.
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

MAX_RECORD = 2**28  # bytes; a photo has some millions
MAX_IMAGES = 100_000_000  # of a split
HELD = ("validation", "val", "test")  # splits to judge by, the first that a store has


class Store(NamedTuple):
    """What a store holds: the records of its splits with their labels, int32 ``[n]``."""

    folder: Path
    classes: tuple[str, ...]
    parts: dict[str, tuple[Sources, np.ndarray]]

    @property
    def held(self) -> tuple[Sources, np.ndarray] | None:
        """Those to judge by, where the store has some."""
        return next((self.parts[name] for name in HELD if name in self.parts), None)


def find(name: str, data_dir: str | Path | None = None) -> Store:
    """A prepared store by its name, ``NAME[/CONFIG][:VERSION]``; every record is parsed once for its label.

    What is found is kept (:func:`jresnet.data.index.kept`).

    Args:
        name: of the data set, with features "image" and "label", and a split "train".
        data_dir: where the stores are; ``None``: ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.

    Raises:
        DataError: there is none, or it is damaged or of another form.
    """
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    if not re.fullmatch(r"\w+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", name, re.ASCII) or ".." in name:
        raise DataError(
            f"a TFDS store is named tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:1.0.0, not tfds:{printable(name)}"
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
            f"tfds.builder({path!r}).download_and_prepare(), or name the folder of stores as data_dir"
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
        raise DataError(f"{info.name} has {info.stat().st_size:,} bytes; expected some thousands")
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
            raise DataError(f"{info.name} says nothing that can be true about the images of {split['name']}")
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
    """The records of a split's files, of which each has so many, and their labels."""
    records: list[Record] = []
    for path, length in zip(files, lengths, strict=True):
        if not path.is_file():  # a pipe would never end
            raise DataError(f"{path.name} is {'no ordinary file' if path.exists() else 'missing'}")
        own = list(_records(path, kind))
        if len(own) != length:
            raise DataError(f"{path.name} has {len(own):,} of {length:,} records")
        records += own
    labels = np.array([_label(record) for record in records], np.int64)
    sources = Sources.of(record._replace(path=os.path.basename(record.path)) for record in records)
    assert sources.parts is not None
    arrays = {"text": sources.text, "ends": sources.ends, "parts": sources.parts, "labels": labels}
    return Found(arrays, {}, [str(path) for path in files])


def _classes(store: Path, most: int) -> tuple[str, ...]:
    """The classes' names, of the file that TFDS writes beside ``features.json``; else numbers."""
    path = store / "label.labels.txt"
    if not path.is_file():
        return tuple(map(str, range(most + 1)))
    names = tuple(path.read_text("utf-8").splitlines()) if path.stat().st_size <= 2**26 else ()
    if len(names) <= most or len(set(names)) != len(names) or not all(name and name.isprintable() for name in names):
        raise DataError(f"{path.name} does not give {most + 1:,} names or more, each once")
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
                raise DataError(f"{path.name} is cut short or damaged")
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
    except Exception as error:  # protobuf's own
        raise DataError(f"{record} is no tf.train.Example") from error


def _label(record: Record) -> int:
    features = _features(record)
    if "image" not in features or "label" not in features:
        raise DataError(f"its records hold {few(features)}: expected image and label")
    (label,) = features["label"].int64_list.value
    return label


def read(record: Record) -> bytes:
    """A record's encoded image."""
    (content,) = _features(record)["image"].bytes_list.value
    return content
