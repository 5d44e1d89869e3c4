"""The CPU's own gradients against JAX's, in float64, on the host's JAX alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jresnet import cpu
from jresnet.cpu import convolve, convolve_to_train, normalize_to_train
from jresnet.layers import global_average_pool


# Every row of the module's table: 1x1, both ways of shifting, the 7x7 stem, odd sizes, strides above the kernel.
@pytest.mark.parametrize(
    ("shape", "out", "kernel", "stride", "padding", "groups"),
    [
        ((1, 32, 32, 8), 6, 3, 1, 1, 1),
        ((40, 32, 32, 8), 6, 3, 1, 1, 1),
        ((6, 17, 16, 40), 8, 3, 1, 1, 1),
        ((7, 8, 8, 16), 6, 3, 1, 1, 1),
        ((40, 32, 32, 8), 6, 3, 1, 1, 2),
        ((4, 32, 32, 8), 6, 3, 2, 1, 1),
        ((4, 33, 31, 8), 6, 3, 2, 1, 1),
        ((2, 31, 32, 3), 6, 7, 2, 3, 1),
        ((4, 32, 31, 8), 6, 1, 2, 0, 1),
        ((4, 9, 8, 8), 6, 1, 1, 0, 1),
        ((2, 11, 10, 4), 5, 2, 3, 0, 1),
        ((2, 11, 12, 4), 5, 5, 3, 1, 1),
        ((2, 9, 9, 4), 5, 3, 1, 0, 1),
        ((2, 9, 9, 4), 5, 1, 1, 1, 1),
    ],
)
def test_a_convolutions_gradients(shape, out: int, kernel: int, stride: int, padding: int, groups: int) -> None:
    with jax.enable_x64(True):
        draw = np.random.default_rng(shape[0])
        x, k = draw.standard_normal(shape), draw.standard_normal((kernel, kernel, shape[-1] // groups, out))
        options = (stride, padding, groups)
        y = convolve(x, k, *options)
        np.testing.assert_array_equal(convolve_to_train(x, k, *options), y)
        upstream = draw.standard_normal(y.shape)
        found, expected = (
            jax.vjp(lambda x, k, f=f: f(x, k, *options), x, k)[1](upstream) for f in (convolve_to_train, convolve)
        )
        for ours, wanted in zip(found, expected, strict=True):
            assert ours.dtype == wanted.dtype
            np.testing.assert_allclose(ours, wanted, rtol=1e-9, atol=1e-9)


def test_a_convolutions_gradients_under_vmap_and_jit() -> None:
    draw = np.random.default_rng(0)
    x, k = (draw.standard_normal(s).astype(np.float32) for s in ((6, 16, 16, 8), (2, 3, 3, 8, 5)))

    def gradient(function):
        return jax.grad(lambda k: jnp.square(function(x, k, 1, 1, 1)).sum())

    batched = jax.jit(jax.vmap(gradient(convolve_to_train)))(k)
    np.testing.assert_allclose(batched, [gradient(convolve)(one) for one in k], rtol=1e-3)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_piece_fits_the_cache_and_the_devices(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    for batch, size in ((128, 2**19), (128, 2**30), (96, 100), (97, 2**19), (1, 1)):
        images = cpu._images_in_a_piece(batch, size)
        assert batch % images == 0
        assert images % (devices if batch % devices == 0 else 1) == 0
        assert images * size <= cpu.PIECE or images in (1, devices)


def test_a_bfloat16_kernels_gradient_is_summed_in_float32() -> None:
    """4,096 summands of 1.0: bfloat16 cannot count beyond 256."""
    x, k = jnp.ones((16, 16, 16, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 2), jnp.bfloat16)
    gradient = jax.grad(lambda k: convolve_to_train(x, k, 1, 1, 1).astype(jnp.float32).sum())(k)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient[1, 1], np.float32), np.full((2, 2), 4096.0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_average_of_a_fused_networks_last_stage(dtype) -> None:
    """jax 0.12.0.1 makes NaN of it where it is written as a mean."""
    draw = np.random.default_rng(0)
    x, k = (jnp.asarray(draw.standard_normal(s) / 5, dtype) for s in ((4, 8, 8, 64), (3, 3, 64, 64)))

    def last(x, k):
        return jax.nn.relu(convolve(jax.nn.relu(convolve(x, k, 1, 1, 1)), k, 1, 1, 1))

    found = jax.jit(lambda x, k: global_average_pool(last(x, k)))(x, k)
    assert found.dtype == jnp.float32
    expected = np.asarray(jax.jit(last)(x, k)).astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-3)  # fused, the last stage may stay unrounded


def plain(x, scale, bias, eps):
    mean = x.mean((0, 1, 2))
    var = jnp.square(x - mean).mean((0, 1, 2))
    return (x - mean) / jnp.sqrt(var + eps) * scale + bias, mean, var


def test_a_normalisation_and_its_gradients() -> None:
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        x = 3 * draw.standard_normal((5, 7, 6, 4)) + 1000
        scale, bias, upstream = draw.standard_normal(4), draw.standard_normal(4), draw.standard_normal(x.shape)
        found, expected = (f(x, scale, bias, 1e-5) for f in (normalize_to_train, plain))
        for ours, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=1e-10, atol=1e-10)
        gradients = [
            jax.vjp(lambda *a, f=f: f(*a, 1e-5)[0], x, scale, bias)[1](upstream) for f in (normalize_to_train, plain)
        ]
        for ours, wanted in zip(*gradients, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=1e-9, atol=1e-9)


def test_a_normalisation_of_bfloat16_takes_its_statistics_in_float32() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 9, 9, 3)), jnp.bfloat16)
    y, mean, var = normalize_to_train(x, jnp.ones(3), jnp.zeros(3), 1e-5)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(mean, x.astype(jnp.float32).mean((0, 1, 2)), rtol=1e-5, atol=1e-7)
    gradients = jax.grad(lambda *a: normalize_to_train(*a, 1e-5)[0].sum(), (0, 1, 2))(x, jnp.ones(3), jnp.zeros(3))
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
