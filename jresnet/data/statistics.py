"""Mean and standard deviation of each data set's pixels, and how images are normalised by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Mean and standard deviation, by channel, of the training images' pixels in [0, 1]; ImageNet's are torchvision's.
STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "digits": ((0.3055, 0.3055, 0.3055), (0.3240, 0.3240, 0.3240)),
}


def normalise(
    images: Float[Array, "n h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "n h w c"]:
    """Grey levels 0 to 255 -> (x / 255 - mean) / std, by channel."""
    return (images / 255 - jnp.array(mean, images.dtype)) / jnp.array(std, images.dtype)
