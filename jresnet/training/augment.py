"""Images from uint8 to what the network sees, on the device, inside the jitted step.

The functions are torchvision's transforms of the same names on batches: ``RandomCrop(32, padding=4)``,
``RandomHorizontalFlip()``, ``RandomResizedCrop(224)``, ``Resize(256)`` with ``CenterCrop(224)``, ``ToTensor()``,
``RandomErasing(p)`` and ``Normalize(mean, std)``. Only the draws differ, and resized images are not rounded to whole
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
    """From uint8 ``[N, H, W, C]`` to normalised float32 ``[N, size, size, C]``."""

    # "pad": random crop of the image with 4 black pixels around; "resized": random resized crop; "done": cut out already;
    # "features": no images but embeddings, which stay as they are
    crop: str
    size: int  # pixels, height and width of the result
    flip: str  # mirror a training image: "none"; "random", with probability 1/2; "alternate", every second epoch
    mean: tuple[float, ...]  # of pixels in [0, 1], by channel
    std: tuple[float, ...]
    random_erasing: float = 0.0  # probability of a rectangle of the mean colour
    mixup: float = 0.0  # parameter of mixup's Beta distribution; 0: none
    cutmix: float = 0.0  # of cutmix's; where both are given, each batch has one of them, with probability 1/2
    min_area: float = 0.08  # the smallest share of the area that a random resized crop keeps
    augment: str = "none"  # of :mod:`jresnet.training.autoaugment`: "none", "jitter", "rand", "trivial"
    magnitude: float = 0.0  # of "rand", 0 to 10; of "jitter" ten times its strength

    def train(
        self, key: jax.Array, images: UInt8[Array, "n h w c"], turned: Bool[Array, " n"] | None = None
    ) -> Float[Array, "n s s c"]:
        """A random view of each image; with flip "alternate", ``turned`` (of :func:`alternate`) are mirrored."""
        if self.crop == "features":
            return images
        crop_key, flip_key, erase_key = jax.random.split(key, 3)
        if self.crop == "pad":  # while a pixel is one byte
            images = random_crop(crop_key, images, self.size, padding=4)
        views = images.astype(jnp.float32)
        if self.crop == "resized":
            views = random_resized_crop(crop_key, views, self.size, self.min_area)
        if self.flip == "random":
            turned = jax.random.bernoulli(flip_key, 0.5, (len(views),))
        if self.flip != "none" and turned is not None:
            views = mirror(views, turned)
        if self.augment != "none":
            views = self._augmented(jax.random.fold_in(key, 3), views)  # three keys are taken already
        views = normalise(views, self.mean, self.std)
        return random_erasing(erase_key, views, self.random_erasing) if self.random_erasing else views

    def _augmented(self, key: jax.Array, views: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        if self.augment == "trivial":
            return autoaugment.trivial_augment(key, views)
        if self.augment == "rand":
            fill = jnp.round(255 * jnp.array(self.mean))  # as timm's
            return autoaugment.rand_augment(key, views, self.magnitude, fill)
        return autoaugment.color_jitter(key, views, self.magnitude / autoaugment.LEVELS)

    def mix(
        self, key: jax.Array, images: Float[Array, "n h w c"], targets: Float[Array, "n k"]
    ) -> tuple[Float[Array, "n h w c"], Float[Array, "n k"]]:
        """Images and targets, each mixed with another of the batch as ``mixup`` and ``cutmix`` say."""
        choice_key, key = jax.random.split(key)
        if self.mixup and self.cutmix:
            choice = jax.random.bernoulli(choice_key)
            mixings = [partial(mixup, alpha=self.mixup), partial(cutmix, alpha=self.cutmix)]
            return lax.cond(choice, *mixings, key, images, targets)
        if self.mixup:
            return mixup(key, images, targets, self.mixup)
        return cutmix(key, images, targets, self.cutmix) if self.cutmix else (images, targets)

    def evaluate(self, images: UInt8[Array, "n h w c"]) -> Float[Array, "n s s c"]:
        """The one view for evaluation: the image itself, or the centre 7/8 of it enlarged (224 of 256)."""
        if self.crop == "features":
            return images
        views = images.astype(jnp.float32)
        if self.crop == "resized":
            views = resize_and_center_crop(views, round(self.size * 8 / 7), self.size)
        return normalise(views, self.mean, self.std)


def random_crop(key: jax.Array, images: Shaped[Array, "n h w c"], size: int, padding: int) -> Shaped[Array, "n s s c"]:
    """A ``size`` x ``size`` window of each image with ``padding`` black pixels on every side, at a uniform offset.

    XLA gets one gather of whole windows (``slice_sizes`` 1, size, size, channels), whose rows a GPU reads side by side, as
    it does the images of a batch. Shifts by ``jnp.where``, or by products with 0 and 1, would need no gather but as many
    passes as there are offsets; a batch of bytes is a thousandth of what a network's step moves.
    """
    n, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    limits = jnp.array([height + 2 * padding - size + 1, width + 2 * padding - size + 1])
    offsets = jax.random.randint(key, (n, 2), 0, limits)

    def window(image: jax.Array, offset: jax.Array) -> jax.Array:
        return lax.dynamic_slice(image, (offset[0], offset[1], 0), (size, size, channels))

    return jax.vmap(window)(padded, offsets)


def mirror(images: Float[Array, "n h w c"], which: Bool[Array, " n"]) -> Float[Array, "n h w c"]:
    """Mirrors ``which`` of the images left to right."""
    return jnp.where(which[:, None, None, None], images[:, :, ::-1], images)


def alternate(key: jax.Array, indices: Int[Array, " n"], epoch: int | jax.Array) -> Bool[Array, " n"]:
    """Which images of a split are mirrored in ``epoch``: half of them, and in the next epoch the other half.

    An image's own coin, drawn once from ``key`` and its index, says whether it begins mirrored (arXiv:2404.00498,
    section 3.6): two epochs show each image both ways, where independent draws repeat a view half of the time.
    """
    coins = jax.vmap(lambda index: jax.random.bits(jax.random.fold_in(key, index)))(indices)
    return (coins + jnp.asarray(epoch).astype(coins.dtype)) % 2 == 1


def random_erasing(key: jax.Array, images: Float[Array, "n h w c"], probability: float) -> Float[Array, "n h w c"]:
    """A rectangle of each image set to 0, the mean colour of normalised images, with ``probability``.

    As torchvision's ``RandomErasing`` (arXiv:1708.04896): 2 to 33 % of the area, height to width 0.3 to 3.3, ten draws of
    which the first that is smaller than the image is taken, none where none is.
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
    """Each image as a share of itself and the rest of its partner, targets alike (arXiv:1710.09412).

    One share for the batch, from Beta(alpha, alpha); the partners are the batch in reverse order, as in timm.
    """
    share = jax.random.beta(key, alpha, alpha, dtype=images.dtype)
    return tuple(share * x + (1 - share) * x[::-1] for x in (images, targets))  # type: ignore[return-value]


def cutmix(
    key: jax.Array, images: Float[Array, "n h w c"], targets: Float[Array, "n k"], alpha: float
) -> tuple[Float[Array, "n h w c"], Float[Array, "n k"]]:
    """A rectangle of each image's partner pasted at its place, targets by area (arXiv:1905.04899, algorithm A1).

    One rectangle for the batch: its area is the rest that Beta(alpha, alpha) leaves, its centre anywhere, what lies
    outside the image cut off; the partners are the batch in reverse order, as in timm.
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
    """Which pixels lie in rows ``[top, bottom)`` and columns ``[left, right)``."""
    rows, columns = jnp.arange(height), jnp.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return in_rows[:, :, None] & in_columns[:, None, :]


def random_resized_crop(
    key: jax.Array, images: Float[Array, "n h w c"], size: int, min_area: float = 0.08
) -> Float[Array, "n s s c"]:
    """A window of ``min_area`` to 100 % of each image's area and aspect ratio 3/4 to 4/3, scaled to ``size`` x ``size``.

    As torchvision: ten draws, the first window that fits in the image; else the whole of a square image.
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
