"""Training views: torchvision's ``RandomResizedCrop``, drawn and decoded on the host.

OpenCV decodes and resizes JPEGs. Decoding gives the same pixels as Pillow. ``scripts/benchmark_loader.py`` measures the
speed of the whole loader beside torchvision's. If the crop is at least twice as large as the result, the JPEG is decoded at
1/2, 1/4 or 1/8 of its size (libjpeg's scaling in the frequency domain). All other files, including damaged JPEGs, are
decoded by Pillow (:mod:`jresnet.data.images`).

OpenCV and Pillow use different filters for shrinking. For crops at least 1.5 times as large as the result, OpenCV averages
over the area of a pixel; for smaller ones it interpolates between the four nearest pixels, which is faster. The root mean
square difference to Pillow's views is below 2.5 grey levels (``tests/test_stream.py``).
"""

from __future__ import annotations

import math
import os
import stat
import struct
from random import Random
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jresnet.data import images
from jresnet.data.dataset import not_importable
from jresnet.data.images import BadImage

MAX_FILE = 2**28  # largest file that is read into memory, in bytes; a photo has a few million
MEAN_FROM = 1.5  # ratio of the crop's size to the result's from which OpenCV averages


def random_resized_crop(
    source: str | bytes, size: int, draws: Random, min_area: float = 0.08, interpolation: str = "bilinear"
) -> UInt8[np.ndarray, "s s 3"]:
    """Applies torchvision's ``RandomResizedCrop(size, scale=(min_area, 1))`` to an image.

    Args:
        source: path of an image file, or its content.
        size: height and width of the result in pixels.
        draws: random numbers for the crop.
        min_area: smallest fraction of the image's area that a crop covers.
        interpolation: ``"bilinear"`` or ``"bicubic"``.

    Returns:
        RGB pixels, uint8 ``[size, size, 3]``.

    Raises:
        BadImage: as :func:`jresnet.data.images.opened`.
    """
    content = source if isinstance(source, bytes) else _content(source)
    box = None
    if content is not None and (extent := _plain_jpeg(content)) is not None:
        box = crop_box(*extent, draws, min_area)
        if (view := _by_opencv(content, extent, box, size, interpolation)) is not None:
            return view
    with images.opened(content or source) as image:
        turned = images.orientation(image) >= 5  # rotated by 90 degrees
        width, height = image.size[::-1] if turned else image.size
        left, top, w, h = box or crop_box(width, height, draws, min_area)
        shrink = max(1, min(w, h) // size)
        if shrink > 1:
            image.draft(None, (image.width // shrink, image.height // shrink))
        pixels = images.seen(image)
    how = images.FILTERS[interpolation]
    # crop before resizing, as torchvision: the filter uses no pixel outside the crop
    if pixels.size == (width, height):
        return np.asarray(pixels.crop((left, top, left + w, top + h)).resize((size, size), how))
    x, y = pixels.width / width, pixels.height / height
    part = (left * x, top * y, min((left + w) * x, pixels.width), min((top + h) * y, pixels.height))
    return np.asarray(pixels.resize((size, size), how, box=part))


def _by_opencv(
    content: bytes, extent: tuple[int, int], box: tuple[int, int, int, int], size: int, interpolation: str
) -> np.ndarray | None:
    """A resized crop of a JPEG; None if OpenCV cannot decode it."""
    cv2 = _opencv()
    left, top, w, h = box
    # Only the size bit of the constants for reduced sizes: their colour bit would give BGR instead of RGB.
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    if (shrink := next((scale for scale in (8, 4, 2) if min(w, h) >= scale * size), 1)) > 1:
        flags |= getattr(cv2, f"IMREAD_REDUCED_COLOR_{shrink}") & ~cv2.IMREAD_COLOR
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:
        pixels = None
    if pixels is None:
        return None
    x, y = pixels.shape[1] / extent[0], pixels.shape[0] / extent[1]
    left, right, top, bottom = round(left * x), round((left + w) * x), round(top * y), round((top + h) * y)
    crop = pixels[top : max(bottom, top + 1), left : max(right, left + 1)]
    h, w = crop.shape[:2]
    how = cv2.INTER_CUBIC if interpolation == "bicubic" else cv2.INTER_LINEAR
    if min(w, h) >= size and w * h >= (MEAN_FROM * size) ** 2:
        how = cv2.INTER_AREA
    return cv2.resize(crop, (size, size), interpolation=how)


def _content(path: str) -> bytes | None:
    """The content of a regular file; None if it cannot be read, so that :func:`jresnet.data.images.opened` reports it."""
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode) or not 0 < state.st_size <= MAX_FILE:
            return None
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def _plain_jpeg(content: bytes) -> tuple[int, int] | None:
    """Width and height of a complete, upright, 8-bit JPEG in grey or RGB; None for anything else.

    Everything else is left to Pillow: CMYK, other EXIF orientations, truncated files, decompression bombs.
    """
    if content[:3] != b"\xff\xd8\xff" or b"\xff\xd9" not in content[-64:]:
        return None
    position, exif = 2, False
    while position + 10 <= len(content):
        if content[position] != 0xFF:
            return None
        marker = content[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker in (0xC0, 0xC1, 0xC2):
            precision, height, width, channels = struct.unpack_from(">BHHB", content, position + 4)
            fits = 0 < width * height <= (Image.MAX_IMAGE_PIXELS or math.inf)
            if precision != 8 or channels not in (1, 3) or not fits or (exif and not _is_upright(content)):
                return None
            return width, height
        if not 0xC4 <= marker <= 0xFE or marker in (0xD8, 0xD9, 0xDA):  # image data before the size: invalid
            return None
        exif |= marker == 0xE1
        position += 2 + int.from_bytes(content[position + 2 : position + 4])
    return None


def _is_upright(content: bytes) -> bool:
    try:
        with images.opened(content) as image:
            return images.orientation(image) == 1
    except BadImage:
        return False


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise not_importable("opencv-python-headless", error) from error
    return cv2


def one_thread() -> None:
    """Turns off OpenCV's threads, for a worker process that is one of many."""
    _opencv().setNumThreads(1)


def crop_box(width: int, height: int, draws: Random, min_area: float = 0.08) -> tuple[int, int, int, int]:
    """Draws a crop with the distribution of torchvision's ``RandomResizedCrop.get_params``.

    The area is uniform between ``min_area`` and 1 of the image's area; the aspect ratio is log-uniform between 3/4 and 4/3.
    The first of ten draws that fits into the image is used, else the largest centred crop with an allowed ratio.

    Returns:
        Left, top, width and height in pixels.
    """
    for _ in range(10):
        area = width * height * draws.uniform(min_area, 1.0)
        ratio = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draws.randrange(width - w + 1), draws.randrange(height - h + 1), w, h
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * 4 / 3)
    return (width - w) // 2, (height - h) // 2, w, h
