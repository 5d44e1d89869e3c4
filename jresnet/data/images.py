"""Image files to what a network sees, by Pillow: listing, decoding, resizing, cropping and batching.

The same as torchvision's ``ImageFolder`` with ``Resize`` and ``CenterCrop`` on PIL images, to the last grey level:
pixels as stored (EXIF's orientation is not looked at), converted to RGB, shorter side resized with antialiasing, centre
cut out. Normalisation is left to the device (:func:`jresnet.weights.preprocessing.normalise`). :func:`photo` reads a file
as a person sees it instead: upright, transparency over white, 16 bits as 8.

Files may come from anyone. Only the formats below are decoded (Pillow would hand PostScript to a program), and an image
of more than Pillow's ``MAX_IMAGE_PIXELS`` is refused, as read and as resized.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from jresnet.errors import DataError
from jresnet.weights.preprocessing import Preprocessing

# torchvision/datasets/folder.py's IMG_EXTENSIONS, in any case.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # by content: some of ImageNet's .JPEG files are PNG
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


Reader = Callable[[Any], Image.Image]  # a file's path to its image in mode RGB
_TURNS = {  # by EXIF's orientation (EXIF 2.32, table 4, tag 274)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(DataError):
    """A file that cannot be decoded; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Folder:
    """Image files by class, in torchvision's ``ImageFolder`` order."""

    root: Path
    classes: tuple[str, ...]  # folder names, sorted
    paths: tuple[Path, ...]
    labels: tuple[int, ...]  # positions in classes
    ignored: int  # files of other kinds


class Bad(NamedTuple):
    """An image that was skipped."""

    position: int  # among the sources
    reason: str


class Batch(NamedTuple):
    """Images ready for the device."""

    images: UInt8[np.ndarray, "b s s c"]  # the last batch is filled up with zeros
    positions: np.ndarray  # int [n], n <= b: which sources the first n images are
    bad: list[Bad]  # skipped since the batch before


@dataclass(frozen=True)
class Walked:
    """Image files by class as texts, and the folders that were looked into."""

    classes: tuple[str, ...]
    files: list[tuple[str, int]]  # path below the root, position in classes
    folders: list[str]
    ignored: int  # files of other kinds


def list_folder(root: str | Path) -> Folder:
    """The images in ``root/CLASS/`` and the folders below, as ``torchvision.datasets.ImageFolder`` lists them.

    Not so hidden folders, ``__pycache__`` and ``__MACOSX``: they are no classes.

    Links to files and to class folders are followed, links to folders further down are not: they may form circles.

    Raises:
        DataError: there is no such folder, it cannot be read, or it holds no image in a class folder.
    """
    found = walk(root)
    root = Path(root).expanduser()
    paths, labels = tuple(root / path for path, _ in found.files), tuple(label for _, label in found.files)
    return Folder(root, found.classes, paths, labels, found.ignored)


def walk(root: str | Path) -> Walked:
    """As :func:`list_folder`, in texts: of a million paths Python's own objects take a gigabyte."""
    layout = "expected FOLDER/CLASS/*.JPEG, one folder a class"
    if not os.fspath(root):  # as of an unset variable; for Path it is the working directory
        raise DataError(f"the folder of images is an empty text: {layout}")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: {layout}")

    def fail(error: OSError) -> None:
        raise error

    found: list[tuple[str, int]] = []
    looked = [str(root)]
    try:
        entries = sorted(os.listdir(root))
        folders = [name for name in entries if (root / name).is_dir()]
        classes = tuple(name for name in folders if not is_aside(name))
        ignored = len(entries) - len(folders)
        for label, name in enumerate(classes):
            for folder, files in sorted(_walk(root / name, fail)):
                looked.append(folder)
                below = os.path.relpath(folder, root)
                images = [file for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
                found += [(os.path.join(below, file), label) for file in images]
                ignored += len(files) - len(images)
    except OSError as error:
        raise DataError(f"cannot list the images in {root}: {error}") from error
    if not found:
        what = f"{len(classes):,} folders without an image" if classes else f"no folder, and {ignored:,} files"
        raise DataError(f"{root} holds {what}: {layout}; images end in {', '.join(EXTENSIONS)}")
    return Walked(classes, found, looked, ignored)


def is_aside(name: str) -> bool:
    """Whether a folder holds what programs leave beside images: copies of notebooks, caches, macOS's attributes."""
    return name.startswith(".") or name in ("__pycache__", "__MACOSX")


def _walk(root: Path, fail: Callable[[OSError], None]) -> Iterator[tuple[str, list[str]]]:
    """The folders in and below ``root``, without those that are no part of the data, and their files."""
    for folder, below, files in os.walk(root, onerror=fail):
        below[:] = [name for name in below if not is_aside(name)]
        yield folder, files


def in_turn(labels: Sequence[int]) -> list[int]:
    """An order that takes the first image of every class, then the second of every class, and so on.

    Its first N images are spread evenly over the classes, whatever N is.
    """
    seen: Counter[int] = Counter()
    turns = []
    for label in labels:
        turns.append((seen[label], label))
        seen[label] += 1
    return sorted(range(len(turns)), key=turns.__getitem__)


def read(path: str | Path) -> Image.Image:
    """An image file as RGB, as ``ImageFolder`` reads it: the first frame, EXIF's orientation not looked at.

    Raises:
        BadImage: it is missing, empty, cut short, too large, or of none of ``FORMATS``.
    """
    with opened(path) as image:
        return as_rgb(image)


def photo(source: str | Path | bytes) -> Image.Image:
    """An image as RGB, as a person sees it; the arguments and errors are those of :func:`opened`, the image :func:`seen`."""
    with opened(source) as image:
        return seen(image)


@contextlib.contextmanager
def opened(source: str | Path | bytes) -> Iterator[Image.Image]:
    """The image in a file, or in a file's content, not decoded yet; what goes wrong with it in the block is BadImage.

    Raises:
        BadImage: it is missing, empty, cut short, too large, or of none of ``FORMATS``.
    """
    try:
        if not isinstance(source, bytes):
            if not os.path.isfile(source):  # a pipe would never end
                raise BadImage("no ordinary file" if os.path.exists(source) else "missing")
            if os.path.getsize(source) == 0:
                raise BadImage("empty")
        elif not source:
            raise BadImage("empty")
        with (
            io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file,
            Image.open(file, formats=FORMATS) as image,
        ):
            if image.width * image.height > _limit():  # Pillow warns here, and raises only beyond twice that
                raise BadImage(f"{image.width} x {image.height} pixels are more than {_limit():,}")
            yield image
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"no image: expected one of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders fail in ways of their own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise BadImage(" ".join(reason.split())) from error


def seen(image: Image.Image) -> Image.Image:
    """An open image as RGB, as a person sees it: its first frame, turned as EXIF says, transparent parts over white.

    Grey levels and errors as :func:`as_rgb`.
    """
    turn = _TURNS.get(orientation(image))
    image.load()
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return as_rgb(image)


def orientation(image: Image.Image) -> int:
    """EXIF's orientation of an open image, 1 to 8; 1, as it is stored, where EXIF is damaged or does not say."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow's parser fails in ways of its own
        return 1


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode in RGB, as a person sees it.

    Pillow's own conversion cuts off what is above 255. Grey levels of 16 bits are scaled instead; floating-point ones are
    taken as from 0 to 1 or from 0 to 255 where they lie within, and otherwise, as wider integers, from the least to the
    greatest of the picture.

    Raises:
        BadImage: a value is NaN or infinite.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    levels = np.asarray(image).astype(np.float64)
    if not np.isfinite(levels).all():
        raise BadImage("there are NaN or infinite values in it")
    least, most = float(levels.min()), float(levels.max())
    sixteen = image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM") or 255 < most <= 65535)
    if least >= 0 and sixteen and most <= 65535:
        low, high = 0.0, 65535.0
    elif least >= 0 and most <= (1 if image.mode == "F" else 255):
        low, high = 0.0, 1.0 if image.mode == "F" else 255.0
    elif least >= 0 and most <= 255:
        low, high = 0.0, 255.0
    else:
        low, high = least, most
    grey = np.round((levels - low) * (255 / max(high - low, 1e-300)))
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _limit() -> float:
    return Image.MAX_IMAGE_PIXELS or float("inf")  # None is Pillow's way to say that there is none


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> UInt8[np.ndarray, "s s c"]:
    """Resizes and cuts as torchvision's ``Resize(resize)`` and ``CenterCrop(crop)``.

    Args:
        image: in mode RGB.
        preprocessing: one value of ``mean`` asks for grey, as ``Grayscale()`` makes it; three for RGB.

    Returns:
        uint8 ``[crop, crop, 1 or 3]``; black where the resized image is smaller than the crop.

    Raises:
        BadImage: so long and narrow that it would not fit into memory once resized.
    """
    if len(preprocessing.mean) == 1:
        image = image.convert("L")
    if preprocessing.resize is not None:
        width, height = image.size
        longer = int(preprocessing.resize * max(width, height) / min(width, height))
        if preprocessing.resize * longer > _limit():
            raise BadImage(f"{width} x {height} pixels are too narrow to be resized to {preprocessing.resize}")
        size = (preprocessing.resize, longer) if width <= height else (longer, preprocessing.resize)
        image = image.resize(size, FILTERS[preprocessing.interpolation])
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    crop = preprocessing.crop
    lacking = [max(crop - side, 0) for side in pixels.shape[:2]]
    pixels = np.pad(pixels, [*((n // 2, (n + 1) // 2) for n in lacking), (0, 0)])
    top, left = (round((side - crop) / 2) for side in pixels.shape[:2])  # halves to even, as torchvision
    return pixels[top : top + crop, left : left + crop]


def load(
    source: Path | bytes | UInt8[np.ndarray, "h w 3"], preprocessing: Preprocessing, reader: Reader = read
) -> UInt8[np.ndarray, "s s c"]:
    """:func:`preprocess` of a file, as ``reader`` reads it, or of RGB pixels."""
    return preprocess(Image.fromarray(source) if isinstance(source, np.ndarray) else reader(source), preprocessing)


def batches(
    sources: Iterable[Path | bytes | np.ndarray], preprocessing: Preprocessing, batch_size: int, reader: Reader = read
) -> Iterator[Batch]:
    """Every source once and in order, decoded by a pool of threads a batch ahead; bad images are left out.

    Files are read by ``reader``, :func:`read` or :func:`photo`. Each batch has ``batch_size`` images, the last one filled up
    with zeros. Nothing is raised for a bad image.
    """
    shape = (batch_size, preprocessing.crop, preprocessing.crop, len(preprocessing.mean))
    positions: list[int] = []
    bad: list[Bad] = []
    images = np.zeros(shape, np.uint8)
    for position, found in enumerate(_in_threads(sources, preprocessing, batch_size, reader)):
        if isinstance(found, BadImage):
            bad.append(Bad(position, str(found)))
            continue
        images[len(positions)] = found
        positions.append(position)
        if len(positions) == batch_size:
            yield Batch(images, np.array(positions), bad)
            images, positions, bad = np.zeros(shape, np.uint8), [], []
    if positions or bad:
        yield Batch(images, np.array(positions, int), bad)


def _in_threads(
    sources: Iterable[Path | bytes | np.ndarray], preprocessing: Preprocessing, ahead: int, reader: Reader
) -> Iterator[np.ndarray | BadImage]:
    """:func:`load` of each source in order, begun up to ``ahead`` sources early; Pillow decodes outside Python's lock."""

    def attempt(source: Path | bytes | np.ndarray) -> np.ndarray | BadImage:
        try:
            return load(source, preprocessing, reader)
        except BadImage as error:
            return error

    waiting: deque[Future[np.ndarray | BadImage]] = deque()
    # Pillow warns of damaged EXIF data and the like, on which no pixel depends. Filters are the process's, not a
    # thread's, so they are set once and not around each image.
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            for source in sources:
                waiting.append(pool.submit(attempt, source))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
