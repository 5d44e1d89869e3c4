"""Lists, checks and splits image files on disk; :mod:`jresnet.data.stream` decodes them.

find: folder, shards, table or TFDS store -> Listing -> split -> check: report damaged images -> Files (lazy) or pixels in
memory
"""

from __future__ import annotations

import csv
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from jresnet.data import images, records, shards
from jresnet.data.dataset import Dataset, Split
from jresnet.data.images import BadImage
from jresnet.data.index import Found, Source, Sources, kept
from jresnet.data.stream import Files, quiet, said, shape
from jresnet.errors import DataError
from jresnet.files import few, printable
from jresnet.weights.preprocessing import Preprocessing

TRAIN, HELD = ("train", "training"), ("val", "valid", "validation", "test")  # folder names of the parts of a data set
SMALL = 64  # images up to this size in pixels are kept in memory, decoded


@dataclass(frozen=True, eq=False)
class Listing:
    """Images by class, not opened yet; ``held`` is the data set's own validation part."""

    name: str  # describes their location, to print
    classes: tuple[str, ...]
    train: Part
    held: Part | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Part:
    """Images in order, with the indices of their classes."""

    sources: Sources
    labels: Int[np.ndarray, " n"]

    def take(self, positions: Sequence[int] | np.ndarray) -> Part:
        """The images at ``positions``."""
        return Part(self.sources.take(positions), self.labels[np.asarray(positions, int)])


class Skipped(NamedTuple):
    """An image that cannot be used."""

    file: str
    reason: str


def find(data: str | os.PathLike[str], data_dir: str | Path | None = None) -> Listing:
    """Lists images by class without opening them.

    Args:
        data: a folder ``CLASS/**/*.jpg``, or a folder with such folders ``train`` and ``val``; a folder of tar files
            (:mod:`jresnet.data.shards`); a table ``*.csv`` of lines ``path,label`` with paths relative to its folder; or
            ``"tfds:NAME"``, a prepared store of TensorFlow Datasets.
        data_dir: folder of the TFDS stores; ``None``: ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.

    Raises:
        DataError: the data does not exist, a class has no image, or there are fewer than two classes.
    """
    text = os.fspath(data)
    if text.startswith("tfds:"):
        found = _store(text.removeprefix("tfds:"), data_dir)
    elif text.lower().endswith(".csv"):
        found = _table(Path(text).expanduser())
    elif shards.are_in(root := Path(text).expanduser()):
        found = _shards(root)
    else:
        found = _folder(root)
    _check_classes(found, found.train.labels, "has no training image")
    return found


def _check_classes(listing: Listing, labels: np.ndarray, what: str) -> None:
    """Raises DataError if a class does not occur in ``labels``, or if there are fewer than two classes."""
    counts = np.bincount(labels, minlength=len(listing.classes))
    if empty := [listing.classes[i] for i in np.flatnonzero(counts == 0)]:
        others = f". {'; '.join(listing.notes)}; images end in {', '.join(images.EXTENSIONS)}" if listing.notes else ""
        raise DataError(
            f"{len(empty):,} of the {len(listing.classes):,} classes of {listing.name} "
            f"{what if len(empty) == 1 else what.replace('has', 'have')}: {few(empty)}. Add images, or remove the "
            f"class{others}"
        )
    if len(listing.classes) < 2:
        raise DataError(f"{listing.name} has only one class, {printable(listing.classes[0])}: at least two are needed")


def _folder(root: Path) -> Listing:
    entries = sorted(os.listdir(root)) if root.is_dir() else []
    parts = {name: next((n for n in names if n in entries and (root / n).is_dir()), None) for name, names in
             (("train", TRAIN), ("held", HELD))}  # fmt: skip
    if parts["held"] and not parts["train"]:
        # If there are several folders, they may be classes with such names.
        if sum((root / entry).is_dir() for entry in entries) == 1:
            raise DataError(
                f"{root} has a folder {parts['held']} but no folder for training: expected {' or '.join(TRAIN)}"
            )
        parts["held"] = None
    if not parts["train"] or not any(
        (root / parts["train"] / name).is_dir() for name in os.listdir(root / parts["train"])
    ):
        parts = {"train": None, "held": None}
    top = root / parts["train"] if parts["train"] else root
    classes, train, notes = _listed(top)
    held = None
    if parts["held"]:
        own, held, more = _listed(root / parts["held"])
        if unknown := [name for name in own if name not in classes]:
            plural = "es" if len(unknown) > 1 else ""
            raise DataError(
                f"{root / parts['held']} has {len(unknown):,} class{plural} that {top} does not have ({few(unknown)}): "
                "validation classes must be training classes"
            )
        held = Part(held.sources, np.array([classes.index(own[label]) for label in held.labels], np.int32))
        notes += more
    return Listing(str(root).replace("\n", "\\n"), classes, train, held, notes)


def _listed(root: Path) -> tuple[tuple[str, ...], Part, tuple[str, ...]]:
    """The classes, images and notes of ``root/CLASS/**``."""
    found = kept(f"folder {os.path.abspath(root)}", lambda: _walked(root))
    ignored = found.about["ignored"]
    notes = (f"{ignored:,} files of other kinds in {root} are ignored",) if ignored else ()
    sources = Sources(str(root), found.arrays["text"], found.arrays["ends"])
    return tuple(found.about["classes"]), Part(sources, found.arrays["labels"]), notes


def _walked(root: Path) -> Found:
    walked = images.walk(root)
    # macOS creates a file ._NAME beside each file on disks with other file systems.
    seen = [(path, label) for path, label in walked.files if not os.path.basename(path).startswith(".")]
    sources = Sources.of(path for path, _ in seen)
    labels = np.array([label for _, label in seen], np.int32)
    return Found(
        {"text": sources.text, "ends": sources.ends, "labels": labels},
        {"classes": walked.classes, "ignored": walked.ignored},
        walked.folders,
    )


def _shards(root: Path) -> Listing:
    classes, parts = shards.find(root)
    train, held = (Part(*parts[name]) if name in parts else None for name in ("train", "held"))
    assert train is not None, "shards.find guarantees it"
    return Listing(str(root), classes, train, held)


def _table(path: Path) -> Listing:
    """The images of a table; a first line "path,label" is a header."""
    try:
        if not path.is_file():
            raise DataError(f"there is no table {path}: expected a file of lines path,label")
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the table {path}: {error}; expected UTF-8 lines path,label") from error
    if rows and [cell.strip().lower() for cell in rows[0][1]] == ["path", "label"]:
        del rows[0]
    bad = [number for number, row in rows if len(row) != 2 or not row[0].strip() or not row[1].strip()]
    if bad or not rows:
        what = f"line {bad[0]} is not of the form" if bad else "it has no line of the form"
        raise DataError(f"{path} cannot be used: {what} path,label (invalid lines: {len(bad):,} of {len(rows):,})")
    names = [row[1].strip() for _, row in rows]
    classes = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(classes)}
    sources = Sources.of((row[0].strip() for _, row in rows), str(path.parent))
    return Listing(str(path), classes, Part(sources, np.array([number[name] for name in names], np.int32)), None)


def _store(name: str, data_dir: str | Path | None) -> Listing:
    found = records.find(name, data_dir)
    train, held = (None if part is None else Part(*part) for part in (found.parts.get("train"), found.held))
    assert train is not None, "records.find guarantees it"
    return Listing(f"tfds:{name} in {found.folder}", found.classes, train, held)


def split(listing: Listing, share: float = 0.2, seed: int = 0) -> tuple[Part, Part, str]:
    """Splits a listing into training and validation images.

    Args:
        listing: the result of :func:`find`. If it has its own validation images, these are used.
        share: fraction of each class's images for validation, above 0 and below 1; at least one image of a class with two
            or more is used.
        seed: seed of the random choice.

    Returns:
        Training images, validation images, and a phrase that says where the validation images come from.
    """
    if listing.held is not None:
        return listing.train, listing.held, "the data set's own validation images"
    labels, held = listing.train.labels, np.zeros(len(listing.train.labels), bool)
    draws = np.random.Generator(np.random.Philox(seed))
    for label in range(len(listing.classes)):
        own = draws.permutation(np.flatnonzero(labels == label))
        held[own[: min(len(own) - 1, max(1, round(share * len(own))))]] = True
    where = f"{100 * share:g} % of each class's images, drawn with seed {seed}"
    return listing.train.take(np.flatnonzero(~held)), listing.train.take(np.flatnonzero(held)), where


# Looking into the files.


def check(part: Part, title: str) -> tuple[list[Skipped | None], list[bytes]]:
    """Checks images by decoding each once, at the smallest scale of its format; a bar on stderr if that is a terminal.

    Returns:
        For each image its problem, or None if it has none; and the SHA-256 of its file, empty if it has a problem.
    """
    return _each(part, title, lambda content: _sound(content))


def decode(
    part: Part, preprocessing: Preprocessing, title: str
) -> tuple[np.ndarray, list[Skipped | None], list[bytes]]:
    """Decodes the evaluation views of all images, uint8 ``[n, crop, crop, c]``; also returns the result of :func:`check`."""
    views = np.zeros((len(part.sources), *shape(preprocessing)), np.uint8)
    position = iter(range(len(part.sources)))

    def keep(content: bytes) -> np.ndarray:
        return images.preprocess(images.photo(content), preprocessing)

    def store(found: np.ndarray | None) -> None:
        index = next(position)
        if found is not None:
            views[index] = found

    problems, contents = _each(part, title, keep, store)
    return views, problems, contents


def _sound(content: bytes) -> None:
    with images.opened(content) as image:
        image.draft(None, (1, 1))  # decodes a JPEG at 1/8 of its size: reads all of it with less computation
        if image.mode == "F":
            images.seen(image)
        image.load()


def _each(
    part: Part, title: str, use: Any, store: Any = lambda found: None
) -> tuple[list[Skipped | None], list[bytes]]:
    contents: list[bytes] = []
    problems: list[Skipped | None] = []

    def attempt(source: Source) -> tuple[Any, bytes, Skipped | None]:
        try:
            if isinstance(source, str):
                with images.opened(source):  # checks the kind of file before all of it is read
                    pass
            content = _content(source)
            return use(content), hashlib.sha256(content).digest(), None
        except BadImage as error:
            return None, b"", Skipped(said(source), str(error))

    with quiet(), ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(total=len(part.sources), desc=title, unit="image", disable=not sys.stderr.isatty(), leave=False)
        with bar:
            for start in range(0, len(part.sources), 256):  # limits the results in memory
                for found, digest, problem in pool.map(attempt, part.sources[start : start + 256]):
                    store(found)
                    contents.append(digest)
                    problems.append(problem)
                    bar.update()
    return problems, contents


def _content(source: Source) -> bytes:
    if not isinstance(source, str):
        return records.read(source)
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error


# A data set for the trainer.


@dataclass(frozen=True, eq=False)
class Loaded:
    """A data set, and how it was split."""

    dataset: Dataset  # the images of its splits are Files, or pixels in memory if they are small
    validation: str  # where the validation images come from


def load(
    listing: Listing,
    preprocessing: Preprocessing,
    *,
    share: float = 0.2,
    seed: int = 0,
    limit: int | None = None,
) -> Loaded:
    """Loads images by class as two splits. Every file is checked once; damaged ones are left out and reported.

    Args:
        listing: the result of :func:`find`.
        preprocessing: preprocessing of the evaluation views; views of up to ``SMALL`` pixels are kept in memory.
        share, seed: as in :func:`split`.
        limit: number of training images per class, drawn with the seed; ``None``: all.

    Raises:
        DataError: a class has no usable training image, or there is no validation image.
    """
    train, held, where = split(listing, share, seed)
    if limit is not None:
        train = train.take(_some(train.labels, limit, seed))
    small = preprocessing.crop <= SMALL
    splits: list[Split] = []
    skipped: list[tuple[str, str]] = []
    contents: list[list[bytes]] = []
    for part, title in ((train, "training images"), (held, "validation images")):
        if small:
            pixels, problems, found = decode(part, preprocessing, title)
        else:
            problems, found = check(part, title)
        good = [i for i, problem in enumerate(problems) if problem is None]
        skipped += [problem for problem in problems if problem is not None]
        contents.append(found)
        kept = part.take(good)
        splits.append(Split(pixels[good] if small else Files(kept.sources, preprocessing), kept.labels))  # type: ignore[arg-type]
    named = few(f"{file} ({reason})" for file, reason in skipped)
    lost = f"has no usable training image (damaged images: {len(skipped):,}; {named})"
    _check_classes(listing, splits[0].labels, lost)
    if not len(splits[1].labels):
        raise DataError(
            f"{listing.name} has no validation image: provide at least two images of each class, or a folder val"
        )
    notes = list(listing.notes)
    counts = Counter(splits[1].labels.tolist())
    if unjudged := [name for i, name in enumerate(listing.classes) if not counts[i]]:
        notes.append(f"{len(unjudged):,} classes have no validation image: {few(unjudged)}")
    if skipped:
        notes.append(f"{len(skipped):,} damaged image{'s are' if len(skipped) > 1 else ' is'} skipped: {named}")
    notes += _twice(*contents)
    digest = hashlib.sha256("".join(map(_digest, contents, (train.labels, held.labels))).encode()).hexdigest()
    dataset = Dataset(
        "folder", listing.classes, splits[0], splits[1], listing.name, tuple(notes), {}, digest, tuple(skipped)
    )
    return Loaded(dataset, where)


def _digest(contents: Sequence[bytes], labels: np.ndarray) -> str:
    return hashlib.sha256(b"".join(contents) + np.ascontiguousarray(labels, np.int32).tobytes()).hexdigest()


def _twice(train: Sequence[bytes], held: Sequence[bytes]) -> list[str]:
    """A note if some validation files have the same bytes as training files, under another name or class."""
    learnt = set(train) - {b""}
    if not (count := sum(content in learnt for content in held)):
        return []
    return [f"{count:,} of {len(held):,} validation images are also training images (the same bytes), which makes the "
            "accuracy too high or, if their classes differ, too low: remove the copies"]  # fmt: skip


def fewer(dataset: Dataset, limit: int | None, seed: int = 0) -> Dataset:
    """A data set with at most ``limit`` training images per class, drawn with a seed; ``None`` keeps all."""
    if limit is None:
        return dataset
    chosen = _some(dataset.train.labels, limit, seed)
    train = Split(dataset.train.images[chosen], dataset.train.labels[chosen])
    digest = hashlib.sha256(f"{dataset.digest} {limit} {seed}".encode()).hexdigest()
    return replace(dataset, train=train, digest=digest)


def _some(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Indices of ``limit`` images of each class, ascending."""
    draws = np.random.Generator(np.random.Philox(seed + 1))
    chosen = [draws.permutation(np.flatnonzero(labels == label))[:limit] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
