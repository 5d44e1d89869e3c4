"""Dilated convolution at stride 1, and its two gradients.

On a CPU, a convolution of dilation d, padded by a multiple of d, is computed as d x d ordinary ones, each on the pixels of
one phase (row and column modulo d), because pixels of different phases do not interact. The phases are stacked as images of
one batch and use :mod:`jresnet.kernels.conv`, also for their gradients. XLA's CPU compiler would compute the kernel's
gradient of a dilated convolution pixel by pixel. Other platforms use XLA's implementation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jresnet.kernels import conv
from jresnet.kernels.platforms import known

convolve_plainly = partial(conv.convolve_plainly, stride=1)
input_gradient_plainly = partial(conv.input_gradient_plainly, stride=1)
kernel_gradient_plainly = partial(conv.kernel_gradient_plainly, stride=1)


# CPU implementations by phases ---------------------------------------------------------------------------------------


def _convolve_on_cpu(x: jax.Array, kernel: jax.Array, *, devices: int, **how: Any) -> jax.Array:
    if not _by_phases(x.shape, kernel.shape, devices, **how):
        return convolve_plainly(x, kernel, **how)
    d = how["dilation"]
    y = conv.convolution(_phases(x, d), kernel, **_of_a_phase(**how))
    return _together(y, d, _output(x.shape, kernel.shape, how))


def _input_gradient_on_cpu(
    dy: jax.Array, kernel: jax.Array, *, shape: tuple[int, ...], devices: int, **how: Any
) -> jax.Array:
    if not _by_phases(shape, kernel.shape, devices, **how):
        return input_gradient_plainly(dy, kernel, shape=shape, **how)
    d = how["dilation"]
    phases = jax.eval_shape(lambda x: _phases(x, d), jax.ShapeDtypeStruct(shape, dy.dtype)).shape
    dx = conv.input_gradient(_gradients(dy, shape, kernel.shape, how), kernel, shape=phases, **_of_a_phase(**how))
    return _together(dx, d, shape[1:3])


def _kernel_gradient_on_cpu(
    x: jax.Array, dy: jax.Array, *, shape: tuple[int, ...], devices: int, **how: Any
) -> jax.Array:
    if not _by_phases(x.shape, shape, devices, **how):
        return kernel_gradient_plainly(x, dy, shape=shape, **how)
    phases = _phases(x, how["dilation"]), _gradients(dy, x.shape, shape, how)
    return conv.kernel_gradient(*phases, shape=shape, **_of_a_phase(**how))


def _by_phases(
    shape: tuple[int, ...], kernel: tuple[int, ...], devices: int, *, dilation: int, padding: int, **_: Any
) -> bool:
    # With several devices, XLA partitions the batch.
    if devices > 1 or not known(*shape) or padding % dilation:
        return False
    # The output of each phase must have at least one pixel, even if all pixels of the phase are padding.
    return all(-(-size // dilation) + 2 * (padding // dilation) >= kernel[0] for size in shape[1:3])


def _of_a_phase(*, dilation: int, padding: int, **how: Any) -> dict[str, Any]:
    return how | {"stride": 1, "padding": padding // dilation}


def _output(shape: tuple[int, ...], kernel: tuple[int, ...], how: dict[str, Any]) -> tuple[int, ...]:
    """The height and width of the output."""
    return tuple(size + 2 * how["padding"] - how["dilation"] * (kernel[0] - 1) for size in shape[1:3])


def _phases(x: jax.Array, d: int) -> jax.Array:
    """Splits [N, H, W, C] into phases [d d N, ceil(H / d), ceil(W / d), C], padded with zeros, one phase after the other."""
    n, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -height % d), (0, -width % d), (0, 0)))
    x = x.reshape(n, x.shape[1] // d, d, x.shape[2] // d, d, channels)
    return x.transpose(2, 4, 0, 1, 3, 5).reshape(n * d * d, x.shape[1], x.shape[3], channels)


def _together(x: jax.Array, d: int, size: tuple[int, ...]) -> jax.Array:
    """The inverse of :func:`_phases`, cropped to ``size``."""
    n, height, width, channels = x.shape
    x = x.reshape(d, d, n // d**2, height, width, channels).transpose(2, 3, 0, 4, 1, 5)
    return x.reshape(n // d**2, height * d, width * d, channels)[:, : size[0], : size[1]]


def _gradients(dy: jax.Array, shape: tuple[int, ...], kernel: tuple[int, ...], how: dict[str, Any]) -> jax.Array:
    """Splits the output's gradients into phases, padded to the size that :func:`_convolve_on_cpu` has before cropping."""
    d = how["dilation"]
    whole = [d * (-(-size // d) + 2 * (how["padding"] // d) - kernel[0] + 1) for size in shape[1:3]]
    lacking = [length - size for length, size in zip(whole, dy.shape[1:3], strict=True)]
    return _phases(jnp.pad(dy, ((0, 0), (0, lacking[0]), (0, lacking[1]), (0, 0))), d)


convolution, input_gradient, kernel_gradient = conv.each_others_transposes(
    "dilated_", (convolve_plainly, _convolve_on_cpu), (input_gradient_plainly, _input_gradient_on_cpu),
    (kernel_gradient_plainly, _kernel_gradient_on_cpu),
)  # fmt: skip


def convolve_dilated(x: jax.Array, kernel: jax.Array, dilation: int, padding: int, groups: int = 1) -> jax.Array:
    """Convolves ``[N, H, W, C]`` with ``[k, k, C // groups, D]`` at stride 1 to ``[N, H', W', D]``.

    ``H' = H + 2 padding - dilation (k - 1)``. Both arguments and the result have the same dtype. As PyTorch's ``conv2d``
    with ``dilation``.
    """
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return convolution(x, kernel, dilation=dilation, padding=padding, groups=groups, precision=precision)
