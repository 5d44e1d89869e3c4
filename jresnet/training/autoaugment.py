"""TrivialAugment, RandAugment and colour jitter on batches, on the device.

The operations are those of the same names in ``torchvision.transforms.functional`` for floating-point tensors, on pixels
from 0 to 255 without rounding in between. Each image has its own operation. All geometric operations share one bilinear
sampling, and all blending operations one blend, so that a batch costs a few passes, whichever operations are drawn.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness",
    "posterize", "solarize", "autocontrast", "equalize", "invert", "solarize_add",
)  # fmt: skip
NUMBER = {name: i for i, name in enumerate(OPERATIONS)}
GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue in a grey level: ITU-R BT.601, rounded as in torchvision
BINS = 31  # magnitudes of TrivialAugment (arXiv:2103.10158, table 1)
LEVELS = 10.0  # largest magnitude of RandAugment, as in timm
SPREAD = 0.5  # standard deviation of RandAugment's magnitudes: timm's mstd0.5
LAYERS = 2  # number of consecutive operations, each applied with probability 1/2, as in timm's RandAugment


def trivial_augment(key: jax.Array, images: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Applies one operation with a uniformly drawn strength to each image: torchvision's ``TrivialAugmentWide``.

    Args:
        key: random key.
        images: pixels from 0 to 255; pixels that move in from outside are black.
    """
    n = len(images)
    op_key, bin_key, sign_key = jax.random.split(key, 3)
    ops = jax.random.randint(op_key, (n,), 0, NUMBER["invert"])  # all operations before "invert"
    strength = jax.random.randint(bin_key, (n,), 0, BINS) / (BINS - 1)
    signed = jnp.where(jax.random.bernoulli(sign_key, 0.5, (n,)), -strength, strength)
    values = _by_operation(
        ops,
        shear_x=0.99 * signed, shear_y=0.99 * signed, rotate=135 * signed,
        translate_x=jnp.trunc(32 * signed), translate_y=jnp.trunc(32 * signed),
        brightness=1 + 0.99 * signed, color=1 + 0.99 * signed, contrast=1 + 0.99 * signed, sharpness=1 + 0.99 * signed,
        posterize=8 - jnp.round(6 * strength), solarize=255 * (1 - strength),
    )  # fmt: skip
    return operate(images, ops, values, jnp.zeros(images.shape[-1]))


def rand_augment(
    key: jax.Array, images: Float[Array, "n h w c"], magnitude: float, fill: Float[Array, " c"]
) -> Float[Array, "n h w c"]:
    """RandAugment (arXiv:1909.13719): two of 15 operations, each with probability 1/2, as ``rand-mM-mstd0.5-inc1`` in timm.

    Args:
        key: random key.
        images: pixels from 0 to 255.
        magnitude: 0 to 10; the magnitude of each operation is normally distributed around it.
        fill: colour of pixels that move in from outside.
    """
    n, height, width, _ = images.shape
    for layer in jax.random.split(key, LAYERS):
        op_key, coin_key, level_key, sign_key = jax.random.split(layer, 4)
        ops = jax.random.randint(op_key, (n,), 1, len(OPERATIONS))
        level = jnp.clip(magnitude + SPREAD * jax.random.normal(level_key, (n,)), 0, LEVELS) / LEVELS
        signed = jnp.where(jax.random.bernoulli(sign_key, 0.5, (n,)), -level, level)
        enhanced = jnp.maximum(1 + 0.9 * signed, 0.1)
        values = _by_operation(
            ops,
            shear_x=0.3 * signed, shear_y=0.3 * signed, rotate=30 * signed,
            translate_x=0.45 * width * signed, translate_y=0.45 * height * signed,
            brightness=enhanced, color=enhanced, contrast=enhanced, sharpness=enhanced,
            posterize=4 - jnp.floor(4 * level), solarize=256 - jnp.floor(256 * level),
            solarize_add=jnp.floor(110 * level),
        )  # fmt: skip
        ops = jnp.where(jax.random.bernoulli(coin_key, 0.5, (n,)), ops, NUMBER["identity"])
        images = operate(images, ops, values, fill)
    return images


def color_jitter(key: jax.Array, images: Float[Array, "n h w c"], strength: float) -> Float[Array, "n h w c"]:
    """Scales brightness, contrast and saturation by factors from 1 - strength to 1 + strength, in random order.

    As torchvision's ``ColorJitter(strength, strength, strength)``; order and factors are drawn for each image.
    """
    n = len(images)
    order_key, factor_key = jax.random.split(key)
    kinds = jnp.array([NUMBER[name] for name in ("brightness", "contrast", "color")])
    orders = kinds[jnp.argsort(jax.random.uniform(order_key, (n, 3)), axis=1)]
    factors = jax.random.uniform(factor_key, (n, 3), minval=max(0.0, 1 - strength), maxval=1 + strength)
    for place in range(3):
        images = _blended(images, orders[:, place], factors[:, place])
    return images


def operate(
    images: Float[Array, "n h w c"], ops: Int[Array, " n"], values: Float[Array, " n"], fill: Float[Array, " c"]
) -> Float[Array, "n h w c"]:
    """Applies its operation to each image.

    Args:
        images: pixels from 0 to 255.
        ops: indices into ``OPERATIONS``.
        values: the argument of torchvision's function: translation in pixels, angle in degrees, tangent of a shear, factor,
            number of bits to keep, level from which pixels are inverted, or the value added to pixels below 128.
        fill: colour of pixels that move in from outside.
    """
    value, op = values[:, None, None, None], ops[:, None, None, None]

    def among(*names: str) -> jax.Array:
        return jnp.isin(op, jnp.array([NUMBER[name] for name in names]))

    step = 2.0 ** (8 - value)
    low, high = images.min((1, 2), keepdims=True), images.max((1, 2), keepdims=True)
    spread = jnp.where(high > low, (images - low) * (255 / jnp.where(high > low, high - low, 1)), images)
    return jnp.select(
        [
            among("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
            among("brightness", "color", "contrast", "sharpness"),
            among("posterize"),
            among("solarize") & (images >= value),
            among("autocontrast"),
            among("equalize"),
            among("invert"),
            among("solarize_add") & (images < 128),
        ],
        [
            _moved(images, ops, values, fill),
            _blended(images, ops, values),
            jnp.floor(images / step) * step,
            255 - images,
            spread,
            jax.vmap(jax.vmap(_equalized, -1, -1))(images),
            255 - images,
            jnp.minimum(images + value, 255),
        ],
        images,
    )


def _by_operation(ops: Int[Array, " n"], **values: jax.Array) -> Float[Array, " n"]:
    """Selects each image's value by its operation; 0 for operations without a value."""
    return jnp.select([ops == NUMBER[name] for name in values], list(values.values()), 0.0)


def _blended(
    images: Float[Array, "n h w c"], ops: Int[Array, " n"], factors: Float[Array, " n"]
) -> Float[Array, "n h w c"]:
    """Blends each image with black, its grey version, its mean grey or its blurred version; factor 1 is the image itself."""
    op = ops[:, None, None, None]
    grey = images @ jnp.array(GREY)[:, None] if images.shape[-1] == 3 else images
    other = jnp.select(
        [op == NUMBER[name] for name in ("color", "contrast", "sharpness")],
        [jnp.broadcast_to(grey, images.shape), jnp.broadcast_to(grey.mean((1, 2, 3), keepdims=True), images.shape),
         _blurred(images)],
        0.0,
    )  # fmt: skip
    return jnp.clip(other + factors[:, None, None, None] * (images - other), 0, 255)


def _blurred(images: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Pillow's SMOOTH filter: a 3x3 mean with weight 5 for the centre; edge pixels are not changed."""
    height, width = images.shape[1:3]
    total = 4 * images[:, 1:-1, 1:-1]
    for y in range(3):
        for x in range(3):
            total += images[:, y : height - 2 + y, x : width - 2 + x]
    return images.at[:, 1:-1, 1:-1].set(total / 13)


def _equalized(levels: Float[Array, "h w"]) -> Float[Array, "h w"]:
    """Histogram equalisation of one channel; levels are truncated to integers."""
    whole = jnp.clip(levels, 0, 255).astype(jnp.int32)
    counts = jnp.zeros(256, jnp.int32).at[whole].add(1)
    last = counts[255 - jnp.argmax(counts[::-1] > 0)]
    step = (counts.sum() - last) // 255
    table = (jnp.cumsum(counts) + step // 2) // jnp.maximum(step, 1)
    table = jnp.clip(jnp.concatenate([jnp.zeros(1, table.dtype), table[:-1]]), 0, 255)
    return jnp.where(step == 0, levels, table[whole].astype(levels.dtype))


def _moved(
    images: Float[Array, "n h w c"], ops: Int[Array, " n"], values: Float[Array, " n"], fill: Float[Array, " c"]
) -> Float[Array, "n h w c"]:
    """Shears about the upper left corner, translates, or rotates about the centre, with bilinear sampling."""
    n, height, width, channels = images.shape
    angle = jnp.where(ops == NUMBER["rotate"], values, 0.0) * (math.pi / 180)
    shear_x, shear_y, right, down = (
        jnp.where(ops == NUMBER[name], values, 0.0)[:, None, None]
        for name in ("shear_x", "shear_y", "translate_x", "translate_y")
    )
    cos, sin = jnp.cos(angle)[:, None, None], jnp.sin(angle)[:, None, None]
    # The source position of each output pixel. Pixel centres are at half-integers.
    y, x = jnp.mgrid[0:height, 0:width].astype(images.dtype) + 0.5
    cx, cy = x - width / 2, y - height / 2
    source_x = cos * cx - sin * cy + width / 2 + shear_x * y - right - 0.5
    source_y = sin * cx + cos * cy + height / 2 + shear_y * x - down - 0.5
    left, top = jnp.floor(source_x), jnp.floor(source_y)
    flat, total = (images - fill).reshape(n, height * width, channels), jnp.zeros_like(images)
    for below in (0, 1):
        for beside in (0, 1):
            at_x, at_y = left + beside, top + below
            weight = (1 - jnp.abs(source_x - at_x)) * (1 - jnp.abs(source_y - at_y))
            inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
            place = jnp.clip(at_y, 0, height - 1) * width + jnp.clip(at_x, 0, width - 1)
            found = jax.vmap(lambda row, index: row[index])(flat, place.astype(jnp.int32).reshape(n, -1))
            total += jnp.where(inside, weight, 0.0)[..., None] * found.reshape(images.shape)
    return total + fill
