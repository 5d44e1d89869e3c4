"""Images from uint8 to what the network sees, on the device, inside the jitted step.

The functions are torchvision's transforms of the same names on batches: ``RandomCrop(32, padding=4)``,
``RandomHorizontalFlip()``, ``RandomResizedCrop(224)``, ``Resize(256)`` with ``CenterCrop(224)``, ``ToTensor()`` and
``Normalize(mean, std)``. Only the draws differ, and resized images are not rounded to whole grey levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8


@dataclass(frozen=True)
class Pipeline:
    """From uint8 ``[N, H, W, C]`` to normalised float32 ``[N, size, size, C]``."""

    crop: str  # "pad": random crop of the image with 4 black pixels around; "resized": random resized crop
    size: int  # pixels, height and width of the result
    flip: bool  # mirror half of the training images
    mean: tuple[float, ...]  # of pixels in [0, 1], by channel
    std: tuple[float, ...]

    def train(self, key: jax.Array, images: UInt8[Array, "n h w c"]) -> Float[Array, "n s s c"]:
        """A random view of each image."""
        crop_key, flip_key = jax.random.split(key)
        views = images.astype(jnp.float32)
        if self.crop == "resized":
            views = random_resized_crop(crop_key, views, self.size)
        else:
            views = random_crop(crop_key, views, self.size, padding=4)
        if self.flip:
            views = random_flip(flip_key, views)
        return normalise(views, self.mean, self.std)

    def evaluate(self, images: UInt8[Array, "n h w c"]) -> Float[Array, "n s s c"]:
        """The one view for evaluation: the image itself, or the centre 7/8 of it enlarged (224 of 256)."""
        views = images.astype(jnp.float32)
        if self.crop == "resized":
            views = resize_and_center_crop(views, round(self.size * 8 / 7), self.size)
        return normalise(views, self.mean, self.std)


def normalise(
    images: Float[Array, "n h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "n h w c"]:
    """Grey levels 0 to 255 -> (x / 255 - mean) / std, by channel."""
    return (images / 255 - jnp.array(mean, images.dtype)) / jnp.array(std, images.dtype)


def random_crop(key: jax.Array, images: Float[Array, "n h w c"], size: int, padding: int) -> Float[Array, "n s s c"]:
    """A ``size`` x ``size`` window of each image with ``padding`` black pixels on every side, at a uniform offset."""
    n, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    limits = jnp.array([height + 2 * padding - size + 1, width + 2 * padding - size + 1])
    offsets = jax.random.randint(key, (n, 2), 0, limits)

    def window(image: jax.Array, offset: jax.Array) -> jax.Array:
        return lax.dynamic_slice(image, (offset[0], offset[1], 0), (size, size, channels))

    return jax.vmap(window)(padded, offsets)


def random_flip(key: jax.Array, images: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Mirrors each image left to right with probability 1/2."""
    mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def random_resized_crop(key: jax.Array, images: Float[Array, "n h w c"], size: int) -> Float[Array, "n s s c"]:
    """A window of 8 to 100 % of each image's area and aspect ratio 3/4 to 4/3, scaled to ``size`` x ``size``.

    As torchvision: ten draws, the first window that fits in the image; else the whole of a square image.
    """
    n, height, width, _ = images.shape
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    areas = height * width * jax.random.uniform(area_key, (n, 10), minval=0.08, maxval=1.0)
    ratios = jnp.exp(jax.random.uniform(ratio_key, (n, 10), minval=math.log(3 / 4), maxval=math.log(4 / 3)))
    widths, heights = jnp.round(jnp.sqrt(areas * ratios)), jnp.round(jnp.sqrt(areas / ratios))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = jnp.argmax(fits, axis=1, keepdims=True)  # 0 where none fits
    found = fits.any(axis=1)
    w = jnp.where(found, jnp.take_along_axis(widths, first, 1)[:, 0], width)
    h = jnp.where(found, jnp.take_along_axis(heights, first, 1)[:, 0], height)
    place = jax.random.uniform(place_key, (n, 2))
    top, left = jnp.floor(place[:, 0] * (height - h + 1)), jnp.floor(place[:, 1] * (width - w + 1))
    rows = jax.vmap(lambda start, length: interpolation(start, length, height, size))(top, h)
    columns = jax.vmap(lambda start, length: interpolation(start, length, width, size))(left, w)
    return jnp.einsum("nyh,nhwc,nxw->nyxc", rows, images, columns, precision=lax.Precision.HIGHEST)


def resize_and_center_crop(images: Float[Array, "n h w c"], resize: int, crop: int) -> Float[Array, "n s s c"]:
    """Square images scaled to ``resize`` pixels and cut to the ``crop`` in the middle, enlarging (``resize >= H``)."""
    _, height, width, _ = images.shape
    middle = slice((resize - crop) // 2, (resize - crop) // 2 + crop)
    rows = interpolation(jnp.array(0.0), jnp.array(float(height)), height, resize)[middle]
    columns = interpolation(jnp.array(0.0), jnp.array(float(width)), width, resize)[middle]
    return jnp.einsum("yh,nhwc,xw->nyxc", rows, images, columns, precision=lax.Precision.HIGHEST)


def interpolation(start: jax.Array, length: jax.Array, source: int, target: int) -> Float[Array, "target source"]:
    """The matrix that resamples pixels ``[start, start + length)`` of a row of ``source`` into ``target``, bilinearly.

    Pixel centres lie at halves, and the window's edge pixels repeat beyond it, as PIL and torchvision do. Enlarging
    needs no antialiasing; a row of the matrix holds two weights, so cutting and scaling are one small matrix product.
    """
    position = start + (jnp.arange(target) + 0.5) * length / target - 0.5
    position = jnp.clip(position, start, start + length - 1)
    return jnp.maximum(0.0, 1.0 - jnp.abs(position[:, None] - jnp.arange(source)))
