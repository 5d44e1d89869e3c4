from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jresnet
from jresnet import factory
from jresnet.errors import InputError, WeightsError
from jresnet.models import zoo
from jresnet.weights import published


def test_there_is_a_function_for_every_name_that_is_not_timms_alone() -> None:
    functions = [arch for arch in jresnet.list_models() if arch not in zoo.IN_TIMM or published.names(arch)]
    assert len(functions) == 19
    assert not {*jresnet.list_models()} - {*functions} & {*jresnet.__all__}
    for arch in functions:
        function = getattr(jresnet, arch)
        assert function.__name__ == arch
        assert arch in jresnet.__all__
        row = zoo.find(arch)
        assert f"{row.parameters:,} parameters, {row.gmacs} GMACs at {row.image_size} pixels" in function.__doc__
        assert row.source in function.__doc__
    assert {"arch", *factory.Options.__annotations__} == inspect.signature(jresnet.create).parameters.keys()
    assert isinstance(jresnet.resnet20_cifar(num_classes=7), jresnet.ResNet)


@pytest.mark.parametrize(
    ("arch", "options", "shape", "logits"),
    [
        ("resnet18", {}, (1, 64, 64, 3), (1, 1000)),
        ("resnet18", {"stem": "cifar", "num_classes": 10}, (2, 32, 32, 3), (2, 10)),
        ("resnet20_cifar", {}, (2, 32, 32, 3), (2, 10)),
        ("resnet18_d2l", {}, (1, 64, 64, 1), (1, 10)),
        ("resnet34_projection", {"in_channels": 4}, (1, 32, 32, 4), (1, 1000)),
        ("resnext50_32x4d", {"num_classes": 5}, (1, 32, 32, 3), (1, 5)),
    ],
)
def test_create(arch: str, options: dict, shape: tuple[int, ...], logits: tuple[int, ...]) -> None:
    """Of a whole pass, as JAX traces it; what it computes, tests/parity tells."""
    assert jax.eval_shape(jresnet.create(arch, **options), jnp.ones(shape)).shape == logits


def test_numbers_of_numpys_are_pythons(tmp_path: Path) -> None:
    model = jresnet.create("resnet20_cifar", num_classes=np.array([3, 6]).max() + 1, seed=np.int64(1))
    jresnet.save(tmp_path / "x.safetensors", model)
    assert jresnet.load(tmp_path / "x.safetensors").config.num_classes == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -2, "in_channels": -1}, "num_classes must be .* got -2; in_channels must be .* got -1"),
        ({"num_classes": 2.5}, "whole number"),
        ({"stem": "vgg"}, "'imagenet' or 'cifar' or .*, got 'vgg'"),
        ({"dtype": "int8"}, "floating-point dtype"),
        ({"dtype": "bfloat17"}, "such as 'bfloat16' or 'float32', got 'bfloat17'"),
        ({"weights": ""}, "weights are an empty string"),
        ({"weights": True}, "weights must be a path, a name .* got True"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": 1, "rngs": nnx.Rngs(1)}, "seed and rngs are both given"),
        ({"rngs": 1}, r"rngs must be flax.nnx.Rngs, such as nnx.Rngs\(0\), got 1"),
        ({"weights": "IMAGENET1K_V1"}, "no weights are published for 'resnet20_cifar'"),
    ],
)
def test_arguments_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        jresnet.create("resnet20_cifar", **options)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("resnet5O", "did you mean resnet50"),
        (50, "the name of an architecture must be a string such as 'resnet50', got 50"),
        (None, "expected the name of an architecture or weights, got neither"),
    ],
)
def test_unknown_architecture(arch: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        jresnet.create(arch)


def test_list_models() -> None:
    assert jresnet.list_models("resnet20_*") == ["resnet20_cifar"]
    assert jresnet.list_models("vgg*") == []
    assert len(jresnet.list_models()) == 19 + 71


def test_rngs_in_place_of_a_seed() -> None:
    one, same = jresnet.create("resnet20_cifar", rngs=nnx.Rngs(5)), jresnet.resnet20_cifar(seed=5)
    np.testing.assert_array_equal(one.fc.kernel[...], same.fc.kernel[...])


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")])
def test_names_of_dtypes(dtype: object) -> None:
    assert jresnet.create("resnet20_cifar", dtype=dtype).conv1(jnp.ones((1, 8, 8, 3))).dtype == jnp.bfloat16


def test_weights_from_a_file(native_file: Path) -> None:
    model = jresnet.create("resnet20_cifar", weights=native_file)
    again = jresnet.resnet20_cifar(weights=str(native_file), dtype=jnp.bfloat16)
    np.testing.assert_array_equal(model.bn1.mean[...], again.bn1.mean[...])
    assert float(jnp.abs(model.bn1.mean[...]).max()) > 0  # the file's, not fresh ones
    assert again.conv1(jnp.ones((1, 8, 8, 3))).dtype == jnp.bfloat16


def test_weights_of_another_network(native_file: Path) -> None:
    with pytest.raises(WeightsError, match="its architecture is resnet20_cifar, not resnet32_cifar"):
        jresnet.create("resnet32_cifar", weights=native_file, num_classes=7)
    with pytest.raises(WeightsError, match="its stem is 'cifar', not 'imagenet'; its shortcut is 'pad', not 'conv'"):
        jresnet.create("resnet20_cifar", weights=native_file, stem="imagenet", shortcut="conv")


def test_a_fresh_head_and_another_stem(native_file: Path) -> None:
    own = jresnet.create("resnet20_cifar", weights=native_file)
    with pytest.warns(UserWarning, match="to be trained|scaled by 3/6") as caught:
        model = jresnet.create("resnet20_cifar", weights=native_file, num_classes=7, in_channels=6, seed=3)
    stem, head = (str(warning.message) for warning in caught)
    assert "stem for 6 input channels" in stem
    assert "new head for 7 classes" in head
    assert {warning.filename for warning in caught} == {__file__}  # the line that asked for it
    assert model(jnp.zeros((1, 32, 32, 6))).shape == (1, 7)
    np.testing.assert_array_equal(model.layer3[2].bn2.var[...], own.layer3[2].bn2.var[...])
    # An image whose channels are alike gives what it gave.
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 1), np.float32)
    np.testing.assert_allclose(model.conv1(x.repeat(6, 3)), own.conv1(x.repeat(3, 3)), atol=1e-5)


def test_without_a_head(native_file: Path, tmp_path: Path) -> None:
    own = jresnet.create(weights=native_file)
    model = jresnet.create(weights=native_file, num_classes=0)
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    assert model.fc is None
    assert model(x).shape == (2, model.num_features) == (2, 64)
    np.testing.assert_array_equal(model(x), own.embed(x))
    np.testing.assert_array_equal(own.fc(own.embed(x)), own(x))
    # And back: a head of the wanted size, drawn anew.
    jresnet.save(tmp_path / "headless.safetensors", model)
    assert jresnet.load(tmp_path / "headless.safetensors").fc is None
    with pytest.warns(UserWarning, match="new head for 5 classes, to be trained: the weights have no head"):
        again = jresnet.create(weights=tmp_path / "headless.safetensors", num_classes=5)
    assert again(x).shape == (2, 5)
    assert jresnet.create("resnet50", num_classes=0).num_features == 2048


def test_other_shortcuts() -> None:
    model = jresnet.create("resnet20_cifar", shortcut="projection")
    assert len(model.layer2[0].downsample) == 2
    with pytest.raises(InputError, match="shortcut 'pad' is defined for basic blocks"):
        jresnet.create("resnet50", shortcut="pad")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot read .*none\.safetensors: No such file"):
        jresnet.create("resnet20_cifar", weights=tmp_path / "none.safetensors")


def test_importing_the_package_is_light() -> None:
    """JAX comes with the name that needs it, and so does what is optional or large."""
    code = """
import sys
import jresnet
heavy = {"jax", "flax", "optax", "numpy", "safetensors", "torch", "tqdm"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert {*jresnet.__all__, "__version__"} <= {*dir(jresnet)}
jresnet.errors, jresnet.DownloadError
assert "jax" not in sys.modules
jresnet.list_models()
assert "jax" in sys.modules and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    for name in jresnet.__all__:
        assert getattr(jresnet, name) is not None
    assert jresnet.optim.__name__ == "jresnet.training.optim"
    with pytest.raises(
        AttributeError, match=r"has no attribute 'resnet50d': build this model by jresnet.create\('resnet50d'\)"
    ):
        _ = jresnet.resnet50d
    with pytest.raises(AttributeError, match=r"has no attribute 'resnet51'$"):
        _ = jresnet.resnet51
