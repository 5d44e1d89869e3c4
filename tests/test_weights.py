from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import jresnet
from jresnet import sources
from jresnet.errors import InputError, WeightsError
from jresnet.models import layers, params, zoo
from jresnet.weights import native
from jresnet.weights.preprocessing import Preprocessing

CIFAR20 = dataclasses.asdict(zoo.find("resnet20_cifar").config)


def rewrite(path: Path, to: Path, change) -> Path:
    """A native file with changed arrays or metadata and digests that fit, as a buggy or malicious writer would."""
    with safetensors.safe_open(path, framework="numpy") as file:
        values, metadata = {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata())  # noqa: SIM118
    change(values, metadata)
    to.write_bytes(safetensors.numpy.save(values, native.sealed(values, metadata)))
    return to


def test_a_round_trip_is_exact(native_file: Path, tmp_path: Path) -> None:
    arch, _, values, metadata = native.read(native_file)
    copy = tmp_path / "copy.safetensors"
    native.save(copy, native.load(native_file), arch, source="a test")
    _, _, again, more = native.read(copy)
    assert arch == "resnet20_cifar"
    assert values.keys() == again.keys()
    assert all(np.array_equal(values[name], again[name]) for name in values)
    assert more["source"] == "a test"
    assert {"jax", "flax", "python"} == json.loads(metadata["versions"]).keys()
    assert os.stat(copy).st_mode & 0o444 == 0o444


def test_every_flipped_bit_is_found(native_file: Path, tmp_path: Path) -> None:
    """In the metadata, in the table of arrays, in the arrays' bytes, in the last byte."""
    content = native_file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    draw = np.random.default_rng(0)
    metadata = content.index(b"__metadata__")
    places = [
        *draw.integers(metadata, content.index(b"}", content.index(b"versions")), 80),
        *draw.integers(8, header, 40), *draw.integers(header, len(content), 40), len(content) - 1,
    ]  # fmt: skip
    damaged = tmp_path / "damaged.safetensors"
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(draw.integers(8))
        damaged.write_bytes(flipped)
        with pytest.raises(WeightsError):
            native.read(damaged)


def test_a_changed_digit_of_the_metadata_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    preprocessing = Preprocessing(None, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    native.save(path, jresnet.create("resnet20_cifar"), preprocessing=preprocessing)
    assert sources.load(path).preprocessing == preprocessing
    content = bytearray(path.read_bytes())
    content[content.index(b"0.5", content.index(b"mean"))] = ord("9")
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="was altered after it was written"):
        native.read(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1000, -1])
def test_truncated_files(native_file: Path, tmp_path: Path, keep: int) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(native_file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"cut\.safetensors is not a complete safetensors file"):
        native.load(cut)


def test_everything_that_is_wrong_is_listed(native_file: Path, tmp_path: Path) -> None:
    def change(values: dict, metadata: dict) -> None:
        del values["bn1.mean"]
        values["extra.kernel"] = np.zeros(3, np.float32)
        values["fc.bias"] = np.zeros(11, np.float32)
        values["bn1.scale"] = values["bn1.scale"].astype(np.int8)

    with pytest.raises(WeightsError) as caught:
        native.load(rewrite(native_file, tmp_path / "odd.safetensors", change))
    message = str(caught.value)
    for part in (
        "1 missing: bn1.mean", "1 unexpected: extra.kernel", "1 misshapen: fc.bias is [11], not [10]",
        "bn1.scale is int8, not float32, bfloat16",
    ):  # fmt: skip
        assert part in message


@pytest.mark.parametrize(
    "config",
    [
        "{}", "[", '{"num_classes": "ten", "in_channels": 3, "stem": "cifar"}', "7",
        json.dumps({**CIFAR20, "num_classes": "ten"}),
        json.dumps({**CIFAR20, "depths": [10**6] * 3}),  # would take minutes to build
        json.dumps({**CIFAR20, "widths": [16, 32, 10**9]}),  # and terabytes
        json.dumps({**CIFAR20, "depths": [3, 3, 4]}),  # not a resnet20_cifar, as the file says
        json.dumps({**CIFAR20, "extra": 1}),
    ],
)  # fmt: skip
def test_a_damaged_configuration(native_file: Path, tmp_path: Path, config: str) -> None:
    path = rewrite(native_file, tmp_path / "odd.safetensors", lambda values, metadata: metadata.update(config=config))
    with pytest.raises(WeightsError, match="does not say which network it holds"):
        native.load(path)


def test_a_foreign_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "timm.safetensors"
    path.write_bytes(safetensors.numpy.save({"fc.weight": np.zeros((2, 3), np.float32)}))
    with pytest.raises(WeightsError, match=r"is not a jresnet-1 file .*python -m convert\.torch2flax"):
        native.load(path)


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(WeightsError):
            native.load(path)


def test_the_wrong_architecture_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a resnet32_cifar"):
        native.save(tmp_path / "x.safetensors", jresnet.create("resnet20_cifar"), "resnet32_cifar")
    assert not list(tmp_path.iterdir())


# --- What save writes, load reads; what load would refuse, save does.


def cast(model: jresnet.ResNet, dtype: object) -> jresnet.ResNet:
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda value: value.astype(dtype), state))


def test_a_model_knows_its_name(tmp_path: Path) -> None:
    for arch in jresnet.list_models():
        assert zoo.name_of(zoo.find(arch).config) == arch
        assert zoo.name_of(zoo.configure(arch, num_classes=3, in_channels=2)) == arch
    native.save(tmp_path / "x.safetensors", jresnet.create("resnet20_cifar", num_classes=4, stem="imagenet"))
    again = native.load(tmp_path / "x.safetensors")
    assert (again.arch, again.config.num_classes, again.config.stem) == ("resnet20_cifar", 4, "imagenet")


def test_a_network_of_no_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    config = jresnet.ResNetConfig("bottleneck", (1, 2), (8, 16), 5, 2, "cifar", "conv", 2, 32, True)
    model = jresnet.ResNet(config, rngs=nnx.Rngs(0))
    assert model.arch is None
    native.save(path, model)
    assert native.read(path)[:2] == (None, config)
    x = jnp.ones((1, 8, 8, 2))
    np.testing.assert_array_equal(jresnet.create(weights=path)(x), model(x))
    with pytest.raises(WeightsError, match=r"its architecture is not in the zoo \(ResNetConfig"):
        jresnet.create("resnet18", weights=path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes_come_back(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "x.safetensors"
    with jax.enable_x64(dtype == "float64"):
        model = cast(jresnet.create("resnet20_cifar"), dtype)
        native.save(path, model)
        again = native.load(path)
    assert {value.dtype.name for value in params.arrays(again).values()} == {dtype}
    assert native.digest(params.arrays(again)) == native.digest(params.arrays(model))
    if dtype == "float64":
        with pytest.warns(
            UserWarning, match=r"float64 weights are converted to float32: jax.enable_x64\(True\) keeps float64"
        ):
            native.load(path)


@pytest.mark.parametrize("linear", [nnx.Linear, layers.Linear])
def test_a_head_of_another_size(tmp_path: Path, linear: Callable) -> None:
    path = tmp_path / "x.safetensors"
    model = jresnet.create("resnet20_cifar")
    model.fc = linear(64, 7, rngs=nnx.Rngs(1))
    native.save(path, model, categories=list("abcdefg"))
    assert sources.load(path).categories == tuple("abcdefg")
    again, x = native.load(path), np.ones((2, 32, 32, 3), np.float32)
    assert again.config.num_classes == 7
    np.testing.assert_allclose(again(x), model(x), rtol=1e-6)


def replace(path: str, part: object) -> Callable[[jresnet.ResNet], None]:
    return lambda model: setattr(model, path, part)


def dilate(model: jresnet.ResNet) -> None:
    model.layer3[0].conv1.stride = 1


def break_one_value(model: jresnet.ResNet) -> None:
    model.fc.bias[...] = model.fc.bias[...].at[3].set(jnp.nan)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replace("fc", nnx.Sequential(nnx.Dropout(0.5), nnx.Linear(64, 7, rngs=nnx.Rngs(0)))), "fc is a Sequential"),
        (replace("fc", nnx.Linear(64, 7, use_bias=False, rngs=nnx.Rngs(0))), "missing: fc.bias"),
        (replace("fc", nnx.Linear(32, 7, rngs=nnx.Rngs(0))), r"fc.kernel is \[32, 7\], not \[64, 7\]"),
        (replace("conv1", nnx.Conv(3, 16, (3, 3), use_bias=False, rngs=nnx.Rngs(0))), "conv1 is a Conv of flax"),
        (replace("extra", nnx.Linear(2, 2, rngs=nnx.Rngs(0))), "2 unexpected: extra.bias, extra.kernel"),
        (dilate, "layer3.0.conv1 has stride 1, but a network of this configuration has 2"),
        (break_one_value, "fc.bias contains 1 values that are NaN or infinite"),
    ],
)
def test_what_would_not_come_back_is_not_saved(tmp_path: Path, change: Callable, words: str) -> None:
    model = jresnet.create("resnet20_cifar")
    change(model)
    with pytest.raises(InputError, match=words):
        native.save(tmp_path / "x.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_metadata_that_cannot_be_written(tmp_path: Path) -> None:
    model = jresnet.create("resnet20_cifar")
    bad = {"digest": "x", "config": "y", "epoch": 3, "source": "\udcff", "categories": ["a", "b"]}
    with pytest.raises(InputError) as caught:
        native.save(tmp_path / "x.safetensors", model, **bad)
    for part in (
        "the metadata name 'digest' is reserved", "the metadata name 'config' is reserved",
        "'epoch' must be text, got 3", "'source' cannot be written as UTF-8", "there are 2 categories for 10 classes",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"categories": [3] * 10}, "categories must be names, and 10 are not text, such as 3"),
        ({"categories": "abcdefghij"}, "'categories' must be a list or tuple of names, or such a one as JSON"),
        ({"scores": {"top1": [object()]}}, "scores must be numbers and text by name"),
        ({"scores": "90 %"}, "'scores' must be a mapping"),
        ({"preprocessing": "imagenet"}, "'preprocessing' is not what Preprocessing.to_json"),
    ],
)
def test_metadata_that_could_not_be_read_again(tmp_path: Path, metadata: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        native.save(tmp_path / "x.safetensors", jresnet.create("resnet20_cifar"), **metadata)
    assert not list(tmp_path.iterdir())


def test_scores_of_numpy_and_jax_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    native.save(path, jresnet.create("resnet20_cifar"), scores={"top1": jnp.float32(90), "top5": np.float32(99)})
    assert jresnet.get_weights(path).scores == {"top1": 90.0, "top5": 99.0}


def test_a_name_that_load_takes_for_pytorchs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"\.pth is a suffix of PyTorch files, and this is a native file: name it \*\.safetensors"
    ):
        native.save(tmp_path / "x.pth", jresnet.create("resnet20_cifar"))
    assert not list(tmp_path.iterdir())
