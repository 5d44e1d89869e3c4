"""Tar files of images with their classes, as webdataset makes them: ``KEY.jpg`` and ``KEY.cls`` one after the other.

The form in which ImageNet lies on the Hugging Face Hub (``timm/imagenet-1k-wds``), which any language's tar writes and
reads. Of the headers an index is made once (:func:`jresnet.data.index.kept`); from then on an image is read by its
position, so the order of an epoch is as free as with files, and nothing is unpacked. array_record would need its own
library on both sides and says nothing about the form of its records.
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

TRAIN, HELD = r"train", r"val|test"  # what a shard's file, or its folder, has in its name
MAX_LABEL = 1_000_000
CLASSES = "classes.txt"  # the classes' names, a line each; without it they are called by their numbers
MAX_CLASSES = 2**26  # bytes of that file


def are_in(root: Path) -> bool:
    """Whether a folder holds tar files, itself or in its folders of training and validation images."""
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
        raise DataError(f"{root} has tar files, but none with train in its name or its folder's")
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
        raise DataError(f"{path} does not give {most + 1:,} names or more, each once")
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
    """The images of a shard with their classes, in its order."""
    if not path.is_file():  # a pipe would never end
        raise ValueError("it is no ordinary file")
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
                raise ValueError("it is cut short")
            if f".{end.lower()}" in EXTENSIONS:
                images[key] = Record(str(path), member.offset_data, member.size)
            elif end == "cls":
                file = tar.extractfile(member)
                text = file.read(32) if file else b""
                if not text.strip().isdigit() or int(text) > MAX_LABEL:
                    raise ValueError(f"{member.name[:80]} holds no class's number, but {text[:32]!r}")
                labels[key] = int(text)
    if without := [key for key in images if key not in labels]:
        raise ValueError(f"{len(without):,} images have no class beside them (KEY.cls): {few(without)}")
    if not images:
        raise ValueError("there is no image in it")
    return [(record, labels[key]) for key, record in images.items()]


def read(record: Record) -> bytes:
    """The bytes of a member."""
    with open(record.path, "rb") as file:
        file.seek(record.position)
        return file.read(record.length)
