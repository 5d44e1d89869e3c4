"""Training views: torchvision's ``RandomResizedCrop``, drawn and decoded on the host.

A JPEG is decoded by OpenCV, to the same pixels as by Pillow in 0.7 of its time, and resized by it. Where the crop is more
than twice as large as its result the JPEG is decoded at a half, a quarter or an eighth of its size (libjpeg's scaling in the
frequency domain). Everything else, a damaged JPEG included, is Pillow's (:mod:`jresnet.data.images`).

OpenCV and Pillow shrink by different filters: of crops that are 1.5 times as large as the result or more OpenCV takes the
mean of what a pixel covers, of smaller ones it interpolates between the four nearest pixels. Measured on noisy 500x375
JPEGs at 224 pixels, the difference to torchvision's views is 1.2 grey levels (root mean square); with the mean throughout
it would be 0.8, and a fifth fewer images a second.
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

MAX_FILE = 2**28  # bytes of a file that is read whole; a photo has some millions
MEAN_FROM = 1.5  # times the result's size from which OpenCV takes the mean


def random_resized_crop(
    source: str | bytes, size: int, draws: Random, min_area: float = 0.08, interpolation: str = "bilinear"
) -> UInt8[np.ndarray, "s s 3"]:
    """torchvision's ``RandomResizedCrop(size, scale=(min_area, 1))`` of an image file or its content, RGB.

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
        turned = images.orientation(image) >= 5  # lying on a side
        width, height = image.size[::-1] if turned else image.size
        left, top, w, h = box or crop_box(width, height, draws, min_area)
        shrink = max(1, min(w, h) // size)
        if shrink > 1:
            image.draft(None, (image.width // shrink, image.height // shrink))
        pixels = images.seen(image)
    how = images.FILTERS[interpolation]
    if pixels.size == (width, height):  # cut out first, as torchvision: the filter sees no pixel outside
        return np.asarray(pixels.crop((left, top, left + w, top + h)).resize((size, size), how))
    x, y = pixels.width / width, pixels.height / height
    part = (left * x, top * y, min((left + w) * x, pixels.width), min((top + h) * y, pixels.height))
    return np.asarray(pixels.resize((size, size), how, box=part))


def _by_opencv(
    content: bytes, extent: tuple[int, int], box: tuple[int, int, int, int], size: int, interpolation: str
) -> np.ndarray | None:
    """A crop of a JPEG, resized; None where OpenCV does not decode it."""
    cv2 = _opencv()
    left, top, w, h = box
    # Of the constants for reduced sizes the bit alone: with the other one the channels come in the other order.
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
    """An ordinary file's content; None for what :func:`jresnet.data.images.opened` is to say what is wrong with."""
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode) or not 0 < state.st_size <= MAX_FILE:
            return None
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def _plain_jpeg(content: bytes) -> tuple[int, int] | None:
    """Width and height of a whole, upright JPEG in grey or colour of 8 bits; None for anything else.

    What is none goes to Pillow: CMYK, EXIF's other orientations, a missing end, a bomb.
    """
    if content[:3] != b"\xff\xd8\xff" or b"\xff\xd9" not in content[-64:]:
        return None
    position, exif = 2, False
    while position + 10 <= len(content):
        if content[position] != 0xFF:
            return None
        marker = content[position + 1]
        if marker == 0xFF:  # a filling byte
            position += 1
            continue
        if marker in (0xC0, 0xC1, 0xC2):
            precision, height, width, channels = struct.unpack_from(">BHHB", content, position + 4)
            fits = 0 < width * height <= (Image.MAX_IMAGE_PIXELS or math.inf)
            if precision != 8 or channels not in (1, 3) or not fits or (exif and not _is_upright(content)):
                return None
            return width, height
        if not 0xC4 <= marker <= 0xFE or marker in (0xD8, 0xD9, 0xDA):  # the image itself, before its size
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
    """Keeps OpenCV from starting threads in a process that is one of many."""
    _opencv().setNumThreads(1)


def crop_box(width: int, height: int, draws: Random, min_area: float = 0.08) -> tuple[int, int, int, int]:
    """Left, top, width and height of a crop, with the distribution of torchvision's ``RandomResizedCrop.get_params``.

    ``min_area`` to 100 % of the area and an aspect ratio from 3/4 to 4/3, log-uniform; the first of ten draws that fits,
    else the largest part in the middle whose ratio is within those bounds.
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
