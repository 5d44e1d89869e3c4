"""``jresnet.fuse``: the same function without BatchNorm."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomise
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jresnet
from jresnet.errors import InputError
from jresnet.models import params, zoo
from jresnet.models.config import STEMS


def randomised(arch: str, **chosen) -> jresnet.ResNet:
    """A network whose BN parameters and statistics are drawn at random: default ones hide swaps."""
    model = jresnet.create(arch, **chosen)
    randomise(model)
    return model


@pytest.mark.parametrize(
    ("arch", "chosen"),
    [
        ("resnet18", {"stem": "cifar"}),
        ("resnet50", {}),
        ("resnext50_32x4d", {}),
        ("resnet20_cifar", {}),
        ("resnet18_d2l", {}),  # convolutions with biases, shortcuts without BN
        ("resnet34_projection", {}),
    ],
)
def test_a_fused_network_is_the_same_function(arch: str, chosen: dict) -> None:
    """In float64, of the first two stages; tests/parity/test_models.py has whole networks in float32."""
    row = zoo.find(arch).config
    config = dataclasses.replace(row, depths=(2, 1), widths=row.widths[:2], num_classes=10, **chosen)
    with jax.enable_x64(True):
        model = jresnet.ResNet(config, rngs=nnx.Rngs(0))
        randomise(model)
        graph, state = nnx.split(model)
        model = nnx.merge(graph, jax.tree.map(lambda value: jnp.asarray(value, jnp.float64), state))
        fused = jresnet.fuse(model)
        x = np.random.default_rng(1).standard_normal((2, 40, 36, model.config.in_channels))
        expected, found = np.asarray(model(x)), np.asarray(fused(x))
    assert expected.dtype == np.float64
    assert np.abs(expected).max() > 0.1  # something comes through
    assert np.linalg.norm(found - expected) <= 1e-12 * np.linalg.norm(expected)
    kinds = [type(module).__name__ for _, module in nnx.iter_modules(fused)]
    assert "BatchNorm" not in kinds


def test_the_model_that_was_given_stays_as_it_is() -> None:
    model = randomised("resnet20_cifar")
    before = {path: np.array(value) for path, value in params.arrays(model).items()}
    jresnet.fuse(model)
    after = params.arrays(model)
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path])


@pytest.mark.as_users_do
def test_a_fused_network_under_jit_and_in_bfloat16() -> None:
    model = randomised("resnet20_cifar")
    x = np.random.default_rng(1).standard_normal((4, 32, 32, 3)).astype(np.float32)
    expected = np.asarray(model(x))
    narrow = jresnet.fuse(params.fill(model.config, params.arrays(model), jnp.bfloat16))
    for fused, tolerance in ((jresnet.fuse(model), 1e-5), (narrow, 0.05)):
        graph, state = nnx.split(fused)
        found = jax.jit(lambda state, x, graph=graph: nnx.merge(graph, state)(x))(state, x)
        assert found.dtype == jnp.float32
        assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def test_what_a_fused_network_cannot_do(tmp_path: Path) -> None:
    fused = jresnet.fuse(jresnet.create("resnet20_cifar"))
    with pytest.raises(ValueError, match=r"train the model that was passed to jresnet.fuse"):
        fused(np.zeros((2, 32, 32, 3), np.float32), train=True)
    with pytest.raises(InputError, match=r"save the model that was passed to jresnet.fuse"):
        jresnet.save(tmp_path / "fused.safetensors", fused, "resnet20_cifar")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="already fused"):
        jresnet.fuse(fused)
    with pytest.raises(InputError, match=r"train the model that was passed to jresnet.fuse"):
        fused.train()


@st.composite
def configs(draw: st.DrawFn) -> jresnet.ResNetConfig:
    """Any network of few channels."""
    block, stages = draw(st.sampled_from(["basic", "bottleneck"])), draw(st.integers(1, 3))
    several = st.tuples(*[st.integers(1, 2)] * stages)
    bottleneck = block == "bottleneck"
    kinds = ["projection", "projection_first", "conv", "average", "projection_3x3", *([] if bottleneck else ["pad"])]
    shortcut = draw(st.sampled_from(kinds))
    stem, attention = draw(st.sampled_from(list(STEMS))), draw(st.sampled_from([None, "se", "eca"]))
    stride_in = draw(st.sampled_from(["3x3", "1x1"])) if bottleneck else "3x3"
    filtered = stride_in == "3x3" and STEMS[stem].pool != "conv"
    widths = tuple(16 * width for width in draw(several))
    return jresnet.ResNetConfig(
        block,
        draw(several),
        tuple(sorted(widths)) if shortcut == "pad" else widths,
        num_classes=draw(st.integers(1, 5)),
        in_channels=draw(st.integers(1, 4)),
        stem=stem,
        shortcut=shortcut,
        stride_in=stride_in,
        stem_channels=draw(st.sampled_from([None, 8, 16])),
        attention=attention,
        reduction=draw(st.sampled_from([None, 4])) if attention == "se" else None,
        antialias=draw(st.sampled_from([None, "blur", "average"])) if filtered else None,
        groups=draw(st.sampled_from([1, 2, 4])) if bottleneck else 1,
        width_per_group=draw(st.sampled_from([8, 64])) if bottleneck else 64,
        conv_bias=draw(st.booleans()),
    )


@settings(max_examples=4, deadline=None)
@given(configs())
def test_no_batchnorm_of_any_network_is_left_out(config: jresnet.ResNetConfig) -> None:
    nothing_is_left_out(config)


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(configs())
def test_no_batchnorm_of_many_networks_is_left_out(config: jresnet.ResNetConfig) -> None:
    nothing_is_left_out(config)


def nothing_is_left_out(config: jresnet.ResNetConfig) -> None:
    with jax.enable_x64(True):
        model = jresnet.ResNet(config, rngs=nnx.Rngs(0))
        randomise(model)
        graph, state = nnx.split(model)
        model = nnx.merge(graph, jax.tree.map(lambda value: jnp.asarray(value, jnp.float64), state))
        fused = jresnet.fuse(model)
        x = np.random.default_rng(1).standard_normal((2, 16, 16, config.in_channels))
        expected, found = np.asarray(model(x)), np.asarray(fused(x))
    assert not [module for _, module in nnx.iter_modules(fused) if type(module).__name__ == "BatchNorm"]
    assert np.linalg.norm(found - expected) <= 1e-12 * np.linalg.norm(expected)


def test_a_batchnorm_without_a_convolution_before_it_is_an_error() -> None:
    model = jresnet.create("resnet20_cifar")
    model.bn9 = nnx.clone(model.bn1)
    with pytest.raises(InputError, match="bn9 cannot be folded: there is no convolution before it"):
        jresnet.fuse(model)


def test_a_head_of_ones_own_stays() -> None:
    model = randomised("resnet20_cifar")
    model.fc = nnx.Linear(64, 7, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(jresnet.fuse(model))(x), model(x), rtol=1e-4, atol=1e-5)
