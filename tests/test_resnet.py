"""Layers and model, by properties that need no PyTorch; tests/parity compares with it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomise
from flax import nnx

import jresnet
from jresnet.kernels import max_pool
from jresnet.models.layers import BatchNorm, Conv, Linear, kaiming_normal


@pytest.fixture(scope="module")
def model() -> jresnet.ResNet:
    model = jresnet.create("resnet20_cifar")
    randomise(model)
    return model


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_evaluation_is_the_default_and_changes_nothing(model: jresnet.ResNet) -> None:
    before = jax.tree.map(np.asarray, nnx.state(model))
    whole = model(images(4, 32, 32, 3))
    parts = jnp.concatenate([model(images(4, 32, 32, 3)[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-5)  # no image sees another one
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))


def test_training_moves_every_running_statistic_and_no_parameter(model: jresnet.ResNet) -> None:
    copy = nnx.clone(model)
    copy(images(4, 32, 32, 3), train=True)
    for (path, old), (_, new) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(copy)), strict=True
    ):
        changed = not np.array_equal(old[...], new[...])
        assert changed == (path[-1] in ("mean", "var")), path


def test_features_are_every_stage(model: jresnet.ResNet) -> None:
    found = {name: value.shape for name, value in model.features(images(2, 32, 32, 3)).items()}
    assert found == {
        "stem": (2, 32, 32, 16), "layer1": (2, 32, 32, 16), "layer2": (2, 16, 16, 32), "layer3": (2, 8, 8, 64),
    }  # fmt: skip


def test_any_size_of_image(model: jresnet.ResNet) -> None:
    assert model(images(1, 40, 24, 3)).shape == (1, 10)


def test_numpys_float64_is_taken_as_float32(model: jresnet.ResNet) -> None:
    x = images(2, 32, 32, 3)
    np.testing.assert_array_equal(model(x.astype(np.float64)), model(x))


@pytest.mark.parametrize("shape", [(32, 32, 3), (2, 3, 32, 32), (2, 32, 32, 1), (2, 32, 32, 3, 1)])
def test_other_shapes_are_refused(model: jresnet.ResNet, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected images \[N, H, W, 3\] \(channels last\), got shape \("):
        model(np.zeros(shape, np.float32))


def test_images_without_a_pixel_are_refused(model: jresnet.ResNet) -> None:
    with pytest.raises(ValueError, match=r"expected images of at least one pixel, got shape \(2, 0, 32, 3\)"):
        model(np.zeros((2, 0, 32, 3), np.float32))


def test_integer_images_are_refused(model: jresnet.ResNet) -> None:
    with pytest.raises(TypeError, match="normalised floating-point images, got uint8"):
        model(np.zeros((2, 32, 32, 3), np.uint8))


@pytest.mark.as_users_do
def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32() -> None:
    model = jresnet.create("resnet20_cifar", dtype=jnp.bfloat16)
    exact = jresnet.create("resnet20_cifar")
    x = images(8, 32, 32, 3)
    assert model.conv1(x).dtype == jnp.bfloat16
    assert model.features(x)["layer3"].dtype == jnp.bfloat16
    logits = model(x, train=True)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    # 8 bits of mantissa: 2^-9 a rounding, some 60 roundings deep
    expected = exact(x, train=True)
    error = float(jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected))
    assert 1e-4 < error < 0.06


@pytest.mark.as_users_do
def test_batchnorm_statistics_of_bfloat16_are_taken_in_float32() -> None:
    x = (images(64, 8, 8, 4) + 20).astype(jnp.bfloat16)
    norm = BatchNorm(4, momentum=1.0)
    norm(x, train=True)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(norm.mean[...], wide.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], wide.var((0, 1, 2), ddof=1), rtol=1e-5)


@pytest.mark.as_users_do
def test_batchnorm_survives_a_large_mean() -> None:
    x = images(32, 8, 8, 3) * 0.01 + 1000  # E[x²] - E[x]² would have no right digit
    wide, half = x.astype(np.float64), np.spacing(np.float32(1000)) / 2
    norm = BatchNorm(3, momentum=1.0)
    norm(x, train=True)
    # The nearest float32, not the rounding of a sum of two millions; its square is what the variance is off by.
    np.testing.assert_allclose(norm.mean[...], wide.mean((0, 1, 2)), rtol=0, atol=1.01 * half)
    np.testing.assert_allclose(norm.var[...], wide.var((0, 1, 2), ddof=1), rtol=half**2 / 1e-4 + 1e-6)


def test_momentum_weighs_the_newest_batch() -> None:
    norm = BatchNorm(2)
    norm(np.full((2, 2, 2, 2), 10.0, np.float32), train=True)
    np.testing.assert_allclose(norm.mean[...], 1.0, rtol=1e-6)  # 0.9 * 0 + 0.1 * 10
    np.testing.assert_allclose(norm.var[...], 0.9, rtol=1e-6)  # 0.9 * 1 + 0.1 * 0


def test_one_value_per_channel_cannot_be_normalised() -> None:
    with pytest.raises(ValueError, match=r"more than one value per channel, got activations of shape \(1, 1, 1, 2\)"):
        BatchNorm(2)(np.ones((1, 1, 1, 2), np.float32), train=True)


def test_max_pool_pads_with_minus_infinity() -> None:
    assert float(max_pool(jnp.full((1, 4, 4, 1), -5.0)).max()) == -5.0


def test_initialisation_is_pytorchs() -> None:
    kernel = kaiming_normal(jax.random.key(0), (3, 3, 256, 512))
    std = math.sqrt(2 / (9 * 512))
    assert float(kernel.std()) == pytest.approx(std, rel=5e-3)
    assert float(jnp.abs(kernel).max()) > 4.5 * std  # not truncated
    assert len(np.unique(kernel)) > 0.9 * kernel.size  # no block drawn twice
    head = Linear(400, 300, rngs=nnx.Rngs(0))
    for leaf in (head.kernel[...], head.bias[...]):
        assert float(jnp.abs(leaf).max()) == pytest.approx(1 / 20, rel=2e-2)
        assert float(leaf.std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=6e-2)
    conv = Conv(16, 512, 3, bias=True, rngs=nnx.Rngs(0))
    assert float(jnp.abs(conv.bias[...]).max()) == pytest.approx(1 / 12, rel=2e-2)


def test_seeds_make_models() -> None:
    one, same, other = (jresnet.create("resnet20_cifar", seed=seed).conv1.kernel[...] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("arch", ["resnet20_cifar", "resnet50"])
def test_zero_init_residual_makes_blocks_their_shortcuts(arch: str) -> None:
    model = jresnet.create(arch, zero_init_residual=True, stem="cifar")
    block = model.layer1[-1]
    x = jnp.abs(images(1, 8, 8, block.conv1.kernel.shape[2]))
    np.testing.assert_array_equal(block(x), x)
    norm = jresnet.create(arch).layer1[-1]
    assert not np.array_equal(norm(x), x)


def test_works_inside_nnx_and_jax_transforms(model: jresnet.ResNet) -> None:
    x = images(4, 32, 32, 3)
    expected = nnx.clone(model)
    expected(x, train=True)
    jitted = nnx.clone(model)
    nnx.jit(lambda model, x: model(x, train=True))(jitted, x)
    np.testing.assert_allclose(jitted.bn1.mean[...], expected.bn1.mean[...], rtol=1e-5)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    gradients = jax.jit(jax.grad(lambda params: (nnx.merge(graph, params, rest, copy=True)(x) ** 2).sum()))(params)
    assert all(bool(jnp.abs(leaf).max() > 0) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("graph_mode", [True, False])
def test_both_of_nnxs_modes(model: jresnet.ResNet, graph_mode: bool) -> None:
    """Flax means to make tree mode its default."""
    if not hasattr(nnx, "set_graph_mode"):
        pytest.skip("this Flax has graph mode alone")
    with nnx.set_graph_mode(graph_mode):
        logits = nnx.jit(lambda model, x: model(x))(model, images(2, 32, 32, 3))
    np.testing.assert_allclose(logits, model(images(2, 32, 32, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block": "bottlneck"}, "block must be 'basic' or 'bottleneck', or a tuple of these, got 'bottlneck'"),
        ({"stem": "imagnet"}, "stem must be 'imagenet' or 'cifar' or .*, got 'imagnet'"),
        ({"stride_in": "1x1"}, "stride_in '1x1' is for bottlenecks"),
        ({"shortcut": "B"}, "shortcut must be 'pad' or 'projection' or 'projection_first' or 'conv' or .*, got 'B'"),
        ({"block": ("basic", "bottleneck")}, "there are 2 blocks for 4 stages: give one for each"),
        ({"attention": "cbam"}, "attention must be 'se' or 'eca', got 'cbam'"),
        ({"reduction": 4}, "reduction 4 is for attention 'se', not None"),
        ({"antialias": "blur", "block": "bottleneck", "stride_in": "1x1"}, "antialias is for strides in the 3x3"),
        (
            {"antialias": "blur", "stem": "deep_conv"},
            "antialias is for a stem with a max-pool or none, not for 'deep_conv'",
        ),
        ({"stem": "deep", "stem_channels": 21}, "a deep stem's channels must be a multiple of 8, got 21"),
        ({"stem_channels": 0}, "stem_channels must be a whole number of at least 1, got 0"),
        ({"norm": "group", "widths": (32, 48, 64, 96)}, "GroupNorm needs multiples of 32 channels, got 48 in stage 2"),
        (
            {"norm": "group", "stem": "deep", "stem_channels": 32},
            "GroupNorm needs multiples of 32 channels, got 16 in the stem",
        ),
        ({"reduce_first": 2}, "reduce_first 2 is for bottlenecks"),
        ({"block": "bottleneck", "reduce_first": 3}, "stage 1 has 64 channels, which reduce_first 3 and groups 1 must"),
        ({"pruned": ((4, ((2, 2),)),)}, "pruned must be a tuple with an entry for each of 4 stages"),
        (
            {"pruned": ((4, ((2, 2),)),) * 4},
            r"pruned must be \(channels, .* with 2 pairs for stage 1, got \(4, \(\(2, 2",
        ),
        ({"depths": (2, 2, 2)}, "there are 3 depths and 4 widths"),
        ({"depths": [2, 2, 2, 2]}, r"depths must be a tuple of whole numbers of at least 1, got \[2, 2, 2, 2\]"),
        ({"widths": (64, 0, 256, 512)}, "widths must be a tuple of whole numbers of at least 1"),
        ({"num_classes": -1}, "num_classes must be a whole number of at least 0, got -1"),
        ({"in_channels": True}, "in_channels must be a whole number of at least 1, got True"),
        ({"groups": 32}, "groups 32 and width_per_group 64 are for bottlenecks"),
        ({"width_per_group": 128}, "groups 1 and width_per_group 128 are for bottlenecks"),
        ({"widths": (64, 32, 64, 64), "shortcut": "pad"}, "shortcut 'pad' needs widths that never fall"),
        ({"block": "bottleneck", "shortcut": "pad"}, "shortcut 'pad' is defined for basic blocks"),
        ({"block": "bottleneck", "widths": (8, 8, 8, 8), "width_per_group": 4}, "leaves a stage of 8 without channels"),
    ],
)
def test_a_configuration_checks_itself(changes: dict, words: str) -> None:
    values = {"block": "basic", "depths": (2, 2, 2, 2)} | changes
    with pytest.raises(jresnet.InputError, match=words):
        jresnet.ResNetConfig(**values)


def test_a_configuration_says_all_that_is_wrong_at_once() -> None:
    with pytest.raises(jresnet.InputError) as caught:
        jresnet.ResNetConfig("bottlneck", (2,), stem="x", num_classes=-1)  # type: ignore[arg-type]
    assert [part.split()[0] for part in str(caught.value).split("; ")] == ["block", "stem", "num_classes"]
