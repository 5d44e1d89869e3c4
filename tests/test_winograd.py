"""Winograd's algorithm against XLA's convolution and its gradients: exact in float64, as near as it in float32."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jresnet.kernels import conv, winograd


def direct(x, k):
    return conv.convolve_plainly(x, k, stride=1, padding=1, groups=1)


def drawn(shape):
    """x, kernel and the output's gradient, float64."""
    draw = np.random.default_rng(shape[1])
    return (draw.standard_normal(s) for s in (shape, (3, 3, shape[-1], shape[-1]), shape))


SHAPES = ((6, 8, 8, 5), (6, 7, 10, 4), (4, 10, 7, 6), (3, 5, 5, 3), (2, 1, 4, 3), (5, 2, 3, 2))
PIECES = (1, 6_000, 2**30)  # an image at a time, some, all


def cases() -> list[Any]:
    """Each shape with one piece, the first with each; all with all: pytest -m long."""
    short = {(shape, PIECES[i % 3]) for i, shape in enumerate(SHAPES)} | {(SHAPES[0], piece) for piece in PIECES}
    pairs = itertools.product(SHAPES, PIECES)
    return [pytest.param(*pair, marks=[] if pair in short else [pytest.mark.long]) for pair in pairs]


@pytest.mark.parametrize(("shape", "piece"), cases())
def test_it_is_the_convolution_with_its_gradients(shape, piece: int) -> None:
    with jax.enable_x64(True):
        x, k, dy = map(jnp.asarray, drawn(shape))
        known = np.asarray(k)  # a constant, whose transform is numpy's

        @jax.jit
        def both(x: jax.Array, k: jax.Array, dy: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
            y, back = jax.vjp(direct, x, k)
            dx, dk = back(dy)
            return (
                (winograd.convolve(x, winograd.transformed(k), piece), y),
                (winograd.convolve(x, winograd.transformed(known), piece), y),
                (winograd.input_gradient(dy, k, piece), dx),
                (winograd.kernel_gradient(x, dy, piece), dk),
            )

        for found, expected in both(x, k, dy):
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.as_users_do
@pytest.mark.parametrize("shape", [(8, 14, 14, 64), (4, 15, 13, 128), (16, 8, 8, 96)])
def test_it_rounds_as_the_convolution_does(shape) -> None:
    x, k, dy = drawn(shape)
    with jax.enable_x64(True):
        y, back = jax.vjp(direct, x, k)
        exact = [np.asarray(a) for a in (y, *back(dy))]

    def ours(x, k, dy):
        return (
            winograd.convolve(x, winograd.transformed(k), 2**20),
            winograd.input_gradient(dy, k, 2**20),
            winograd.kernel_gradient(x, dy, 2**20),
        )

    def its(x, k, dy):
        y, back = jax.vjp(direct, x, k)
        return y, *back(dy)

    narrow = [jnp.asarray(a, jnp.float32) for a in (x, k, dy)]
    for found, theirs, right in zip(jax.jit(ours)(*narrow), jax.jit(its)(*narrow), exact, strict=True):
        errors = [np.linalg.norm(np.asarray(a, np.float64) - right) for a in (found, theirs)]
        assert 0 < errors[0] <= 4 * errors[1]


def test_images_are_taken_in_divisors_of_the_batch() -> None:
    for number, most, expected in ((12, 5, 4), (12, 12, 12), (12, 100, 12), (7, 3, 1), (1, 0, 1), (128, 0, 1)):
        assert winograd.largest_divisor(number, most) == expected
