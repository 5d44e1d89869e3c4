"""Photos on disk: listed, checked, split, and decoded ahead of the device by grain's workers.

    find: folder, table or TFDS store -> Listing -> check: damaged ones named -> split -> Files (lazy) or pixels in memory

A training view is torchvision's ``RandomResizedCrop``, drawn on the host from (seed, epoch, image); the flip and whatever
follows run on the device. An evaluation view is :func:`jresnet.data.images.preprocess`, what
:meth:`jresnet.get_weights` does. Files are read as a person sees them (:func:`jresnet.data.images.seen`).

**Order and position.** The order of an epoch and every crop follow from the seed, the epoch and the image alone, never from
the number of workers. A batch has a number, counted over all epochs, by which it can be asked for: a run that is resumed in
the middle of an epoch asks for the next one.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import math
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image
from tqdm import tqdm

from jresnet.data import images, records
from jresnet.data.dataset import Dataset, Split, not_importable
from jresnet.data.images import BadImage
from jresnet.errors import DataError
from jresnet.files import few, printable
from jresnet.weights.preprocessing import Preprocessing

TRAIN, HELD = ("train", "training"), ("val", "valid", "validation", "test")  # folders of a data set that comes in parts
SMALL = 64  # pixels up to which a network's images are kept in memory, decoded
Source = str | records.Record  # where an image's bytes are: a path, or a record of a TFDS store


@dataclass(frozen=True, eq=False)
class Listing:
    """Images by class, not opened yet; ``held`` are those that the data set itself keeps for validation."""

    name: str  # where they are, for people
    classes: tuple[str, ...]
    train: Part
    held: Part | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Part:
    """Images in an order, with the positions of their classes."""

    sources: tuple[Source, ...]
    labels: Int[np.ndarray, " n"]

    def take(self, positions: Sequence[int] | np.ndarray) -> Part:
        """Those at ``positions``."""
        return Part(tuple(self.sources[i] for i in positions), self.labels[np.asarray(positions, int)])


class Skipped(NamedTuple):
    """An image that cannot be used."""

    file: str
    reason: str


def find(data: str | os.PathLike[str], data_dir: str | Path | None = None) -> Listing:
    """Lists images by class without opening one.

    Args:
        data: a folder ``CLASS/**/*.jpg``, or one of those for each of ``train`` and ``val``; a table ``*.csv`` of lines
            ``path,label``, paths relative to it; or ``"tfds:NAME"``, a prepared store of TensorFlow Datasets.
        data_dir: where TFDS's stores are; ``None``: ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.

    Raises:
        DataError: there is no such thing, a class has no image, or there are fewer than two classes.
    """
    text = os.fspath(data)
    if text.startswith("tfds:"):
        found = _store(text.removeprefix("tfds:"), data_dir)
    elif text.lower().endswith(".csv"):
        found = _table(Path(text).expanduser())
    else:
        found = _folder(Path(text).expanduser())
    _check_classes(found, found.train.labels, "has no training image")
    return found


def _check_classes(listing: Listing, labels: np.ndarray, what: str) -> None:
    """Raises DataError where a class has none of the images of ``labels``, or where there is nothing to tell apart."""
    counts = np.bincount(labels, minlength=len(listing.classes))
    if empty := [listing.classes[i] for i in np.flatnonzero(counts == 0)]:
        raise DataError(
            f"{len(empty):,} of the {len(listing.classes):,} classes of {listing.name} "
            f"{what if len(empty) == 1 else what.replace('has', 'have')}: {few(empty)}. Add images, or remove the class"
        )
    if len(listing.classes) < 2:
        raise DataError(
            f"{listing.name} has one class, {printable(listing.classes[0])}: at least two are needed to tell apart"
        )


def _folder(root: Path) -> Listing:
    entries = sorted(os.listdir(root)) if root.is_dir() else []
    parts = {name: next((n for n in names if n in entries and (root / n).is_dir()), None) for name, names in
             (("train", TRAIN), ("held", HELD))}  # fmt: skip
    if parts["held"] and not parts["train"]:
        # Perhaps classes of those names: then there is more than one folder.
        if sum((root / entry).is_dir() for entry in entries) == 1:
            raise DataError(f"{root} has a folder {parts['held']} but none of {' or '.join(TRAIN)} to learn from")
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
            raise DataError(
                f"{root / parts['held']} has {len(unknown):,} classes that {top} has not ({few(unknown)}): a network can "
                "only be judged on classes that it learns"
            )
        held = Part(held.sources, np.array([classes.index(own[label]) for label in held.labels], np.int32))
        notes += more
    return Listing(str(root).replace("\n", "\\n"), classes, train, held, notes)


def _listed(root: Path) -> tuple[tuple[str, ...], Part, tuple[str, ...]]:
    """The classes, images and notes of ``root/CLASS/**``."""
    found = images.list_folder(root)
    # macOS leaves a file ._NAME beside each on other systems' disks.
    kept = [i for i, path in enumerate(found.paths) if not path.name.startswith(".")]
    notes = (f"{found.ignored:,} files of other kinds in {root} are passed over",) if found.ignored else ()
    labels = np.array([found.labels[i] for i in kept], np.int32)
    return found.classes, Part(tuple(str(found.paths[i]) for i in kept), labels), notes


def _table(path: Path) -> Listing:
    """The images of a table; a first line "path,label" is a heading."""
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
        what = f"line {bad[0]} is not" if bad else "it has no line of the form"
        raise DataError(f"{path} cannot be used: {what} path,label ({len(bad):,} such lines in {len(rows):,})")
    names = [row[1].strip() for _, row in rows]
    classes = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(classes)}
    sources = tuple(os.path.join(path.parent, row[0].strip()) for _, row in rows)
    return Listing(str(path), classes, Part(sources, np.array([number[name] for name in names], np.int32)), None)


def _store(name: str, data_dir: str | Path | None) -> Listing:
    found = records.find(name, data_dir)
    train, held = (
        None if part is None else Part(part[0], part[1]) for part in (found.parts.get("train"), found.held)
    )  # fmt: skip
    assert train is not None, "records.find looks for it"
    return Listing(f"tfds:{name} in {found.folder}", found.classes, train, held)


def split(listing: Listing, share: float = 0.2, seed: int = 0) -> tuple[Part, Part, str]:
    """Training and validation images, and where the latter are from; of each class ``share``, at least one of two.

    Args:
        listing: of :func:`find`; where it has images held for validation, those are taken.
        share: of each class's images; above 0 and below 1.
        seed: of the draw.
    """
    if listing.held is not None:
        return listing.train, listing.held, "the images that come apart for validation"
    labels, held = listing.train.labels, np.zeros(len(listing.train.labels), bool)
    draws = np.random.Generator(np.random.Philox(seed))
    for label in range(len(listing.classes)):
        own = draws.permutation(np.flatnonzero(labels == label))
        held[own[: min(len(own) - 1, max(1, round(share * len(own))))]] = True
    where = f"{100 * share:g} % of each class's images, drawn with seed {seed}"
    return listing.train.take(np.flatnonzero(~held)), listing.train.take(np.flatnonzero(held)), where


# Looking into the files.


def read(source: Source) -> bytes | str:
    """What :func:`jresnet.data.images.opened` takes for a source."""
    return source if isinstance(source, str) else records.read(source)


def said(source: Source) -> str:
    """A source's name in messages."""
    return source if isinstance(source, str) else str(source)


def check(part: Part, title: str) -> tuple[list[Skipped | None], list[bytes]]:
    """Decodes every image once, at the smallest scale that its format has; a bar on stderr where that is a terminal.

    Returns:
        For each image what is wrong with it, None for a sound one; and its file's SHA-256, empty for an unsound one.
    """
    return _each(part, title, lambda content: _sound(content))


def decode(
    part: Part, preprocessing: Preprocessing, title: str
) -> tuple[np.ndarray, list[Skipped | None], list[bytes]]:
    """The evaluation views of all images, uint8 ``[n, crop, crop, c]``, and the same as :func:`check`."""
    views = np.zeros((len(part.sources), *_shape(preprocessing)), np.uint8)
    position = iter(range(len(part.sources)))

    def keep(content: bytes) -> np.ndarray:
        return images.preprocess(images.photo(content), preprocessing)

    def store(found: np.ndarray | None) -> None:
        index = next(position)
        if found is not None:
            views[index] = found

    problems, contents = _each(part, title, keep, store)
    return views, problems, contents


def _shape(preprocessing: Preprocessing) -> tuple[int, int, int]:
    return (preprocessing.crop, preprocessing.crop, len(preprocessing.mean))


def _sound(content: bytes) -> None:
    with images.opened(content) as image:
        image.draft(None, (1, 1))  # a JPEG at an eighth of its size: all of it is read, less is computed
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
                with images.opened(source):  # the right kind of file, before all of it is read
                    pass
            content = _content(source)
            return use(content), hashlib.sha256(content).digest(), None
        except BadImage as error:
            return None, b"", Skipped(said(source), str(error))

    with _quiet(), ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(total=len(part.sources), desc=title, unit="image", disable=not sys.stderr.isatty(), leave=False)
        with bar:
            for start in range(0, len(part.sources), 256):  # so that little waits in memory
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of damaged EXIF data and the like, on which no pixel depends."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


# A data set for the trainer.


@dataclass(frozen=True, eq=False)
class Loaded:
    """A data set, and how it was split."""

    dataset: Dataset  # the images of its splits are Files, or pixels in memory where they are small
    validation: str  # where the validation images are from


def load(
    listing: Listing,
    preprocessing: Preprocessing,
    *,
    share: float = 0.2,
    seed: int = 0,
    limit: int | None = None,
) -> Loaded:
    """Images by class as two splits: every file is opened once, damaged ones are left out and named.

    Args:
        listing: of :func:`find`.
        preprocessing: of the evaluation views; up to ``SMALL`` pixels the views themselves are kept in memory.
        share: as :func:`split`; seed likewise.
        limit: only so many training images of each class, drawn with the seed.

    Raises:
        DataError: a class is left without an image.
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
    lost = f"has no usable training image ({len(skipped):,} damaged ones were passed over)"
    _check_classes(listing, splits[0].labels, lost)
    if not len(splits[1].labels):
        raise DataError(f"{listing.name} has no image to judge by: each class needs at least two, or give a folder val")
    notes = list(listing.notes)
    counts = Counter(splits[1].labels.tolist())
    if unjudged := [name for i, name in enumerate(listing.classes) if not counts[i]]:
        notes.append(f"{len(unjudged):,} classes have no validation image: {few(unjudged)}")
    if skipped:
        named = few(f"{file} ({reason})" for file, reason in skipped)
        notes.append(f"{len(skipped):,} damaged image{'s are' if len(skipped) > 1 else ' is'} passed over: {named}")
    notes += _twice(*contents)
    digest = hashlib.sha256("".join(map(_digest, contents, (train.labels, held.labels))).encode()).hexdigest()
    dataset = Dataset(
        "folder", listing.classes, splits[0], splits[1], listing.name, tuple(notes), {}, digest, tuple(skipped)
    )
    return Loaded(dataset, where)


def _digest(contents: Sequence[bytes], labels: np.ndarray) -> str:
    return hashlib.sha256(b"".join(contents) + np.ascontiguousarray(labels, np.int32).tobytes()).hexdigest()


def _twice(train: Sequence[bytes], held: Sequence[bytes]) -> list[str]:
    """A note where files to judge by are training images too, byte for byte, under another name or class."""
    learnt = set(train) - {b""}
    if not (count := sum(content in learnt for content in held)):
        return []
    return [f"{count:,} of {len(held):,} images to judge by are training images too (the same bytes), which flatters "
            "the accuracy or, where the classes differ, spoils it: remove the copies"]  # fmt: skip


def fewer(dataset: Dataset, limit: int | None, seed: int = 0) -> Dataset:
    """A data set with ``limit`` training images of each class, drawn with a seed; all with None."""
    if limit is None:
        return dataset
    chosen = _some(dataset.train.labels, limit, seed)
    train = Split(dataset.train.images[chosen], dataset.train.labels[chosen])
    digest = hashlib.sha256(f"{dataset.digest} {limit} {seed}".encode()).hexdigest()
    return replace(dataset, train=train, digest=digest)


def _some(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Positions of ``limit`` images of each class, ascending."""
    draws = np.random.Generator(np.random.Philox(seed + 1))
    chosen = [draws.permutation(np.flatnonzero(labels == label))[:limit] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


class Files:
    """Images that are decoded when they are asked for: as an array uint8 ``[n, crop, crop, c]`` of evaluation views.

    ``files[3]`` is an image; ``files[2:9]``, a mask or positions give fewer of them, undecoded.
    """

    def __init__(self, sources: Sequence[Source], preprocessing: Preprocessing):
        self.sources, self.preprocessing = tuple(sources), preprocessing

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As an array's."""
        return (len(self.sources), *_shape(self.preprocessing))

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, int | np.integer):
            return view(self.sources[which], self.preprocessing)
        if isinstance(which, slice):
            return Files(self.sources[which], self.preprocessing)
        which = np.asarray(which)
        positions = np.flatnonzero(which) if which.dtype == bool else which
        return Files([self.sources[i] for i in positions], self.preprocessing)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Every image once and in order, decoded ahead by threads; the last batch is filled up with its last image.

        Raises:
            DataError: an image that was sound when it was checked is so no more.
        """
        n = len(self.sources)
        positions = np.minimum(np.arange(-(-n // batch_size) * batch_size), n - 1)
        grain = _grain()
        pipeline = grain.MapDataset.source(positions).map(partial(_evaluated, self)).batch(batch_size)
        iterator = iter(pipeline.to_iter_dataset(_threads(grain)))
        try:
            while True:
                with _named_failures():
                    batch = next(iterator, None)
                if batch is None:
                    return
                yield batch
        finally:
            iterator.close()


def _evaluated(files: Files, position: int) -> np.ndarray:
    return files[int(position)]


def view(source: Source, preprocessing: Preprocessing) -> UInt8[np.ndarray, "s s c"]:
    """An image's evaluation view.

    Raises:
        DataError: it cannot be decoded; the message names it.
    """
    try:
        return images.preprocess(images.photo(read(source)), preprocessing)
    except BadImage as error:
        raise DataError(f"{printable(said(source))} can no longer be decoded: {error}") from error


class Stream:
    """Batches of training views without end, in an order that the seed decides, decoded ahead of their use.

    Args:
        files: the images.
        batch_size: images.
        epochs: how often each is seen; of every epoch the remainder of less than a batch sits out.
        seed: a whole number from 0; decides order and crops.
        size: pixels, height and width of the views.
        min_area: the smallest share of an image's area that a crop keeps; torchvision's is 0.08.
        workers: processes that decode; 0: threads of this one, which is enough on few cores, as Pillow decodes outside
            Python's lock. The batches are the same.
    """

    def __init__(
        self,
        files: Files,
        *,
        batch_size: int,
        epochs: int,
        seed: int,
        size: int,
        min_area: float = 0.08,
        workers: int = 0,
    ):
        grain = _grain()
        self.files, self.batch_size, self.workers, self.size = files, batch_size, workers, size
        # Neighbouring seeds would share orders: grain adds the epoch to the seed.
        mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        steps = len(files) // batch_size
        crop = _Crop(files.sources, size, len(files.preprocessing.mean), min_area, files.preprocessing.interpolation)
        self._batches = (
            grain.MapDataset.source(np.arange(len(files)))
            .seed(mixed)
            .shuffle()[: steps * batch_size]
            .repeat(epochs)
            .random_map(crop)
            .batch(batch_size)
        )
        self._iterator: Any = None
        self._next = 0

    def __len__(self) -> int:
        """Batches, over all epochs."""
        return len(self._batches)

    def batch(self, number: int) -> tuple[UInt8[np.ndarray, "b s s c"], Int[np.ndarray, " b"]]:
        """Batch ``number``, counted from 0 over all epochs: the views, and which images they are of.

        The batches after it are begun at once. Any number may be asked for, the next one is had soonest.

        Raises:
            DataError: an image can no longer be decoded, or a worker has died.
        """
        if self._iterator is None or number != self._next:
            self._begin(number)
        try:
            with _named_failures():
                found = next(self._iterator)
        except BaseException:
            self.close()  # grain would go on behind the batch that failed
            raise
        self._next = number + 1
        return found["image"], found["index"]

    def again(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`batch`, once more and on the side: what is decoded ahead stays."""
        found = self._batches[number]
        return found["image"], found["index"]

    def _begin(self, number: int) -> None:
        self.close()
        grain = _grain()
        batches = self._batches[number:] if number else self._batches
        if self.workers:
            options = grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=2)
            pipeline = batches.to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(options, _in_worker)
        else:
            pipeline = batches.to_iter_dataset(_threads(grain))
        self._iterator, self._next = iter(pipeline), number

    def close(self) -> None:
        """Ends the workers; :meth:`batch` begins anew."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _threads(grain: Any) -> Any:
    count = min(os.cpu_count() or 1, 16)
    return grain.ReadOptions(num_threads=count, prefetch_buffer_size=count + 1)


def _in_worker(index: int, count: int) -> None:
    """Ctrl-C reaches every process of a terminal: the run's first one hears it and ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _grain() -> Any:
    try:
        import grain
        from absl import flags
    except ImportError as error:
        raise not_importable("grain", error) from error
    if not flags.FLAGS.is_parsed():  # grain asks for flags of absl's, which only absl's own programs parse
        flags.FLAGS.mark_as_parsed()
    return grain


@contextlib.contextmanager
def _named_failures() -> Iterator[None]:
    """Turns what grain says of a worker that died into a DataError; one of an image passes as it is."""
    try:
        with _quiet():
            yield
    except (DataError, StopIteration):
        raise
    except RuntimeError as error:
        raise DataError(
            f"a process that decodes images has died ({' '.join(str(error).split())[:300]}): resume"
        ) from error


@dataclass(frozen=True)
class _Crop:
    """A position and a generator -> a training view; a value, so that it can go to other processes."""

    sources: tuple[Source, ...]
    size: int
    channels: int
    min_area: float
    interpolation: str

    def __call__(self, position: int, draws: np.random.Generator) -> dict[str, Any]:
        source = self.sources[position]
        try:
            image = random_resized_crop(read(source), self.size, draws, self.min_area, self.interpolation)
        except BadImage as error:
            raise DataError(f"{printable(said(source))} can no longer be decoded: {error}") from error
        pixels = np.asarray(image if self.channels == 3 else image.convert("L"))
        return {"image": pixels.reshape(self.size, self.size, self.channels), "index": np.int32(position)}


def random_resized_crop(
    source: str | bytes, size: int, draws: np.random.Generator, min_area: float = 0.08, interpolation: str = "bilinear"
) -> Image.Image:
    """torchvision's ``RandomResizedCrop(size, scale=(min_area, 1))`` of a file, RGB.

    Where the crop is more than twice as large as its result, a JPEG is decoded at a half, a quarter or an eighth of its
    size (libjpeg's scaling in the frequency domain).

    Raises:
        BadImage: as :func:`jresnet.data.images.opened`.
    """
    with images.opened(source) as image:
        turned = images.orientation(image) >= 5  # lying on a side
        width, height = image.size[::-1] if turned else image.size
        left, top, w, h = crop_box(width, height, draws, min_area)
        shrink = max(1, min(w, h) // size)
        if shrink > 1:
            image.draft(None, (image.width // shrink, image.height // shrink))
        pixels = images.seen(image)
    if pixels.size == (width, height):  # cut out first, as torchvision: the filter sees no pixel outside
        return pixels.crop((left, top, left + w, top + h)).resize((size, size), images.FILTERS[interpolation])
    x, y = pixels.width / width, pixels.height / height
    box = (left * x, top * y, min((left + w) * x, pixels.width), min((top + h) * y, pixels.height))
    return pixels.resize((size, size), images.FILTERS[interpolation], box=box)


def crop_box(width: int, height: int, draws: np.random.Generator, min_area: float = 0.08) -> tuple[int, int, int, int]:
    """Left, top, width and height of a crop, with the distribution of torchvision's ``RandomResizedCrop.get_params``.

    ``min_area`` to 100 % of the area and an aspect ratio from 3/4 to 4/3, log-uniform; the first of ten draws that fits,
    else the largest part in the middle whose ratio is within those bounds.
    """
    for _ in range(10):
        area = width * height * draws.uniform(min_area, 1.0)
        ratio = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws.integers(width - w + 1)), int(draws.integers(height - h + 1)), w, h
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * 4 / 3)
    return (width - w) // 2, (height - h) // 2, w, h
