"""Lists, decodes, resizes, crops and batches image files with Pillow.

Images are converted to RGB, the shorter side is resized with antialiasing, and the centre is cropped. Normalisation is done
on the device (:func:`jresnet.weights.preprocessing.normalise`). :func:`photo` reads a file as viewers display it, upright
and with transparency over white. :func:`read` reads pixels as stored; then the results equal those of torchvision's
``ImageFolder`` with ``Resize`` and ``CenterCrop`` on PIL images, bit by bit.

Files are untrusted. Only the formats below are decoded (Pillow would pass PostScript to a program), and images of more than
Pillow's ``MAX_IMAGE_PIXELS`` are refused, as read and as resized.
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
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # detected from content: some .JPEG of ImageNet are PNG
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


Reader = Callable[[Any], Image.Image]  # a file's path to its image in mode RGB
_TURNS = {  # by EXIF orientation (EXIF 2.32, table 4, tag 274)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(DataError):
    """An image file cannot be decoded; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Folder:
    """Image files by class, in torchvision's ``ImageFolder`` order."""

    root: Path
    classes: tuple[str, ...]  # folder names, sorted
    paths: tuple[Path, ...]
    labels: tuple[int, ...]  # indices into classes
    ignored: int  # number of other files


class Bad(NamedTuple):
    """An image that was skipped."""

    position: int  # index into the sources
    reason: str


class Batch(NamedTuple):
    """Images ready for the device."""

    images: UInt8[np.ndarray, "b s s c"]  # the last batch is padded with zeros
    positions: np.ndarray  # int [n], n <= b: indices of the first n images into the sources
    bad: list[Bad]  # images skipped since the previous batch


@dataclass(frozen=True)
class Walked:
    """Image files by class as strings, and the folders that were searched."""

    classes: tuple[str, ...]
    files: list[tuple[str, int]]  # (path below the root, index into classes)
    folders: list[str]
    ignored: int  # number of other files


def list_folder(root: str | Path) -> Folder:
    """Lists the images in ``root/CLASS/`` and the folders below, in the order of ``torchvision.datasets.ImageFolder``.

    Unlike torchvision, it ignores hidden folders, ``__pycache__`` and ``__MACOSX``. Links to files and to class folders are
    followed; links to folders further down are not, because they may form cycles.

    Raises:
        DataError: the folder does not exist or cannot be read, or contains no image in a class folder.
    """
    found = walk(root)
    root = Path(root).expanduser()
    paths, labels = tuple(root / path for path, _ in found.files), tuple(label for _, label in found.files)
    return Folder(root, found.classes, paths, labels, found.ignored)


def walk(root: str | Path) -> Walked:
    """As :func:`list_folder`, with strings instead of ``Path`` objects, a million of which take a gigabyte."""
    layout = "expected FOLDER/CLASS/*.JPEG, one folder per class"
    if not os.fspath(root):  # perhaps an unset variable; Path would take it for the working directory
        raise DataError(f"the folder of images is an empty string: {layout}")
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
        what = f"no images (class folders: {len(classes):,})" if classes else f"no class folders (files: {ignored:,})"
        raise DataError(f"{root} contains {what}: {layout}; images end in {', '.join(EXTENSIONS)}")
    return Walked(classes, found, looked, ignored)


def is_aside(name: str) -> bool:
    """Whether a folder was created by a program beside the images: notebook checkpoints, caches, macOS's attributes."""
    return name.startswith(".") or name in ("__pycache__", "__MACOSX")


def _walk(root: Path, fail: Callable[[OSError], None]) -> Iterator[tuple[str, list[str]]]:
    """Yields ``root`` and the folders below with their files, except folders that do not belong to the data."""
    for folder, below, files in os.walk(root, onerror=fail):
        below[:] = [name for name in below if not is_aside(name)]
        yield folder, files


def in_turn(labels: Sequence[int]) -> list[int]:
    """An order of images: the first of every class, then the second of every class, and so on.

    For any N, the first N images are evenly distributed over the classes.
    """
    seen: Counter[int] = Counter()
    turns = []
    for label in labels:
        turns.append((seen[label], label))
        seen[label] += 1
    return sorted(range(len(turns)), key=turns.__getitem__)


def read(path: str | Path) -> Image.Image:
    """Reads an image file as RGB, as ``ImageFolder`` does: the first frame, ignoring the EXIF orientation.

    Raises:
        BadImage: the file is missing, empty, truncated, too large, or not in one of ``FORMATS``.
    """
    with opened(path) as image:
        return as_rgb(image)


def photo(source: str | Path | bytes) -> Image.Image:
    """Reads an image as RGB, as viewers display it (:func:`seen`); arguments and errors as in :func:`opened`."""
    with opened(source) as image:
        return seen(image)


@contextlib.contextmanager
def opened(source: str | Path | bytes) -> Iterator[Image.Image]:
    """Opens an image file, or the content of one, without decoding it; exceptions in the block become BadImage.

    Raises:
        BadImage: the file is missing, empty, truncated, too large, or not in one of ``FORMATS``.
    """
    try:
        if not isinstance(source, bytes):
            if not os.path.isfile(source):  # reading a pipe may never end
                raise BadImage("not a regular file" if os.path.exists(source) else "missing")
            if os.path.getsize(source) == 0:
                raise BadImage("empty")
        elif not source:
            raise BadImage("empty")
        with (
            io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file,
            Image.open(file, formats=FORMATS) as image,
        ):
            if image.width * image.height > _limit():  # Pillow itself only warns up to twice the limit
                raise BadImage(f"{image.width} x {image.height} pixels are more than {_limit():,}")
            yield image
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image: expected one of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise BadImage(" ".join(reason.split())) from error


def seen(image: Image.Image) -> Image.Image:
    """Converts an open image to RGB as viewers display it: first frame, EXIF orientation applied, transparency over white.

    Grey levels and errors as in :func:`as_rgb`.
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
    """The EXIF orientation of an open image, 1 to 8; 1 (as stored) if EXIF is damaged or does not state it.

    It is 1 for TIFF, because Pillow itself rotates such images when it decodes them.
    """
    if image.format == "TIFF":
        return 1
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow's parser raises many kinds of errors
        return 1


def as_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB, as viewers display it.

    Pillow's conversion clips values above 255. Instead, 16-bit grey levels are scaled to 8 bits. Floating-point values are
    taken as a range of 0 to 1 or 0 to 255 if they lie within it. Otherwise, and for wider integers, the range between the
    image's smallest and largest value is scaled.

    Raises:
        BadImage: a value is NaN or infinite.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    levels = np.asarray(image).astype(np.float64)
    if not np.isfinite(levels).all():
        raise BadImage("it contains NaN or infinite values")
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
    return Image.MAX_IMAGE_PIXELS or float("inf")  # None means no limit


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> UInt8[np.ndarray, "s s c"]:
    """Resizes and crops like torchvision's ``Resize(resize)`` and ``CenterCrop(crop)``.

    Args:
        image: an image in mode RGB.
        preprocessing: if ``mean`` has one value, the image is converted to grey like torchvision's ``Grayscale()``.

    Returns:
        uint8 ``[crop, crop, 1 or 3]``; black where the resized image is smaller than the crop.

    Raises:
        BadImage: the image is so narrow that the resized image would exceed Pillow's limit of pixels.
    """
    if len(preprocessing.mean) == 1:
        image = image.convert("L")
    if preprocessing.resize is not None:
        width, height = image.size
        longer = int(preprocessing.resize * max(width, height) / min(width, height))
        if preprocessing.resize * longer > _limit():
            raise BadImage(
                f"{width} x {height} pixels are too narrow to resize the shorter side to {preprocessing.resize}"
            )
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
    """Applies :func:`preprocess` to a file, read by ``reader``, or to RGB pixels."""
    return preprocess(Image.fromarray(source) if isinstance(source, np.ndarray) else reader(source), preprocessing)


def batches(
    sources: Iterable[Path | bytes | np.ndarray], preprocessing: Preprocessing, batch_size: int, reader: Reader = read
) -> Iterator[Batch]:
    """Yields batches of all sources in order, decoded by a pool of threads one batch ahead.

    Bad images are left out and listed in the batch; they raise nothing. Each batch has ``batch_size`` images; the last one
    is padded with zeros. Files are read by ``reader``: :func:`read` or :func:`photo`.
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
    """Yields the result of :func:`load` for each source in order, with up to ``ahead`` sources started in advance."""

    def attempt(source: Path | bytes | np.ndarray) -> np.ndarray | BadImage:
        try:
            return load(source, preprocessing, reader)
        except BadImage as error:
            return error

    waiting: deque[Future[np.ndarray | BadImage]] = deque()
    # Pillow warns about damaged EXIF data and similar problems that do not affect pixels. Warning filters are global to the
    # process, so they are set once and not in each thread.
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
