"""Streams batches of image files, decoded in advance by grain's workers, in an order determined by the seed.

A training view is torchvision's ``RandomResizedCrop``, drawn on the host from (seed, number of the view); flips and later
augmentations run on the device. An evaluation view is :func:`jresnet.data.images.preprocess`, as in
:func:`jresnet.get_weights`. Files are read as viewers display them (:func:`jresnet.data.images.seen`).

**Order and position.** The order of an epoch and every crop depend only on the seed and the position in the run, not on the
number of workers or of processes that share a batch. Batches are numbered over all epochs and can be requested by number:
a run that is resumed in the middle of an epoch, on any number of hosts, requests the next one.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from jresnet.data import crops, images, records, shards
from jresnet.data.dataset import not_importable
from jresnet.data.images import BadImage
from jresnet.data.index import Source, Sources, compact
from jresnet.errors import DataError
from jresnet.files import printable
from jresnet.weights.preprocessing import Preprocessing


def read(source: Source) -> bytes | str:
    """Converts a source to an argument of :func:`jresnet.data.images.opened`: a path or bytes."""
    if isinstance(source, str):
        return source
    return shards.read(source) if source.path.endswith(".tar") else records.read(source)


def said(source: Source) -> str:
    """The name of a source in messages."""
    return source if isinstance(source, str) else str(source)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Pillow's warnings, which concern damaged EXIF data and similar problems that do not affect pixels."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


class Files:
    """Images that are decoded on access, like an array uint8 ``[n, crop, crop, c]`` of evaluation views.

    ``files[3]`` is an image. Indexing with a slice, a mask or positions returns another ``Files`` without decoding.
    """

    def __init__(self, sources: Sequence[Source], preprocessing: Preprocessing):
        self.sources, self.preprocessing = compact(sources), preprocessing

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the corresponding array."""
        return (len(self.sources), *shape(self.preprocessing))

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, int | np.integer):
            return view(self.sources[int(which)], self.preprocessing)
        if isinstance(which, slice):
            return Files(self.sources[which], self.preprocessing)
        which = np.asarray(which)
        positions = np.flatnonzero(which) if which.dtype == bool else which
        return Files(self.sources.take(positions), self.preprocessing)

    def batches(self, batch_size: int, rows: slice | None = None) -> Iterator[np.ndarray]:
        """Yields batches of all images in order, decoded in advance by threads; the last batch repeats its last image.

        Args:
            batch_size: number of images per batch.
            rows: the rows of every batch that this process decodes, if other processes have the rest; ``None``: all.

        Raises:
            DataError: an image can no longer be decoded.
        """
        n = len(self.sources)
        positions = np.minimum(np.arange(-(-n // batch_size) * batch_size), n - 1)
        own = positions.reshape(-1, batch_size)[:, rows or slice(None)]
        grain = _grain()
        pipeline = grain.MapDataset.source(own.reshape(-1)).map(functools.partial(_evaluated, self)).batch(own.shape[1])
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


def shape(preprocessing: Preprocessing) -> tuple[int, int, int]:
    """The shape of an evaluation view."""
    return (preprocessing.crop, preprocessing.crop, len(preprocessing.mean))


def _evaluated(files: Files, position: int) -> np.ndarray:
    return files[int(position)]


def view(source: Source, preprocessing: Preprocessing) -> UInt8[np.ndarray, "s s c"]:
    """Decodes an image's evaluation view.

    Raises:
        DataError: the image cannot be decoded; the message names it.
    """
    try:
        return images.preprocess(images.photo(read(source)), preprocessing)
    except BadImage as error:
        raise DataError(f"{printable(said(source))} can no longer be decoded: {error}") from error


class Stream:
    """Batches of training views, decoded in advance, in an order determined by the seed.

    Args:
        files: the images.
        batch_size: number of images per batch, over all processes.
        epochs: number of epochs; in every epoch the images that do not fill a whole batch are left out.
        seed: an integer of at least 0, which determines order and crops.
        size: height and width of the views in pixels.
        min_area: smallest fraction of an image's area that a crop covers; torchvision's default is 0.08.
        workers: number of decoding processes. 0: threads of this process, which suffice for few cores, as the decoders
            release Python's global lock. The batches do not depend on this number.
        rows: the rows of each batch that this process decodes; None: all of them.
        repeats: views of each image in its batch (repeated augmentation, arXiv:1902.05509). The number of batches per epoch
            does not change, so that an epoch covers 1 / ``repeats`` of the images. It must divide the batch size.
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
        rows: slice | None = None,
        repeats: int = 1,
    ):
        grain = _grain()
        own = range(batch_size)[rows or slice(None)]
        self.files, self.batch_size, self.workers, self.size = files, len(own), workers, size
        views = _Views(
            files.sources, size, len(files.preprocessing.mean), min_area, files.preprocessing.interpolation, seed,
            len(files) // batch_size, batch_size, own, repeats,
        )  # fmt: skip
        # A grain element is a whole batch, because grain takes 0.2 ms per element.
        self._batches = grain.MapDataset.source(range(views.steps * epochs)).map(views)
        self._iterator: Any = None
        self._others: list[Any] = []  # child processes that are not workers of this stream
        self._processes: list[Any] = []
        self._next = 0

    def __len__(self) -> int:
        """The number of batches over all epochs."""
        return len(self._batches)

    def batch(self, number: int) -> tuple[UInt8[np.ndarray, "b s s c"], Int[np.ndarray, " b"]]:
        """Returns this process's rows of batch ``number``, counted from 0 over all epochs.

        Decoding of the following batches starts at once, so that requesting consecutive numbers is fastest.

        Returns:
            The views, and the indices of their images.

        Raises:
            DataError: an image can no longer be decoded, or a worker process died.
        """
        if self._iterator is None or number != self._next:
            self._begin(number)
        try:
            with _named_failures(self._processes):
                found = next(self._iterator)
        except BaseException:
            self.close()  # grain would continue after the failed batch
            raise
        self._next = number + 1
        if len(self._processes) < self.workers:  # grain starts workers one after the other
            self._processes = [child for child in multiprocessing.active_children() if child not in self._others]
        return found["image"], found["index"]

    def again(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`batch`, without affecting the batches that are decoded in advance."""
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
        self._others, self._processes = multiprocessing.active_children(), []
        self._iterator, self._next = iter(pipeline), number

    def close(self) -> None:
        """Stops the workers; calling :meth:`batch` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


@dataclass(frozen=True)
class _Views:
    """Maps the number of a batch to this process's rows of it. It can be pickled, to be sent to worker processes."""

    sources: Sources
    size: int
    channels: int
    min_area: float
    interpolation: str
    seed: int
    steps: int  # batches per epoch
    batch_size: int
    rows: range
    repeats: int

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        epoch, step = divmod(int(number), self.steps)
        distinct = self.batch_size // self.repeats
        # The views of one image are far apart, because mixup and cutmix pair images from opposite ends of the batch.
        places = step * distinct + np.array(self.rows) % distinct
        positions = _shuffled(self.seed, epoch, len(self.sources))[places]
        views = np.empty((len(positions), self.size, self.size, self.channels), np.uint8)
        for view, position, row in zip(views, positions.tolist(), self.rows, strict=True):
            # Seeded by the view's number in the whole run. Python's generator: creating numpy's takes three times as long.
            self._crop(view, position, Random(self.seed << 64 | int(number) * self.batch_size + row))
        return {"image": views, "index": positions}

    def _crop(self, view: np.ndarray, position: int, draws: Random) -> None:
        source = self.sources[position]
        try:
            pixels = crops.random_resized_crop(read(source), self.size, draws, self.min_area, self.interpolation)
        except BadImage as error:
            raise DataError(f"{printable(said(source))} can no longer be decoded: {error}") from error
        view[...] = pixels if self.channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


@functools.lru_cache(2)  # a worker may still be in one epoch when another starts the next
def _shuffled(seed: int, epoch: int, images: int) -> Int[np.ndarray, " n"]:
    """The indices of all images in the order of an epoch.

    grain's shuffle is not used: it draws numbers until one is in range, which takes 1 ms per image for 64 images. Of numpy
    only raw random bits are used, because their stream is the same in all versions.
    """
    draws = np.random.Philox(key=[seed, epoch]).random_raw(images)
    return np.argsort(draws, kind="stable").astype(np.int32)


def _threads(grain: Any) -> Any:
    count = min(os.cpu_count() or 1, 16)
    return grain.ReadOptions(num_threads=count, prefetch_buffer_size=count + 1)


def _in_worker(index: int, count: int) -> None:
    """Prepares a worker: it ignores Ctrl-C, which every process of a terminal receives; the main process stops it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    crops.one_thread()


def _grain() -> Any:
    try:
        import grain
        from absl import flags
    except ImportError as error:
        raise not_importable("grain", error) from error
    if not flags.FLAGS.is_parsed():  # grain reads absl flags, which are parsed only in absl programs
        flags.FLAGS.mark_as_parsed()
    return grain


@contextlib.contextmanager
def _named_failures(processes: Sequence[Any] = ()) -> Iterator[None]:
    """Converts grain's error about a worker that died to a DataError that names the process; other DataErrors pass."""
    try:
        with quiet():
            yield
    except (DataError, StopIteration):
        raise
    except RuntimeError as error:
        dead = [f"process {child.pid}, exit code {child.exitcode}" for child in processes if not child.is_alive()]
        reason = "; ".join(dead) or " ".join(str(error).split())[:300]
        raise DataError(
            f"a process that decodes images died ({reason}): exit code -9 usually means that memory ran out; use fewer "
            "`workers` and resume"
        ) from error
