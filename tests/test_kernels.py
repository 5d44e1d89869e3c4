"""The kernels against the lines of ``jax.lax`` that they stand for: values, derivatives, platforms, devices."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomise
from flax import nnx

import jresnet
from jresnet import kernels
from jresnet.kernels import add_relu, conv, convolve, global_average_pool, max_pool, norm, relu, scheduling
from jresnet.models import resnet, zoo


def plainly(x, kernel, stride: int, padding: int, groups: int) -> jax.Array:
    return conv.convolve_plainly(x, kernel, stride=stride, padding=padding, groups=groups)


@partial(jax.jit, static_argnums=0)
def with_gradients(function, upstream, *arguments):
    """What a function of arrays gives, and its gradients: one program, which compiles faster than its operations alone."""
    y, back = jax.vjp(function, *arguments)
    return y, *back(upstream)


def max_pool_plainly(x) -> jax.Array:
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


# Every row of the table in kernels/conv.py: 1x1, all ways of shifting, the stem, small outputs, odd sizes, large strides.
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
        ((2, 26, 25, 4), 5, 2, 3, 0, 1),
        ((2, 27, 30, 4), 5, 5, 3, 1, 1),
        ((6, 4, 4, 8), 5, 3, 1, 1, 1),
        ((5, 13, 14, 8), 5, 3, 2, 1, 1),
        ((3, 11, 12, 4), 5, 5, 3, 1, 1),
        ((2, 9, 9, 4), 5, 3, 1, 0, 1),
        ((2, 9, 9, 4), 5, 1, 1, 1, 1),
    ],
)
def test_a_convolutions_gradients(shape, out: int, kernel: int, stride: int, padding: int, groups: int) -> None:
    with jax.enable_x64(True):
        draw = np.random.default_rng(shape[0])
        x, k = draw.standard_normal(shape), draw.standard_normal((kernel, kernel, shape[-1] // groups, out))
        options = (stride, padding, groups)
        upstream = draw.standard_normal(jax.eval_shape(lambda x, k: plainly(x, k, *options), x, k).shape)
        found, expected = (
            with_gradients(lambda x, k, f=f: f(x, k, *options), upstream, x, k) for f in (convolve, plainly)
        )
        for ours, wanted in zip(found, expected, strict=True):
            assert ours.dtype == wanted.dtype
            np.testing.assert_allclose(ours, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding"),
    [
        ((4, 1, 1, 8), 3, 1, 1),
        ((4, 1, 1, 8), 3, 2, 1),
        ((4, 2, 2, 8), 3, 1, 1),
        ((5, 2, 2, 8), 3, 2, 1),
        ((5, 4, 2, 3), 3, 1, 1),
        ((3, 2, 3, 3), 3, 2, 1),
        ((3, 6, 5, 3), 7, 2, 3),
        ((3, 3, 2, 3), 3, 1, 2),
    ],
)
def test_an_image_of_fewer_pixels_than_the_kernel_has_taps(shape, kernel: int, stride: int, padding: int) -> None:
    options = (stride, padding, 1)
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        x, k = (jnp.asarray(draw.standard_normal(size)) for size in (shape, (kernel, kernel, shape[-1], 5)))
        y, back = jax.vjp(lambda x, k: plainly(x, k, *options), x, k)
        dy = jnp.asarray(draw.standard_normal(y.shape))
        wanted = (y, *back(dy))

        def found(x, k, dy):
            y, back = jax.vjp(lambda x, k: convolve(x, k, *options), x, k)
            return y, *back(dy)

        program = jax.jit(found).lower(x, k, dy)
        assert "stablehlo.convolution" not in program.as_text()
        for ours, right in zip(program.compile()(x, k, dy), wanted, strict=True):
            assert ours.dtype == right.dtype
            np.testing.assert_allclose(ours, right, rtol=1e-10, atol=1e-10)
        constant = jax.jit(lambda x: convolve(x, k, *options))
        np.testing.assert_allclose(constant(x), y, rtol=1e-10, atol=1e-10)
        assert "stablehlo.convolution" not in constant.lower(x).as_text()


@pytest.mark.parametrize("constant", [False, True])
def test_winograds_algorithm_is_for_some_convolutions_alone(constant: bool) -> None:
    def taken(shape=(8, 14, 14, 64), kernel=(3, 3, 64, 64), stride=1, padding=1, groups=1, dtype=jnp.float32) -> bool:
        k = jnp.ones(kernel, dtype)
        convolution = jax.jit(lambda x, k=k: convolve(x, k, stride, padding, groups))
        described = [jax.ShapeDtypeStruct(shape, dtype), *([] if constant else [k])]
        return "stablehlo.convolution" not in convolution.lower(*described).as_text()

    assert taken()
    assert not taken(shape=(8, 14, 14, 32), kernel=(3, 3, 32, 32)), "few channels"
    assert not taken(kernel=(3, 3, 64, 128)), "more channels than come"
    assert not taken(shape=(1, 7, 7, 64)), "few windows"
    assert not taken(shape=(128, 3, 3, 64)), "a window larger than the image"
    assert not taken(stride=2)
    assert not taken(padding=0)
    assert not taken(kernel=(3, 3, 64, 128), shape=(8, 14, 14, 128), groups=2)
    assert not taken(kernel=(1, 1, 64, 64))
    assert not taken(dtype=jnp.bfloat16)
    one = jax.ShapeDtypeStruct((8, 14, 14, 64), jnp.float32)
    assert conv._winograd_pays(one, (3, 3, 64, 64), 1, 1, 1, 1)
    assert not conv._winograd_pays(one, (3, 3, 64, 64), 1, 1, 1, 2), "several devices"


@pytest.mark.parametrize("constant", [False, True])
def test_winograds_algorithm_has_the_convolutions_derivatives(constant: bool) -> None:
    draw = np.random.default_rng(0)
    x, dx, dy = (jnp.asarray(draw.standard_normal((4, 14, 14, 64)), jnp.float32) for _ in range(3))
    k, dk = (jnp.asarray(draw.standard_normal((3, 3, 64, 64)), jnp.float32) for _ in range(2))
    primals, tangents = ((x,), (dx,)) if constant else ((x, k), (dx, dk))
    found = []
    for f in (convolve, plainly):
        jitted = jax.jit(lambda x, k=k, f=f: f(x, k, 1, 1, 1))
        found.append((*jax.vjp(jitted, *primals)[1](dy), jax.jvp(jitted, primals, tangents)[1]))
    for ours, wanted in zip(*found, strict=True):
        assert distance(ours, wanted) < 1e-5
    each = jax.jit(jax.vmap(lambda one: convolve(one[None], k, 1, 1, 1)[0]))
    assert "stablehlo.convolution" not in each.lower(x).as_text(), "images that vmap gives are a batch"
    assert distance(each(x), plainly(x, k, 1, 1, 1)) < 1e-5


@pytest.mark.as_users_do
def test_winograds_algorithm_is_as_near_to_float64_as_a_direct_sum() -> None:
    draw = np.random.default_rng(0)
    x, dy = (draw.standard_normal((6, 14, 13, 64)) for _ in range(2))
    k = draw.standard_normal((3, 3, 64, 64))

    def gradients(x, k, dy, function=convolve):
        return jax.vjp(lambda x, k: function(x, k, 1, 1, 1), x, k)[1](dy)

    with jax.enable_x64(True):
        exact = gradients(x, k, dy, plainly)
    narrow = [jnp.asarray(a, jnp.float32) for a in (x, k, dy)]
    program = jax.jit(gradients).lower(*narrow)
    assert "stablehlo.convolution" not in program.as_text()
    for ours, direct, wanted in zip(
        program.compile()(*narrow), jax.jit(partial(gradients, function=plainly))(*narrow), exact, strict=True
    ):
        assert ours.dtype == jnp.float32
        assert 0 < distance(ours, wanted) <= 4 * distance(direct, wanted)


def test_a_convolutions_gradients_under_vmap_and_jit() -> None:
    draw = np.random.default_rng(0)
    x, k = (draw.standard_normal(s).astype(np.float32) for s in ((6, 16, 16, 8), (2, 3, 3, 8, 5)))

    def gradient(function):
        return jax.grad(lambda k: jnp.square(function(x, k, 1, 1, 1)).sum())

    batched = jax.jit(jax.vmap(gradient(convolve)))(k)
    np.testing.assert_allclose(batched, [gradient(plainly)(one) for one in k], rtol=1e-3)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_piece_fits_the_cache_and_the_devices(devices: int) -> None:
    for batch, most in ((128, 8), (128, 9), (128, 0), (96, 10**6), (97, 8), (1, 1)):
        images = conv._images_in_a_piece(batch, most, devices)
        assert batch % images == 0
        assert images % (devices if batch % devices == 0 else 1) == 0
        assert images <= most or images in (1, devices)


@pytest.mark.parametrize(("batch", "size"), [(16, 16), (256, 4)])
def test_a_bfloat16_kernels_gradient_is_summed_in_float32(batch: int, size: int) -> None:
    """4,096 summands of 1.0: bfloat16 cannot count beyond 256."""
    x, k = jnp.ones((batch, size, size, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 2), jnp.bfloat16)
    gradient = jax.grad(lambda k: convolve(x, k, 1, 1, 1).astype(jnp.float32).sum())(k)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient[1, 1], np.float32), np.full((2, 2), 4096.0))


def test_the_pieces_of_a_bfloat16_kernels_gradient_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 pieces of 64.0: bfloat16 stays at 16,384."""
    monkeypatch.setattr(conv, "PIECE", 1)
    x, k = jnp.ones((300, 8, 8, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 2), jnp.bfloat16)
    gradient = jax.grad(lambda k: convolve(x, k, 1, 1, 1).astype(jnp.float32).sum())(k)
    np.testing.assert_array_equal(np.asarray(gradient[1, 1], np.float32), np.full((2, 2), 19200.0))


@pytest.mark.as_users_do
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_a_bfloat16_kernels_gradient_is_right_to_its_rounding(kernel: int) -> None:
    draw = np.random.default_rng(0)
    x, k, dy = (
        draw.standard_normal(s).astype(jnp.bfloat16) for s in ((32, 16, 16, 8), (kernel, kernel, 8, 4), (32, 16, 16, 4))
    )
    gradients = []
    for dtype, function in ((jnp.bfloat16, convolve), (jnp.float64, plainly)):
        with jax.enable_x64(dtype == jnp.float64):
            back = jax.vjp(lambda x, k, f=function: f(x, k, 1, kernel // 2, 1), x.astype(dtype), k.astype(dtype))[1]
            gradients.append(np.asarray(back(jnp.asarray(dy, dtype))[1], np.float64))
    ours, wanted = gradients
    assert np.linalg.norm(ours - wanted) <= 2**-8 * np.linalg.norm(wanted)


@pytest.mark.as_users_do
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_average_of_a_fused_networks_last_stage(dtype) -> None:
    """jax 0.12.0.1 makes NaN of it where it is written as a mean."""
    draw = np.random.default_rng(0)
    x, k = (jnp.asarray(draw.standard_normal(s) / 5, dtype) for s in ((4, 8, 8, 64), (3, 3, 64, 64)))

    def last(x, k):
        return relu(convolve(relu(convolve(x, k, 1, 1, 1)), k, 1, 1, 1))

    found = jax.jit(lambda x, k: global_average_pool(last(x, k)))(x, k)
    assert found.dtype == jnp.float32
    expected = np.asarray(jax.jit(last)(x, k)).astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-3)  # fused, the last stage may stay unrounded


def test_the_global_average_and_its_derivatives() -> None:
    with jax.enable_x64(True):
        x, dx = np.random.default_rng(0).standard_normal((2, 3, 7, 5, 4))
        y, dy = jax.jvp(jax.jit(global_average_pool), (x,), (dx,))
        np.testing.assert_allclose(y, x.mean((1, 2)), rtol=1e-12)
        np.testing.assert_allclose(dy, dx.mean((1, 2)), rtol=1e-12)
        upstream = np.arange(12.0).reshape(3, 4)
        (found,) = jax.vjp(jax.jit(global_average_pool), x)[1](upstream)
        np.testing.assert_allclose(found, np.broadcast_to(upstream[:, None, None] / 35, x.shape), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8, 8, 5), (2, 7, 9, 4), (1, 9, 8, 3), (2, 1, 2, 3)])
def test_a_max_pools_gradient(shape, dtype) -> None:
    """Of small whole numbers, so that most windows have several maxima, and the sums are exact."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        x = jnp.asarray(draw.integers(-2, 3, shape), dtype)
        upstream = jnp.asarray(draw.integers(-9, 10, jax.eval_shape(max_pool_plainly, x).shape), dtype)
        found, expected = (with_gradients(f, upstream, x) for f in (max_pool, max_pool_plainly))
        for ours, wanted in zip(found, expected, strict=True):
            assert ours.dtype == dtype
            np.testing.assert_array_equal(ours, wanted)


def test_a_max_pools_gradient_inside_jit_and_vmap() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 8, 3)), jnp.float32)
    gradient, *others = (
        jax.grad(lambda x, f=f: jnp.square(f(x)).sum())(x)
        for f in (max_pool_plainly, jax.jit(max_pool), jax.vmap(lambda one: max_pool(one[None])[0]))
    )
    for other in others:
        np.testing.assert_array_equal(other, gradient)


def test_a_max_pool_shows_every_nan() -> None:
    x = jnp.zeros((1, 8, 8, 1)).at[0, 2, 5, 0].set(jnp.nan)
    for y in (max_pool(x), jax.vjp(max_pool, x)[0]):
        np.testing.assert_array_equal(y, max_pool_plainly(x))
        assert jnp.isnan(y).sum() == 2


def test_a_max_pool_has_both_derivatives() -> None:
    """Of windows with several maxima, too: of the first, as XLA's."""
    draw = np.random.default_rng(0)
    x, direction = (jnp.asarray(draw.integers(-2, 3, (2, 7, 8, 3)), jnp.float32) for _ in range(2))
    for mode in (jax.vjp, lambda f, x: (f(x), lambda upstream: jax.jvp(f, (x,), (direction,))[1])):
        found, expected = (mode(jax.jit(f), x)[1](jnp.ones_like(f(x))) for f in (max_pool, max_pool_plainly))
        for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(ours, wanted)
    np.testing.assert_array_equal(jax.vmap(lambda one: max_pool(one[None])[0])(x), max_pool_plainly(x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_relu_and_its_gradient(dtype) -> None:
    x = jnp.asarray([-jnp.inf, -2.0, -0.0, 0.0, 1e-3, 3.0, jnp.inf], dtype)
    assert relu(x).dtype == dtype
    np.testing.assert_array_equal(relu(x), jax.nn.relu(x))
    gradient = jax.grad(lambda x: relu(x).sum())(x)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, jnp.asarray([0, 0, 0, 0, 1, 1, 1], dtype))
    assert jnp.isnan(relu(jnp.asarray([jnp.nan], dtype))).all()


def plain(x, scale, bias, eps):
    mean = x.mean((0, 1, 2))
    var = jnp.square(x - mean).mean((0, 1, 2))
    return (x - mean) / jnp.sqrt(var + eps) * scale + bias, mean, var


ABOUT = 0.1  # the guess at the mean of those that have one near 0


def normalise(x, scale, bias, eps, about=ABOUT):
    return kernels.normalise(x, scale, bias, jnp.full(x.shape[-1], about, jnp.float32), eps)


def test_a_normalisation_and_its_gradients() -> None:
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        x = 3 * draw.standard_normal((5, 7, 6, 4)) + 1000
        scale, bias, upstream = draw.standard_normal(4), draw.standard_normal(4), draw.standard_normal(x.shape)
        found, expected = (f(x, scale, bias, 1e-5) for f in (normalise, plain))
        for ours, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=1e-10, atol=1e-10)
        gradients = [jax.vjp(lambda *a, f=f: f(*a, 1e-5)[0], x, scale, bias)[1](upstream) for f in (normalise, plain)]
        for ours, wanted in zip(*gradients, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.as_users_do
@pytest.mark.parametrize("about", [0.0, 999.0])
def test_a_variance_in_one_pass_is_right_about_a_mean_that_is_near(about: float) -> None:
    """What an accelerator computes, in float32; the mean is 1,000 deviations from 0, as no BatchNorm's input is."""
    draw = np.random.default_rng(0)
    x = (draw.standard_normal((8, 14, 14, 16)) + 1000).astype(np.float32)
    wanted = x.astype(np.float64).var((0, 1, 2))
    found = np.asarray(norm._variance(jnp.asarray(x), jnp.asarray(x), jnp.full(16, about, jnp.float32), narrow=False))
    error = np.abs(found / wanted - 1).max()
    assert error < 1e-4 if about else error > 1e-4, "about 0 it cancels"


@pytest.mark.as_users_do
def test_a_normalisation_of_bfloat16_takes_its_statistics_in_float32() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 9, 9, 3)), jnp.bfloat16)
    y, mean, var = normalise(x, jnp.ones(3), jnp.zeros(3), 1e-5)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(mean, x.astype(jnp.float32).mean((0, 1, 2)), rtol=1e-5, atol=1e-7)
    gradients = jax.grad(lambda *a: normalise(*a, 1e-5)[0].sum(), (0, 1, 2))(x, jnp.ones(3), jnp.zeros(3))
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]


@pytest.mark.as_users_do
@pytest.mark.parametrize("height", [1, 5, 7, 8, 9, 11, 12, 16, 28])
def test_a_normalisation_of_bfloat16_and_its_gradients(height: int) -> None:
    """Rows are summed in stretches, of which every height has its own number."""
    draw = np.random.default_rng(height)
    x, upstream = (draw.standard_normal((4, height, 6, 3)).astype(jnp.bfloat16) for _ in range(2))
    scale, bias = draw.standard_normal(3).astype(np.float32), draw.standard_normal(3).astype(np.float32)
    none = jnp.zeros(3), jnp.zeros(3)  # for the statistics
    (y, *statistics), dx, *small = with_gradients(
        lambda *a: normalise(*a, 1e-5), (jnp.asarray(upstream), *none), jnp.asarray(x), scale, bias
    )
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in (x, scale, bias)]
        none = jnp.zeros(3), jnp.zeros(3)
        expected, *wanted = with_gradients(lambda *a: plain(*a, 1e-5), (np.asarray(upstream, np.float64), *none), *wide)
    for ours, theirs in zip([*statistics, *small], [*expected[1:], *wanted[1:]], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in ((y, expected[0]), (dx, wanted[0])):  # half a unit in the last place of bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=2**-8, atol=1e-5)


def step_of(model: jresnet.ResNet, x: jax.Array, options: dict):
    """A compiled function: parameters and statistics -> gradients and new statistics, and its arguments."""
    graph, *state = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss(params, stats, x):
        model = nnx.merge(graph, params, stats, copy=True)
        return jnp.square(model(x, train=True)).mean(), nnx.state(model, nnx.BatchStat)

    jitted = jax.jit(jax.grad(loss, has_aux=True), compiler_options=options)
    return jitted.lower(*state, x).compile(), (*state, x)


def distance(found, exact) -> float:
    """Relative L2 distance of two trees."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    ]
    return sum(np.square(a - b).sum() for a, b in pairs) ** 0.5 / sum(np.square(b).sum() for _, b in pairs) ** 0.5


NETWORKS = {  # every kind of layer that there is, at depths that do not multiply rounding errors
    "basic": jresnet.ResNetConfig("basic", (1, 1), (16, 32), 10, stem="cifar", shortcut="pad"),
    "bottleneck": jresnet.ResNetConfig("bottleneck", (1, 1), (64, 128), 10),
    "grouped": jresnet.ResNetConfig("bottleneck", (1, 1), (64, 128), 10, groups=32, width_per_group=4),
}


@pytest.mark.as_users_do
@pytest.mark.parametrize(
    ("network", "dtype"),
    [
        ("bottleneck", None),
        pytest.param("grouped", None, marks=pytest.mark.long),
        pytest.param("basic", jnp.bfloat16, marks=pytest.mark.long),
    ],
)
def test_programs_of_our_compiler_options_are_as_right_as_the_defaults(network: str, dtype) -> None:
    """Both beside float64, in training and fused for inference: whichever jax is installed must be fit for its options.

    Of three networks' steps the median counts: in one of ten or so a ReLU's input is so near 0 that rounding decides its
    gradient, by either's options, which is then off by a hundredth.
    """
    choices = {"default": {}, "ours": jresnet.compiler_options()}
    ratios, logits = [], {}
    for seed in range(3):
        model = jresnet.ResNet(NETWORKS[network], dtype=dtype, rngs=nnx.Rngs(seed))
        randomise(model)
        x = jax.random.normal(jax.random.key(seed), (4, 32, 32, 3))
        if seed == 0:
            programs = {name: step_of(model, x, options)[0] for name, options in choices.items()}
        state = nnx.split(model, nnx.Param, nnx.BatchStat)[1:]
        found = {}
        for name, options in choices.items():
            found[name] = programs[name](*state, x)
            if seed == 0:
                predict = jax.jit(jresnet.fuse(model), compiler_options=options).lower(x).compile()
                # Weights that are constants are packed when oneDNN's convolutions are compiled, not in every call.
                packed = '"weights_prepacked":true' in predict.as_text()
                assert packed == ("__onednn$convolution" in predict.as_text())
                logits[name] = predict(x)
        with jax.enable_x64(True):
            wide = jresnet.ResNet(NETWORKS[network], rngs=nnx.Rngs(0))
            nnx.update(wide, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), nnx.state(model)))
            x = jnp.asarray(x, jnp.float64)
            if seed == 0:
                exactly = step_of(wide, x, {})[0]
                right = jresnet.fuse(wide)(x)
            exact = exactly(*nnx.split(wide, nnx.Param, nnx.BatchStat)[1:], x)
        ours, its = ([distance(a, b) for a, b in zip(found[name], exact, strict=True)] for name in ("ours", "default"))
        assert min(its) > 0
        ratios.append([a / b for a, b in zip(ours, its, strict=True)])
    assert max(np.median(ratios, 0)) <= 3  # of gradients, of statistics
    assert distance(logits["ours"], right) <= 3 * distance(logits["default"], right)


@pytest.mark.as_users_do
@pytest.mark.parametrize("stride", [1, 2])
def test_onednn_takes_an_inputs_gradient_in_the_dtype_of_the_forward_pass(stride: int) -> None:
    """bfloat16 where the CPU has it. oneDNN gets no kernel that is a reverse; XLA would convert everything to float32."""
    x, dy = (jnp.zeros((2, size, size, 64), jnp.bfloat16) for size in (16, 16 // stride))
    kernel = jnp.zeros((3, 3, 64, 64), jnp.float32)

    def forward(x, kernel):
        return convolve(x, kernel.astype(x.dtype), stride, 1, 1)

    def gradient(x, kernel, dy):
        return jax.vjp(lambda x: forward(x, kernel), x)[1](dy)

    def dtypes(function, *arguments) -> set[str]:
        program = jax.jit(function, compiler_options=jresnet.compiler_options()).lower(*arguments).compile().as_text()
        return set(re.findall(r"= \((\w+)\[.*__onednn\$convolution", program))

    assert dtypes(gradient, x, kernel, dy) == dtypes(forward, x, kernel)


@pytest.mark.as_users_do
def test_no_chain_of_blocks_is_computed_anew() -> None:
    """In training a sum of residuals is not computed from all blocks before it wherever it is read; XLA may repeat one."""
    deep = dataclasses.replace(NETWORKS["basic"], depths=(8, 1))
    train, _ = step_of(
        jresnet.ResNet(deep, rngs=nnx.Rngs(0)), jnp.zeros((4, 32, 32, 3)), jresnet.compiler_options(remat=True)
    )
    rectified = len(re.findall(r" maximum\(", train.as_text()))
    assert rectified <= 3 * 19  # nineteen ReLUs; without the barrier there are more than 200


@pytest.mark.as_users_do
def test_a_block_in_evaluation_adds_where_its_input_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes less memory, and which oneDNN's convolutions, where there are any, do themselves."""
    model, x = (
        jresnet.ResNet(dataclasses.replace(NETWORKS["bottleneck"], depths=(3, 1)), rngs=nnx.Rngs(0)),
        (8, 64, 64, 3),
    )
    temporary = []
    for function in (add_relu, lambda y, shortcut: relu(y + shortcut)):
        monkeypatch.setattr(resnet, "add_relu", function)
        jitted = jax.jit(jresnet.fuse(model), compiler_options=jresnet.compiler_options())
        program = jitted.lower(jax.ShapeDtypeStruct(x, jnp.float32)).compile()
        temporary.append(program.memory_analysis().temp_size_in_bytes)
    assert temporary[0] < temporary[1]


@pytest.mark.parametrize(("batch", "pieces", "images"), [(8, None, 8), (9, 2, 5), (16, 2, 8), (17, 3, 6), (20, 4, 5)])
def test_a_fused_network_takes_a_batch_in_pieces(
    batch: int, pieces, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the cache holds, or so few less that the last piece has none to fill up."""
    model = jresnet.ResNet(NETWORKS["bottleneck"], rngs=nnx.Rngs(0))
    randomise(model)
    fused, x = jresnet.fuse(model), jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    monkeypatch.setattr(scheduling, "BATCH_PIECE", 8 * 8 * 8 * 256 * 4)  # eight images: the first stage is 8 x 8 x 256
    program = jax.jit(lambda x: fused(x)).lower(x)
    text = program.as_text()
    assert (f"tensor<{pieces}x{images}x32x32x3xf32>" in text) == (pieces is not None)
    if batch in (9, 17):  # the last piece is filled up by one image, or is whole
        whole = jax.jit(model)(x)
        np.testing.assert_allclose(program.compile()(x), whole, rtol=1e-4, atol=1e-4)
    if batch == 9:
        assert distance(jax.jit(jax.vmap(fused))(x[None])[0], whole) < 1e-5
        derivatives = (jax.jit(jax.grad(lambda x, f=f: jnp.square(f(x)).sum()))(x) for f in (fused, model))
        assert distance(*derivatives) < 1e-5
    monkeypatch.setattr(scheduling.lax, "map", None)
    if batch == 9:
        fused(x), model(x)  # outside jit
    jax.jit(lambda x: model(x)).lower(x)  # not fused: its gradient may be asked


def test_bfloat16_takes_twice_as_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = jresnet.fuse(jresnet.ResNet(NETWORKS["bottleneck"], dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    monkeypatch.setattr(scheduling, "BATCH_PIECE", 8 * 8 * 8 * 256 * 4)
    text = jax.jit(lambda x: fused(x)).lower(jax.ShapeDtypeStruct((32, 32, 32, 3), jnp.float32)).as_text()
    assert "tensor<2x16x32x32x3xf32>" in text


@pytest.mark.as_users_do
def test_remat_saves_memory_and_computes_the_same() -> None:
    """Without the options XLA's CPU compiler merges what is computed again with what was computed before."""
    config = jresnet.ResNetConfig("basic", (5,), (16,), 10, stem="cifar")
    temporary, outcomes = {}, {}
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
        for remat in (False, True):
            model = jresnet.ResNet(config, remat=remat, rngs=nnx.Rngs(0))
            randomise(model)
            nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), nnx.state(model)))
            function, arguments = step_of(model, x, jresnet.compiler_options(remat))
            temporary[remat] = function.memory_analysis().temp_size_in_bytes
            outcomes[remat] = function(*arguments)
    assert distance(outcomes[True], outcomes[False]) < 1e-10
    assert temporary[True] < 0.6 * temporary[False]


def ours(x, k):
    """Every kernel that a training step has, in a function whose derivatives are not constant."""
    y, mean, var = normalise(convolve(x, k, 1, 1), jnp.arange(1.0, 9.0), jnp.ones(8), 1e-5)
    y = add_relu(y, x) * mean + var
    return jnp.square(global_average_pool(relu(convolve(max_pool(y), k, 2, 1)))).sum()


def theirs(x, k):
    y = plainly(x, k, 1, 1, 1)
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    y = (y - mean) / jnp.sqrt(var + 1e-5) * jnp.arange(1.0, 9.0) + 1
    y = jax.nn.relu(y + x) * mean + var
    return jnp.square(jax.nn.relu(plainly(max_pool_plainly(y), k, 2, 1, 1)).mean((1, 2))).sum()


USES = {
    "value": lambda f, x, k: f(x, k),
    "grad": lambda f, x, k: jax.grad(f, (0, 1))(x, k),
    "jvp": lambda f, x, k: jax.jvp(f, (x, k), (jnp.sin(x), jnp.cos(k)))[1],
    "Hessian-vector product": lambda f, x, k: jax.jvp(jax.grad(f, (0, 1)), (x, k), (jnp.sin(x), jnp.cos(k)))[1],
    "reverse over forward": lambda f, x, k: jax.grad(lambda k: jax.jvp(lambda x: f(x, k), (x,), (jnp.sin(x),))[1])(k),
    "grad of grad": lambda f, x, k: jax.grad(lambda x: jnp.square(jax.grad(f, 1)(x, k)).sum())(x),
    "vmap over images": lambda f, x, k: jax.vmap(lambda one: f(one, k))(jnp.stack([x, x + 1])),
    "vmap of grad": lambda f, x, k: jax.vmap(jax.grad(f, 1), (0, None))(jnp.stack([x, x + 1]), k),
    "vmap over kernels": lambda f, x, k: jax.vmap(jax.grad(f, 1), (None, 0))(x, jnp.stack([k, 2 * k])),
    "remat": lambda f, x, k: jax.grad(jax.checkpoint(f), (0, 1))(x, k),
}


@pytest.mark.parametrize(
    ("use", "jitted"),
    [
        *((use, True) for use in USES),
        *(pytest.param(use, False, marks=[] if use in ("value", "jvp") else [pytest.mark.long]) for use in USES),
    ],
)
def test_every_derivative_is_that_of_plain_jax(use: str, jitted: bool) -> None:
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        x, k = jnp.asarray(draw.standard_normal((2, 9, 8, 8))), jnp.asarray(draw.standard_normal((3, 3, 8, 8)))
        found = (jax.jit if jitted else lambda f: f)(lambda x, k: USES[use](ours, x, k))(x, k)
        expected = jax.jit(lambda x, k: USES[use](theirs, x, k))(x, k)
        assert distance(found, expected) < 1e-9
        assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))


def operations(text: str) -> dict[str, int]:
    return {name: text.count(f"stablehlo.{name}") for name in ("convolution", "while", "case", "optimization_barrier")}


def train(model: jresnet.ResNet):
    """The gradient of a training step, as a function of the parameters and images."""
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss(params, x):
        return jnp.square(nnx.merge(graph, params, stats, copy=True)(x, train=True)).mean()

    return jax.grad(loss), params


@pytest.mark.parametrize(
    ("config", "convolutions", "platform"),
    [
        *(
            (NETWORKS["bottleneck"], 1 + 2 * (3 + 1), platform) for platform in ("cuda", "tpu")
        ),  # both blocks have shortcuts
        (zoo.configure("resnet50"), 53, "cuda"),
    ],
)
def test_a_program_for_another_platform_holds_plain_convolutions(
    config: jresnet.ResNetConfig, convolutions: int, platform: str
) -> None:
    """Traced and lowered on this host, whose CPU would have loops, barriers, and Winograd's algorithm instead of some."""
    x = jax.ShapeDtypeStruct((32, 224, 224, 3), jnp.float32)
    model = jresnet.ResNet(config, rngs=nnx.Rngs(0))
    for network in (model, jresnet.fuse(model)):
        text = jax.export.export(jax.jit(network), platforms=[platform])(x).mlir_module()
        assert operations(text) == {"convolution": convolutions, "while": 0, "case": 0, "optimization_barrier": 0}
    lowered = jax.jit(network).trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert operations(lowered)["convolution"] == convolutions
    here = operations(jax.jit(jresnet.fuse(model)).lower(x).as_text())
    assert here["while"] > 0, "pieces of the batch"
    assert here["convolution"] < convolutions, "Winograd's algorithm for some"


def test_a_training_step_for_another_platform_holds_plain_convolutions() -> None:
    gradient, params = train(jresnet.ResNet(NETWORKS["bottleneck"], rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((32, 224, 224, 3), jnp.float32)
    found = operations(jax.export.export(jax.jit(gradient), platforms=["cuda"])(params, x).mlir_module())
    # Each has two gradients, but for the first, whose images have none.
    assert found == {"convolution": 9 + 8 + 9, "while": 0, "case": 0, "optimization_barrier": 0}


def test_a_program_for_two_platforms_chooses_when_it_runs() -> None:
    model, x = jresnet.create("resnet20_cifar"), jnp.ones((2, 32, 32, 3))
    exported = jax.export.export(jax.jit(model), platforms=["cpu", "cuda"])(x)
    np.testing.assert_allclose(exported.call(x), model(x), rtol=1e-4, atol=1e-5)
    assert operations(exported.mlir_module())["case"] > 0


@pytest.mark.parametrize(
    ("network", "platform"),
    [
        pytest.param("basic", "cpu", marks=pytest.mark.long),
        ("basic", "cuda"),
        ("bottleneck", "cpu"),
        ("bottleneck", "cuda"),
    ],
)
def test_a_program_for_images_of_any_number_and_size(network: str, platform: str) -> None:
    n, height, width = jax.export.symbolic_shape("n, h, w")
    model = jresnet.ResNet(NETWORKS[network], rngs=nnx.Rngs(0))
    gradient, params = train(model)
    free, batch = (n, height, width, 3), (n, 32, 32, 3)  # of a strided convolution JAX has no gradient for a free size
    for function, more, shape in ((model, (), free), (jresnet.fuse(model), (), free), (gradient, (params,), batch)):
        described = jax.ShapeDtypeStruct(shape, jnp.float32)
        exported = jax.export.export(jax.jit(function), platforms=[platform])(*more, described)
        if platform == "cpu":
            size = (35, 32) if shape == free else (32, 32)
            images = jax.random.normal(jax.random.key(0), (3, *size, 3))
            assert distance(exported.call(*more, images), jax.jit(function)(*more, images)) < 1e-4


@pytest.mark.as_users_do
def test_the_precision_of_matrix_products_is_that_of_where_it_was_traced() -> None:
    x = jnp.ones((1, 8, 8, 8))

    def function(x, k):
        with jax.default_matmul_precision("highest"):
            return convolve(x, k, 1, 1)

    text = jax.jit(function).trace(x, jnp.ones((3, 3, 8, 8))).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("precision HIGHEST") == 2  # of both operands


def test_it_passes_jaxs_strictness() -> None:
    """Each switch that Flax's own layers pass."""
    model = jresnet.ResNet(dataclasses.replace(NETWORKS["bottleneck"], depths=(1,), widths=(64,)), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    gradient, params = train(model)
    fused = jresnet.fuse(model)
    for switch in (
        lambda: jax.numpy_rank_promotion("raise"), lambda: jax.numpy_dtype_promotion("strict"), jax.checking_leaks,
        lambda: jax.enable_x64(True),
    ):  # fmt: skip
        with switch():  # asked while JAX traces
            jax.jit(lambda p, x: gradient(p, x)).lower(params, x)
            jax.jit(lambda x: fused(x)).lower(x)
    for switch in (lambda: jax.debug_nans(True), jax.disable_jit):
        with switch():
            jax.jit(lambda p, x: gradient(p, x))(params, x)
            jax.jit(lambda x: fused(x))(x)
