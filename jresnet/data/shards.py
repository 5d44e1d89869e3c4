"""Reads tar files of images with their classes in webdataset's format: ``KEY.jpg`` followed by ``KEY.cls``.

ImageNet is available in this format on the Hugging Face Hub (``timm/imagenet-1k-wds``), and any tar program can write and
read it. An index of the headers is created once and cached (:func:`jresnet.data.index.kept`). Images are then read by their
offsets, so that an epoch can have any order and nothing is unpacked. (array_record would need its own library to write and
read, and does not define the content of records.)
"""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path

import numpy as np

from jresnet.data.images import EXTENSIONS
from jresnet.data.index import Found, Record, Sources, kept
from jresnet.errors import DataError
from jresnet.files import few

TRAIN, HELD = r"train", r"val|test"  # patterns in the name of a shard or of its folder
MAX_LABEL = 1_000_000
CLASSES = "classes.txt"  # names of the classes, one per line; without this file their numbers are used
MAX_CLASSES = 2**26  # largest size of that file in bytes


def are_in(root: Path) -> bool:
    """Whether there are tar files in a folder, or in its folders of training and validation images."""
    return bool(_shards(root))


def _shards(root: Path) -> dict[str, list[Path]]:
    """The tar files by part, in the order of their names."""
    found: dict[str, list[Path]] = {}
    for path in [*sorted(root.glob("*.tar")), *sorted(root.glob("*/*.tar"))]:
        name = path.relative_to(root).as_posix().lower()
        part = "held" if re.search(HELD, name) else "train" if re.search(TRAIN, name) else None
        if part:
            found.setdefault(part, []).append(path)
    return found


def find(root: Path) -> tuple[tuple[str, ...], dict[str, tuple[Sources, np.ndarray]]]:
    """The classes, and the sources and labels of the parts ``train`` and, if there is one, ``held``.

    Raises:
        DataError: a shard is damaged or of another form, or there is none to train on.
    """
    shards = _shards(root)
    if "train" not in shards:
        raise DataError(f"{root} has tar files, but none with train in its name or in its folder's name")
    parts = {}
    for part, paths in shards.items():
        found = kept(f"tar {os.path.abspath(root)} {part}", lambda paths=paths: _listed(root, paths))  # type: ignore[misc]
        arrays = found.arrays
        parts[part] = (Sources(str(root), arrays["text"], arrays["ends"], arrays["parts"]), arrays["labels"])
    most = int(max(labels.max() for _, labels in parts.values()))
    return _classes(root, most), parts


def _classes(root: Path, most: int) -> tuple[str, ...]:
    path = root / CLASSES
    if not path.is_file():
        return tuple(map(str, range(most + 1)))
    names = tuple(path.read_text("utf-8", "replace").splitlines()) if path.stat().st_size <= MAX_CLASSES else ()
    if len(names) <= most or len(set(names)) != len(names) or not all(name and name.isprintable() for name in names):
        raise DataError(f"{path} must contain at least {most + 1:,} names, all different")
    return names


def _listed(root: Path, paths: list[Path]) -> Found:
    records: list[Record] = []
    labels: list[int] = []
    for path in paths:
        try:
            own = _members(path)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise DataError(f"the shard {path} cannot be used: {error}") from error
        name = path.relative_to(root).as_posix()
        records += [record._replace(path=name) for record, _ in own]
        labels += [label for _, label in own]
    sources = Sources.of(records)
    assert sources.parts is not None
    arrays = {"text": sources.text, "ends": sources.ends, "parts": sources.parts, "labels": np.array(labels, np.int32)}
    return Found(arrays, {}, [str(path) for path in paths])


def _members(path: Path) -> list[tuple[Record, int]]:
    """The images of a shard with their classes, in order."""
    if not path.is_file():  # reading a pipe may never end
        raise ValueError("it is not a regular file")
    images: dict[str, Record] = {}
    labels: dict[str, int] = {}
    size = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            if not member.isreg() or member.issparse():
                continue
            key, dot, end = member.name.rpartition("/")[2].partition(".")
            key = member.name.removesuffix(dot + end)
            if member.offset_data + member.size > size:
                raise ValueError("it is truncated")
            if f".{end.lower()}" in EXTENSIONS:
                images[key] = Record(str(path), member.offset_data, member.size)
            elif end == "cls":
                file = tar.extractfile(member)
                text = file.read(32) if file else b""
                if not text.strip().isdigit() or int(text) > MAX_LABEL:
                    raise ValueError(f"{member.name[:80]} must contain the number of a class, found {text[:32]!r}")
                labels[key] = int(text)
    if without := [key for key in images if key not in labels]:
        raise ValueError(f"{len(without):,} images have no class beside them (KEY.cls): {few(without)}")
    if not images:
        raise ValueError("it contains no image")
    return [(record, labels[key]) for key, record in images.items()]


def read(record: Record) -> bytes:
    """Reads the bytes of a member."""
    with open(record.path, "rb") as file:
        file.seek(record.position)
        return file.read(record.length)
