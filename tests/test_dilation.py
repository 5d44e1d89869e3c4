"""``output_stride``: dilated convolutions in place of strides. tests/parity/test_dilation_torch.py compares with PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomise
from flax import nnx

import jresnet
from convert import flax2torch
from jresnet.kernels import convolve_dilated, dilated
from jresnet.models import params
from jresnet.pytorch import statedict
from jresnet.weights import native

BASIC = jresnet.ResNetConfig("basic", (1, 2, 1), (4, 8, 16), num_classes=3, stem="cifar", shortcut="pad")
BOTTLENECK = jresnet.ResNetConfig("bottleneck", (1, 1, 2, 1), (4, 8, 12, 16), 3, groups=2, width_per_group=32)


def model_of(config: jresnet.ResNetConfig, values: Any = None) -> jresnet.ResNet:
    """In float64, of random statistics."""
    model = jresnet.ResNet(config, rngs=nnx.Rngs(0))
    randomise(model)
    if values is not None:
        model = params.fill(config, values)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), nnx.state(model)))
    return model


def dilated_to(config: jresnet.ResNetConfig, output_stride: int) -> jresnet.ResNetConfig:
    return jresnet.models.zoo.replaced(config, output_stride=output_stride)


# --- The convolution.


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("size", "dilation", "padding", "kernel", "groups"),
    [
        ((7, 10), 2, 2, 3, 1),
        ((8, 8), 4, 4, 3, 1),
        ((5, 3), 4, 4, 3, 1),
        ((9, 13), 3, 3, 3, 2),
        ((17, 17), 8, 8, 3, 1),
        ((1, 2), 2, 2, 3, 1),
        ((11, 6), 2, 0, 3, 1),
        ((11, 6), 2, 4, 3, 1),
        ((9, 9), 2, 1, 3, 1),  # not by phases
        ((12, 9), 2, 4, 5, 1),
        ((12, 9), 3, 0, 1, 1),
    ],
)
def test_the_cpus_convolution_and_gradients_are_lax_own(
    size: tuple[int, int], dilation: int, padding: int, kernel: int, groups: int, devices: int
) -> None:
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        x = jnp.asarray(draw.standard_normal((2, *size, 4)))
        k = jnp.asarray(draw.standard_normal((kernel, kernel, 4 // groups, 6)))
        how = {"dilation": dilation, "padding": padding, "groups": groups, "precision": None}
        dy = jnp.asarray(draw.standard_normal(jax.eval_shape(lambda: dilated.convolve_plainly(x, k, **how)).shape))

        @jax.jit
        def both(x: jax.Array, k: jax.Array, dy: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
            return (
                (
                    dilated._convolve_on_cpu(x, k, devices=devices, **how),
                    dilated.convolve_plainly(x, k, **how),
                ),
                (
                    dilated._input_gradient_on_cpu(dy, k, shape=x.shape, devices=devices, **how),
                    dilated.input_gradient_plainly(dy, k, shape=x.shape, **how),
                ),
                (
                    dilated._kernel_gradient_on_cpu(x, dy, shape=k.shape, devices=devices, **how),
                    dilated.kernel_gradient_plainly(x, dy, shape=k.shape, **how),
                ),
            )

        for found, expected in both(x, k, dy):
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_transforms_of_the_convolution() -> None:
    """jit, grad of grad, jvp and vmap are those of the plain one, and a size may be a symbol."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        x, k = jnp.asarray(draw.standard_normal((3, 7, 6, 2))), jnp.asarray(draw.standard_normal((3, 3, 2, 4)))

        def ours(x: jax.Array, k: jax.Array) -> jax.Array:
            return (convolve_dilated(x, k, 2, 2) ** 3).sum()

        def plain(x: jax.Array, k: jax.Array) -> jax.Array:
            return (dilated.convolve_plainly(x, k, dilation=2, padding=2, groups=1) ** 3).sum()

        def slope(f: Any) -> Any:
            return lambda x, k: sum((part**2).sum() for part in jax.grad(f, (0, 1))(x, k))

        for of in (lambda f: f, lambda f: jax.grad(f, (0, 1)), lambda f: jax.grad(slope(f), (0, 1))):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10),
                jax.jit(of(ours))(x, k), of(plain)(x, k),
            )  # fmt: skip
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10),
            jax.jvp(ours, (x, k), (x, k)), jax.jvp(plain, (x, k), (x, k)),
        )  # fmt: skip
        stacked = jnp.stack([x, 2 * x])
        np.testing.assert_allclose(
            jax.vmap(ours, (0, None))(stacked, k), jax.vmap(plain, (0, None))(stacked, k), rtol=1e-10
        )
        np.testing.assert_allclose(
            jax.vmap(ours, (None, 0))(x, jnp.stack([k, 2 * k])), jax.vmap(plain, (None, 0))(x, jnp.stack([k, 2 * k]))
        )
        shape = jax.export.symbolic_shape("b, h, w, 2", constraints=["h >= 5", "w >= 5"])
        program = jax.export.export(jax.jit(lambda x: convolve_dilated(x, k, 2, 2)), platforms=["cpu", "cuda", "tpu"])(
            jax.ShapeDtypeStruct(shape, x.dtype)
        )
        np.testing.assert_allclose(program.call(x), convolve_dilated(x, k, 2, 2), rtol=1e-10)


def test_a_gpu_gets_the_convolution_as_it_is() -> None:
    traced = jax.jit(lambda x, k: convolve_dilated(x, k, 2, 2)).trace(jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4)))
    assert "rhs_dilate = [2, 2]" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "rhs_dilate = [2, 2]" not in traced.lower(lowering_platforms=("cpu",)).as_text()


# --- The network.


@pytest.mark.parametrize(
    ("config", "output_stride"),
    [
        (BASIC, 2),
        (BOTTLENECK, 4),
        pytest.param(BASIC, 1, marks=pytest.mark.long),
        pytest.param(BOTTLENECK, 16, marks=pytest.mark.long),
    ],
)
def test_every_other_pixel_of_dilated_features_is_the_strided_networks(
    config: jresnet.ResNetConfig, output_stride: int
) -> None:
    """The same parameters; where strides are left out there are pixels between, of which none is changed."""
    size = (32, 21)
    with jax.enable_x64(True):
        strided = model_of(config)
        model = model_of(dilated_to(config, output_stride), params.arrays(strided))
        x = np.random.default_rng(0).standard_normal((2, *size, 3))
        names = ["stem", *(name for name, _ in model._blocks())]
        expected, found = strided.features(x, names=names), model.features(x, names=names)
        stride = config.stem_stride
        for name in names:
            if name.endswith(".0") and name != "layer1.0":
                stride *= 2
            step = max(1, stride // output_stride)
            assert found[name].shape[1:3] == tuple(-(-n // min(stride, output_stride)) for n in size), name
            np.testing.assert_allclose(found[name][:, ::step, ::step], expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "config", [pytest.param(dilated_to(BASIC, 2), marks=pytest.mark.long), dilated_to(BOTTLENECK, 8)]
)
def test_fused_and_jitted_networks_are_the_same(config: jresnet.ResNetConfig) -> None:
    with jax.enable_x64(True):
        model = model_of(config)
        x = np.random.default_rng(0).standard_normal((3, 32, 25, 3))
        expected = model(x)
        for found in (jax.jit(jresnet.fuse(model))(x), jax.jit(model)(x)):
            np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_what_output_strides_there_are() -> None:
    config = jresnet.create("resnet50", num_classes=2, output_stride=16).config
    assert config.strides == ((1, 1), (2, 1), (2, 1), (1, 2))
    assert dilated_to(config, 8).strides == ((1, 1), (2, 1), (1, 2), (1, 4))
    assert dilated_to(config, 4).strides == ((1, 1), (1, 2), (1, 4), (1, 8))
    assert dilated_to(config, 32) == jresnet.models.zoo.configure("resnet50", num_classes=2)  # one way to say it
    assert jresnet.models.zoo.name_of(config) == "resnet50"
    for stem, value in (("imagenet", 12), ("imagenet", 64), ("imagenet", 2), ("imagenet", True), ("cifar", 16)):
        with pytest.raises(
            jresnet.InputError, match=r"output_stride must be (4 or 8 or 16 or 32|1 or 2 or 4 or 8) for 4 stages"
        ):
            jresnet.models.zoo.configure("resnet50", stem=stem, output_stride=value)


def test_native_files_keep_it(tmp_path: Path) -> None:
    path, plain = tmp_path / "dilated.safetensors", tmp_path / "plain.safetensors"
    model = jresnet.create("resnet20_cifar", output_stride=2)
    native.save(path, model, "resnet20_cifar")
    assert native.load(path).config == model.config
    assert jresnet.create(weights=path).config.output_stride == 2
    assert jresnet.create(weights=path, output_stride=4).config.output_stride is None
    jresnet.save(plain, jresnet.create("resnet20_cifar"))
    assert "output_stride" not in native.read_safetensors(plain)[1]["config"]  # as files were before there was one
    other = jresnet.create("resnet20_cifar", weights=plain, output_stride=1)  # any weights of the architecture will do
    assert other.config.output_stride == 1
    odd = jresnet.create("resnet20_cifar")
    odd.layer3[1].conv1.dilation = odd.layer3[1].conv1.padding = 2
    with pytest.raises(jresnet.InputError, match=r"layer3\.1\.conv1 has dilation 2"):
        jresnet.save(tmp_path / "odd.safetensors", odd)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_pytorchs_file_has_the_same_keys_and_a_note(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = jresnet.models.zoo.replaced(BASIC, output_stride=2)
    model = jresnet.ResNet(config, rngs=nnx.Rngs(0))
    same = params.fill(BASIC, params.arrays(model))
    assert statedict.state_dict(model).keys() == statedict.state_dict(same).keys()
    path, output = tmp_path / "a.safetensors", tmp_path / f"out{suffix}"
    native.save(path, jresnet.create("resnet20_cifar", output_stride=1))
    assert flax2torch.main([str(path), "--output", str(output), "--verify", "never"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "replace_stride_with_dilation=[True, True]" in printed
    assert "output_stride=1" in printed
    if suffix == ".safetensors":
        said = native.read_safetensors(output)[1]
        assert json.loads(said["replace_stride_with_dilation"]) == [True, True]
    assert jresnet.create("resnet20_cifar", weights=output, output_stride=1).config.output_stride == 1


def test_the_line_for_torchvision_asks_for_dilation() -> None:
    for arch, words in (
        (
            "resnet50",
            ["model = torchvision.models.resnet50(num_classes=7, replace_stride_with_dilation=[False, True, True])"],
        ),
        ("resnet18", []),  # it dilates bottlenecks alone
    ):
        config = jresnet.models.zoo.configure(arch, num_classes=7, output_stride=8)
        assert flax2torch._build(arch, config, "torchvision") == words
