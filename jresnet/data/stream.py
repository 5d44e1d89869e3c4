"""Image files decoded ahead of the device by grain's workers, in an order that the seed decides.

A training view is torchvision's ``RandomResizedCrop``, drawn on the host from (seed, number of the view); the flip and
whatever follows run on the device. An evaluation view is :func:`jresnet.data.images.preprocess`, what
:meth:`jresnet.get_weights` does. Files are read as a person sees them (:func:`jresnet.data.images.seen`).

**Order and position.** The order of an epoch and every crop follow from the seed and the place in the run alone, never from
the number of workers or of processes that share a batch. A batch has a number, counted over all epochs, by which it can be
asked for: a run that is resumed in the middle of an epoch, on one host or on many, asks for the next one.
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
    """What :func:`jresnet.data.images.opened` takes for a source."""
    if isinstance(source, str):
        return source
    return shards.read(source) if source.path.endswith(".tar") else records.read(source)


def said(source: Source) -> str:
    """A source's name in messages."""
    return source if isinstance(source, str) else str(source)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Pillow warns of damaged EXIF data and the like, on which no pixel depends."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


class Files:
    """Images that are decoded when they are asked for: as an array uint8 ``[n, crop, crop, c]`` of evaluation views.

    ``files[3]`` is an image; ``files[2:9]``, a mask or positions give fewer of them, undecoded.
    """

    def __init__(self, sources: Sequence[Source], preprocessing: Preprocessing):
        self.sources, self.preprocessing = compact(sources), preprocessing

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As an array's."""
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
        """Every image once and in order, decoded ahead by threads; the last batch is filled up with its last image.

        Args:
            batch_size: images.
            rows: only these of every batch, where other processes have the rest.

        Raises:
            DataError: an image that was sound when it was checked is so no more.
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
    """Of an evaluation view."""
    return (preprocessing.crop, preprocessing.crop, len(preprocessing.mean))


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
        batch_size: images, over all processes.
        epochs: how often each is seen; of every epoch the remainder of less than a batch sits out.
        seed: a whole number from 0; decides order and crops.
        size: pixels, height and width of the views.
        min_area: the smallest share of an image's area that a crop keeps; torchvision's is 0.08.
        workers: processes that decode; 0: threads of this one, which is enough on few cores, as the decoders work outside
            Python's lock. The batches are the same.
        rows: which rows of each batch this process decodes; None: all of them.
        repeats: views of each image in its batch (repeated augmentation, arXiv:1902.05509); an epoch has as many batches
            as with 1, so only one in ``repeats`` of the images. A divisor of the batch size.
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
        # One element of grain's is a batch: what it does for each costs a fifth of a millisecond.
        self._batches = grain.MapDataset.source(range(views.steps * epochs)).map(views)
        self._iterator: Any = None
        self._others: list[Any] = []  # child processes that are no workers of this stream
        self._processes: list[Any] = []
        self._next = 0

    def __len__(self) -> int:
        """Batches, over all epochs."""
        return len(self._batches)

    def batch(self, number: int) -> tuple[UInt8[np.ndarray, "b s s c"], Int[np.ndarray, " b"]]:
        """This process's rows of batch ``number``, counted from 0 over all epochs: the views, and which images they are of.

        The batches after it are begun at once. Any number may be asked for, the next one is had soonest.

        Raises:
            DataError: an image can no longer be decoded, or a worker has died.
        """
        if self._iterator is None or number != self._next:
            self._begin(number)
        try:
            with _named_failures(self._processes):
                found = next(self._iterator)
        except BaseException:
            self.close()  # grain would go on behind the batch that failed
            raise
        self._next = number + 1
        if len(self._processes) < self.workers:  # grain starts them one after the other
            self._processes = [child for child in multiprocessing.active_children() if child not in self._others]
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
        self._others, self._processes = multiprocessing.active_children(), []
        self._iterator, self._next = iter(pipeline), number

    def close(self) -> None:
        """Ends the workers; :meth:`batch` begins anew."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


@dataclass(frozen=True)
class _Views:
    """A batch's number -> this process's rows of it; a value, so that it can go to other processes."""

    sources: Sources
    size: int
    channels: int
    min_area: float
    interpolation: str
    seed: int
    steps: int  # batches an epoch
    batch_size: int
    rows: range
    repeats: int

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        epoch, step = divmod(int(number), self.steps)
        distinct = self.batch_size // self.repeats
        # The views of an image stand far apart: mixup and cutmix take partners from the other end of the batch.
        places = step * distinct + np.array(self.rows) % distinct
        positions = _shuffled(self.seed, epoch, len(self.sources))[places]
        views = np.empty((len(positions), self.size, self.size, self.channels), np.uint8)
        for view, position, row in zip(views, positions.tolist(), self.rows, strict=True):
            # Drawn from the view's number among all of the run. Python's generator: numpy's take thrice as long to begin.
            self._crop(view, position, Random(self.seed << 64 | int(number) * self.batch_size + row))
        return {"image": views, "index": positions}

    def _crop(self, view: np.ndarray, position: int, draws: Random) -> None:
        source = self.sources[position]
        try:
            pixels = crops.random_resized_crop(read(source), self.size, draws, self.min_area, self.interpolation)
        except BadImage as error:
            raise DataError(f"{printable(said(source))} can no longer be decoded: {error}") from error
        view[...] = pixels if self.channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


@functools.lru_cache(2)  # a worker may be at the end of an epoch when another one begins the next
def _shuffled(seed: int, epoch: int, images: int) -> Int[np.ndarray, " n"]:
    """The positions of all images in an epoch's order.

    Not by grain's shuffle: without a list, it tries numbers until one is small enough, which takes a millisecond an image
    where there are 64 of them. Of numpy it is raw bits whose stream no version changes.
    """
    draws = np.random.Philox(key=[seed, epoch]).random_raw(images)
    return np.argsort(draws, kind="stable").astype(np.int32)


def _threads(grain: Any) -> Any:
    count = min(os.cpu_count() or 1, 16)
    return grain.ReadOptions(num_threads=count, prefetch_buffer_size=count + 1)


def _in_worker(index: int, count: int) -> None:
    """Ctrl-C reaches every process of a terminal: the run's first one hears it and ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    crops.one_thread()


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
def _named_failures(processes: Sequence[Any] = ()) -> Iterator[None]:
    """Turns what grain says of a worker that died into a DataError which names it; one of an image passes as it is."""
    try:
        with quiet():
            yield
    except (DataError, StopIteration):
        raise
    except RuntimeError as error:
        dead = [f"process {child.pid}, exit code {child.exitcode}" for child in processes if not child.is_alive()]
        reason = "; ".join(dead) or " ".join(str(error).split())[:300]
        raise DataError(
            f"a process that decodes images has died ({reason}): -9 is what a system does that is short of memory, for "
            "which fewer `workers` help; resume"
        ) from error
