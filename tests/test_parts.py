"""timm's parts without PyTorch: how they are lowered, and what they are at the edges."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jresnet
from jresnet import kernels
from jresnet.models.layers import Conv
from jresnet.models.parts import GroupNorm, SqueezeExcite, eca_length, squeezed_channels

CONFIG = jresnet.ResNetConfig(
    "basic", (1, 1), (64, 64), 5, stem="deep", stem_channels=128, shortcut="average", attention="se", antialias="blur"
)


@pytest.fixture(scope="module")
def lowered() -> dict[str, str]:
    """The program of a fused network of four images by platform, the weights as its constants."""
    model = jresnet.fuse(jresnet.ResNet(CONFIG, rngs=nnx.Rngs(0)))
    traced = jax.jit(lambda x: model(x)).trace(jnp.zeros((4, 64, 64, 3)))
    return {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda")}


def test_a_program_for_a_gpu_has_its_convolutions_as_they_are(lowered: dict[str, str]) -> None:
    convolutions = [
        module for _, module in nnx.iter_modules(jresnet.ResNet(CONFIG, rngs=None)) if isinstance(module, Conv)
    ]
    assert lowered["cuda"].count("stablehlo.convolution(") == len(convolutions) == 13
    assert "stablehlo.while" not in lowered["cuda"]


def test_on_a_cpu_parts_go_the_fast_ways(lowered: dict[str, str]) -> None:
    """Where a filter has the stride, the convolution has none, and goes by Winograd's algorithm as others do.

    Filters are sums: no convolution has as many groups as channels.
    """
    left = re.findall(r"stablehlo.convolution\(.*", lowered["cpu"])
    # Four have 64 channels, 64 outputs and no stride: the stem's second one, and both blocks' but the first of all.
    assert len(left) == 13 - 4
    assert not [line for line in left if not re.search(r"feature_group_count = 1 ", line)]


FREE = {
    "blur": CONFIG,
    "average": jresnet.ResNetConfig(
        ("basic", "bottleneck"), (1, 1), (16, 16), 5, stem="deep_tiered", stem_channels=16, shortcut="average",
        attention="eca", antialias="average",
    ),
    "group": jresnet.ResNetConfig(
        "basic", (1, 2), (32, 32), 5, stem="deep_conv", stem_channels=64, shortcut="projection_3x3", norm="group"
    ),
}  # fmt: skip


@pytest.mark.parametrize("network", FREE)
def test_a_program_for_images_of_any_number_and_size(network: str) -> None:
    n, height, width = jax.export.symbolic_shape("n, 8*h, 8*w" if network == "average" else "n, h, w")
    model = jresnet.fuse(jresnet.ResNet(FREE[network], rngs=nnx.Rngs(0)))
    exported = jax.export.export(jax.jit(lambda x: model(x)))(jax.ShapeDtypeStruct((n, height, width, 3), jnp.float32))
    for shape in ((1, 32, 48, 3), (3, 40, 24, 3) if network == "average" else (3, 35, 41, 3)):
        images = jax.random.normal(jax.random.key(0), shape)
        np.testing.assert_allclose(exported.call(images), model(images), rtol=1e-4, atol=1e-5)


def test_averages_of_odd_sizes() -> None:
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    np.testing.assert_array_equal(kernels.average_halves(x)[0, :, :, 0], [[3, 5]])
    np.testing.assert_array_equal(kernels.average_pairs(x)[0, :, :, 0], [[3, 5, 6.5], [10.5, 12.5, 14]])
    np.testing.assert_array_equal(kernels.average_same(x)[0, 2, :, 0], [5.25, 5.75, 6.25, 6.75, 3.5])


def test_a_blur_keeps_what_is_even() -> None:
    x = jnp.full((2, 7, 4, 3), 5.0)
    for function, shape in ((kernels.blur, (2, 4, 2, 3)), (kernels.blur_dense, x.shape)):
        np.testing.assert_array_equal(function(x), np.full(shape, 5.0))
    np.testing.assert_array_equal(kernels.max_pool_dense(-x), -x)


def test_bfloat16_stays() -> None:
    x = jnp.ones((1, 4, 4, 32), jnp.bfloat16)
    conv = partial(Conv, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    for layer in (kernels.blur, kernels.average_pairs, GroupNorm(32), SqueezeExcite(32, conv)):
        assert layer(x).dtype == jnp.bfloat16


def test_sizes_of_attention() -> None:
    assert [squeezed_channels(n, 16) for n in (64, 128, 256, 320)] == [8, 8, 16, 24]
    assert [eca_length(n) for n in (64, 256, 512, 1024, 2048)] == [3, 5, 5, 5, 7]
