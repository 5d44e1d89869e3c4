"""Augmentation and normalisation of uint8 images on the device, inside the jitted step.

The functions compute torchvision's transforms of the same names on batches: ``RandomCrop(32, padding=4)``,
``RandomHorizontalFlip()``, ``RandomResizedCrop(224)``, ``Resize(256)`` with ``CenterCrop(224)``, ``ToTensor()``,
``RandomErasing(p)`` and ``Normalize(mean, std)``. The random numbers differ, and resized images are not rounded to whole
grey levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from jresnet.training import autoaugment
from jresnet.weights.preprocessing import normalise


@dataclass(frozen=True)
class Pipeline:
    """The steps from uint8 ``[N, H, W, C]`` to normalised float32 ``[N, size, size, C]``."""

    # "pad": random crop of the image padded by 4 black pixels; "resized": random resized crop; "done": already cropped;
    # "features": embeddings instead of images, which are not changed
    crop: str
    size: int  # height and width of the result in pixels
    flip: str  # mirroring of training images: "none"; "random", with probability 1/2; "alternate", every second epoch
    mean: tuple[float, ...]  # per channel, for pixels in [0, 1]
    std: tuple[float, ...]
    random_erasing: float = 0.0  # probability that a rectangle is replaced by the mean colour
    mixup: float = 0.0  # parameter of mixup's Beta distribution; 0: no mixup
    cutmix: float = 0.0  # the same for cutmix; if both are given, each batch uses one of them, with probability 1/2
    min_area: float = 0.08  # smallest fraction of the area that a random resized crop covers
    augment: str = "none"  # an augmentation of :mod:`jresnet.training.autoaugment`: "none", "jitter", "rand", "trivial"
    magnitude: float = 0.0  # of "rand", from 0 to 10; for "jitter", ten times its strength

    def train(
        self, key: jax.Array, images: UInt8[Array, "n h w c"], turned: Bool[Array, " n"] | None = None
    ) -> Float[Array, "n s s c"]:
        """Draws a random view of each image. With flip "alternate", the images in ``turned`` are mirrored."""
        if self.crop == "features":
            return images
        crop_key, flip_key, erase_key = jax.random.split(key, 3)
        if self.crop == "pad":  # before the conversion to float, while a pixel takes one byte
            images = random_crop(crop_key, images, self.size, padding=4)
        views = images.astype(jnp.float32)
        if self.crop == "resized":
            views = random_resized_crop(crop_key, views, self.size, self.min_area)
        if self.flip == "random":
            turned = jax.random.bernoulli(flip_key, 0.5, (len(views),))
        if self.flip != "none" and turned is not None:
            views = mirror(views, turned)
        if self.augment != "none":
            views = self._augmented(jax.random.fold_in(key, 3), views)  # a fourth key, after the three above
        views = normalise(views, self.mean, self.std)
        return random_erasing(erase_key, views, self.random_erasing) if self.random_erasing else views

    def _augmented(self, key: jax.Array, views: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        if self.augment == "trivial":
            return autoaugment.trivial_augment(key, views)
        if self.augment == "rand":
            fill = jnp.round(255 * jnp.array(self.mean))  # as in timm
            return autoaugment.rand_augment(key, views, self.magnitude, fill)
        return autoaugment.color_jitter(key, views, self.magnitude / autoaugment.LEVELS)

    def mix(
        self, key: jax.Array, images: Float[Array, "n h w c"], targets: Float[Array, "n k"]
    ) -> tuple[Float[Array, "n h w c"], Float[Array, "n k"]]:
        """Mixes each image and its target with another of the batch, by mixup or cutmix as configured."""
        choice_key, key = jax.random.split(key)
        if self.mixup and self.cutmix:
            choice = jax.random.bernoulli(choice_key)
            mixings = [partial(mixup, alpha=self.mixup), partial(cutmix, alpha=self.cutmix)]
            return lax.cond(choice, *mixings, key, images, targets)
        if self.mixup:
            return mixup(key, images, targets, self.mixup)
        return cutmix(key, images, targets, self.cutmix) if self.cutmix else (images, targets)

    def evaluate(self, images: UInt8[Array, "n h w c"]) -> Float[Array, "n s s c"]:
        """The evaluation view: the image itself, or its centre 7/8 enlarged (224 of 256 pixels)."""
        if self.crop == "features":
            return images
        views = images.astype(jnp.float32)
        if self.crop == "resized":
            views = resize_and_center_crop(views, round(self.size * 8 / 7), self.size)
        return normalise(views, self.mean, self.std)


def random_crop(key: jax.Array, images: Shaped[Array, "n h w c"], size: int, padding: int) -> Shaped[Array, "n s s c"]:
    """Crops a ``size`` x ``size`` window of each image, padded by ``padding`` black pixels, at a uniformly drawn offset.

    XLA compiles it to one gather of whole windows (``slice_sizes`` 1, size, size, channels), whose rows a GPU reads
    contiguously. Shifting with ``jnp.where`` or by matrix products would need no gather, but one pass per possible offset. A
    batch of bytes is a thousandth of the memory traffic of a training step.
    """
    n, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    limits = jnp.array([height + 2 * padding - size + 1, width + 2 * padding - size + 1])
    offsets = jax.random.randint(key, (n, 2), 0, limits)

    def window(image: jax.Array, offset: jax.Array) -> jax.Array:
        return lax.dynamic_slice(image, (offset[0], offset[1], 0), (size, size, channels))

    return jax.vmap(window)(padded, offsets)


def mirror(images: Float[Array, "n h w c"], which: Bool[Array, " n"]) -> Float[Array, "n h w c"]:
    """Mirrors the images selected by ``which`` left to right."""
    return jnp.where(which[:, None, None, None], images[:, :, ::-1], images)


def alternate(key: jax.Array, indices: Int[Array, " n"], epoch: int | jax.Array) -> Bool[Array, " n"]:
    """Selects the images that are mirrored in ``epoch``: about half of them, and in the next epoch the others.

    A random bit per image, drawn once from ``key`` and the image's index, decides whether the image is mirrored in the first
    epoch (arXiv:2404.00498, section 3.6). So two consecutive epochs show both versions of each image, whereas independent
    draws repeat a version half of the time.
    """
    coins = jax.vmap(lambda index: jax.random.bits(jax.random.fold_in(key, index)))(indices)
    return (coins + jnp.asarray(epoch).astype(coins.dtype)) % 2 == 1


def random_erasing(key: jax.Array, images: Float[Array, "n h w c"], probability: float) -> Float[Array, "n h w c"]:
    """Sets a rectangle of each image to 0, the mean colour of normalised images, with ``probability``.

    As torchvision's ``RandomErasing`` (arXiv:1708.04896): the rectangle has 2 to 33 % of the area and a ratio of height to
    width from 0.3 to 3.3. The first of ten draws that is smaller than the image is used, or none if there is none.
    """
    n, height, width, _ = images.shape
    area_key, ratio_key, place_key, coin_key = jax.random.split(key, 4)
    areas = height * width * jax.random.uniform(area_key, (n, 10), minval=0.02, maxval=0.33)
    ratios = jnp.exp(jax.random.uniform(ratio_key, (n, 10), minval=math.log(0.3), maxval=math.log(3.3)))
    heights, widths = jnp.round(jnp.sqrt(areas * ratios)), jnp.round(jnp.sqrt(areas / ratios))
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    h, w = (jnp.take_along_axis(sizes, first, 1)[:, 0] for sizes in (heights, widths))
    place = jax.random.uniform(place_key, (n, 2))
    top, left = jnp.floor(place[:, 0] * (height - h + 1)), jnp.floor(place[:, 1] * (width - w + 1))
    erased = jax.random.bernoulli(coin_key, probability, (n,)) & fits.any(axis=1)
    inside = box(top, left, top + h, left + w, height, width) & erased[:, None, None]
    return jnp.where(inside[..., None], 0.0, images)


def mixup(
    key: jax.Array, images: Float[Array, "n h w c"], targets: Float[Array, "n k"], alpha: float
) -> tuple[Float[Array, "n h w c"], Float[Array, "n k"]]:
    """Mixup (arXiv:1710.09412): replaces images and targets by convex combinations of two examples.

    One weight is drawn per batch from Beta(alpha, alpha). Examples are paired with the batch in reverse order, as in timm.
    """
    share = jax.random.beta(key, alpha, alpha, dtype=images.dtype)
    return tuple(share * x + (1 - share) * x[::-1] for x in (images, targets))  # type: ignore[return-value]


def cutmix(
    key: jax.Array, images: Float[Array, "n h w c"], targets: Float[Array, "n k"], alpha: float
) -> tuple[Float[Array, "n h w c"], Float[Array, "n k"]]:
    """CutMix (arXiv:1905.04899, algorithm A1): pastes a rectangle of another image; targets are weighted by area.

    One rectangle is drawn per batch. Its relative area is 1 - Beta(alpha, alpha), its centre is uniform, and it is clipped
    at the image's border. Images are paired with the batch in reverse order, as in timm.
    """
    share_key, place_key = jax.random.split(key)
    _, height, width, _ = images.shape
    size = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha)) * jnp.array([height, width])
    centre = jnp.floor(jax.random.uniform(place_key, (2,)) * jnp.array([height, width]))
    top_left, bottom_right = centre - jnp.floor(size / 2), centre + jnp.floor(size / 2)
    inside = box(top_left[:1], top_left[1:], bottom_right[:1], bottom_right[1:], height, width)
    share = 1 - inside.mean()
    mixed = jnp.where(inside[..., None], images[::-1], images)
    return mixed, share * targets + (1 - share) * targets[::-1]


def box(
    top: Float[Array, " n"], left: Float[Array, " n"], bottom: Float[Array, " n"], right: Float[Array, " n"],
    height: int, width: int,
) -> Bool[Array, "n h w"]:  # fmt: skip
    """A mask of the pixels in rows ``[top, bottom)`` and columns ``[left, right)``."""
    rows, columns = jnp.arange(height), jnp.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return in_rows[:, :, None] & in_columns[:, None, :]


def random_resized_crop(
    key: jax.Array, images: Float[Array, "n h w c"], size: int, min_area: float = 0.08
) -> Float[Array, "n s s c"]:
    """Crops a window of ``min_area`` to 100 % of each image's area and scales it to ``size`` x ``size``.

    As in torchvision, the aspect ratio is between 3/4 and 4/3, and the first of ten draws that fits into the image is used;
    otherwise the whole (square) image.
    """
    n, height, width, _ = images.shape
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    areas = height * width * jax.random.uniform(area_key, (n, 10), minval=min_area, maxval=1.0)
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
    """Enlarges square images to ``resize`` pixels (``resize >= H``) and crops the centre ``crop`` x ``crop``."""
    _, height, width, _ = images.shape
    middle = slice((resize - crop) // 2, (resize - crop) // 2 + crop)
    rows = interpolation(jnp.array(0.0), jnp.array(float(height)), height, resize)[middle]
    columns = interpolation(jnp.array(0.0), jnp.array(float(width)), width, resize)[middle]
    return jnp.einsum("yh,nhwc,xw->nyxc", rows, images, columns, precision=lax.Precision.HIGHEST)


def interpolation(start: jax.Array, length: jax.Array, source: int, target: int) -> Float[Array, "target source"]:
    """The matrix that resamples pixels ``[start, start + length)`` of ``source`` pixels to ``target`` pixels, bilinearly.

    Pixel centres are at half-integers, and edge pixels of the window are repeated, as in PIL and torchvision. There is no
    antialiasing, which enlarging does not need. Each row of the matrix has two weights, so that cropping and scaling are one
    small matrix product.
    """
    position = start + (jnp.arange(target) + 0.5) * length / target - 0.5
    position = jnp.clip(position, start, start + length - 1)
    return jnp.maximum(0.0, 1.0 - jnp.abs(position[:, None] - jnp.arange(source)))
