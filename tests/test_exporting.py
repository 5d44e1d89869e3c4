"""``jresnet.export`` and ``jresnet export``: programs that run without jresnet."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import pytest
from conftest import command, randomise
from flax import nnx

import jresnet
from jresnet import exporting
from jresnet.commands import export as export_command
from jresnet.commands import run
from jresnet.errors import InputError
from jresnet.kernels.platforms import plainly
from jresnet.models import params

CIFAR = jresnet.ResNetConfig("basic", (1, 1, 1), (4, 8, 16), num_classes=3, stem="cifar", shortcut="pad")
IMAGENET = jresnet.ResNetConfig(
    "bottleneck", (1, 1, 1), (4, 8, 16), num_classes=3, groups=2, width_per_group=32, output_stride=8
)
HOW = jresnet.Preprocessing(20, 16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
X = np.random.default_rng(0).standard_normal((5, 16, 12, 3), np.float32)


NEEDS_FLATBUFFERS = pytest.mark.skipif(
    importlib.util.find_spec("flatbuffers") is None,
    reason="jax.export needs flatbuffers: pip install 'jresnet[export]'",
)


def model_of(config: jresnet.ResNetConfig) -> jresnet.ResNet:
    model = jresnet.ResNet(config, rngs=nnx.Rngs(0))
    randomise(model)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native file that says how images are prepared and what the classes are."""
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    jresnet.save(path, model_of(CIFAR), preprocessing=HOW, categories=("cat", "dog", "eel"))
    return path


@NEEDS_FLATBUFFERS
def test_a_program_without_jresnet_runs_it(tmp_path: Path) -> None:
    path, model = tmp_path / "a.jaxexport", model_of(IMAGENET)
    model.train()  # a program evaluates, whatever the mode
    said = jresnet.export(model, path, image_size=(16, 12), categories=("a", "b", "c"))
    np.save(tmp_path / "x.npy", X)
    done = command(
        "-c",
        "import sys, jax, numpy as np\n"
        "program = jax.export.deserialize(open('a.jaxexport', 'rb').read())\n"
        "x = np.load('x.npy')\n"
        "np.savez('y.npz', five=program.call(x), one=program.call(x[:1]))\n"
        "foreign = [name for name in sys.modules if name.split('.')[0] in ('jresnet', 'flax')]\n"
        "print(program.platforms, *program.in_avals, foreign)",
        cwd=tmp_path, env={"PATH": "", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.stdout == "('cpu', 'cuda', 'tpu') float32[batch,16,12,3] []\n", done.stderr[-2000:]
    expected = model(X, train=False)
    with np.load(tmp_path / "y.npz") as found:
        np.testing.assert_allclose(found["five"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["one"], expected[:1], rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "a.jaxexport.json").read_text()) == json.loads(json.dumps(said))
    assert said["input"] == {"name": "images", "shape": ["batch", 16, 12, 3], "dtype": "float32"}
    assert said["output"] == {"name": "logits", "shape": ["batch", 3], "dtype": "float32"}
    assert (said["format"], said["categories"], said["preprocessing"]) == ("jax", ["a", "b", "c"], None)
    assert said["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [(30, 23), (17, 40)])
@pytest.mark.parametrize("how", [
    HOW, jresnet.Preprocessing(None, 24, HOW.mean, HOW.std), jresnet.Preprocessing(18, 16, HOW.mean, HOW.std, "bicubic"),
    jresnet.Preprocessing(18, 24, (0.5,), (0.2,)),
])  # fmt: skip
def test_preparation_is_that_of_images_files(size: tuple[int, int], how: jresnet.Preprocessing) -> None:
    from PIL import Image

    from jresnet.data.images import preprocess
    from jresnet.weights.preprocessing import normalise

    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    expected = np.stack([preprocess(Image.fromarray(image), how) for image in pixels])
    found = exporting.preparation(*size, how)(pixels)
    levels = np.asarray(found) * np.array(how.std) * 255 + np.array(how.mean) * 255
    assert np.abs(levels - expected).max() < 1.01  # Pillow's weights are whole numbers of 22 bits
    assert (np.abs(levels - expected) > 0.1).mean() < 0.05
    if how.resize is None:
        np.testing.assert_allclose(found, normalise(np.float32(expected), how.mean, how.std), rtol=1e-5, atol=1e-6)


@NEEDS_FLATBUFFERS
def test_preprocessing_inside(weights: Path, tmp_path: Path) -> None:
    found = jresnet.get_weights(weights)
    said = jresnet.export(found, tmp_path / "a", image_size=(26, 31), preprocess=True, platforms=["cpu"])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 26, 31, 3), np.uint8)
    expected = jresnet.create(weights=found)(found.preprocess(pixels))
    logits = jax.export.deserialize((tmp_path / "a").read_bytes()).call(pixels)
    np.testing.assert_allclose(logits, expected, rtol=0.02, atol=0.02)
    assert said["input"] == {"name": "images", "shape": ["batch", 26, 31, 3], "dtype": "uint8"}
    assert (said["preprocessing_inside"], said["categories"]) == (True, ["cat", "dog", "eel"])
    assert said["preprocessing"]["resize"] == 20
    assert said["platforms"] == ["cpu"]


@NEEDS_FLATBUFFERS
def test_sizes_that_are_not_given(weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = []
    monkeypatch.setattr(exporting, "_to_jax", lambda program, shape, *_: (sizes.append(shape), (b"", {}))[1])
    found = jresnet.get_weights(weights)
    jresnet.export(found, tmp_path / "a")
    jresnet.export(found, tmp_path / "b", preprocess=True)
    jresnet.export(jresnet.create("resnet20_cifar"), tmp_path / "c")
    assert sizes == [(16, 16, 3), (20, 20, 3), (32, 32, 3)]
    with pytest.raises(InputError, match="has no name, so its image size is unknown: give `image_size`"):
        jresnet.export(model_of(CIFAR), tmp_path / "d")


@NEEDS_FLATBUFFERS
def test_a_head_of_ones_own_and_features_and_a_fused_model(tmp_path: Path) -> None:
    model = model_of(CIFAR)
    for fc in (None, nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.Linear(16, 7, rngs=nnx.Rngs(1)))):
        model.fc = nnx.data(fc)
        for network in (model, jresnet.fuse(model)):
            said = jresnet.export(network, tmp_path / "a", image_size=16, platforms="cpu", force=True)
            found = jax.export.deserialize((tmp_path / "a").read_bytes()).call(X.repeat(2, 2)[:, :, :16])
            np.testing.assert_allclose(found, model(X.repeat(2, 2)[:, :, :16]), rtol=1e-4, atol=1e-5)
            assert said["output"]["shape"] == ["batch", 16 if fc is None else 7]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"format": "torchscript"}, "`format` must be 'jax' or 'onnx', got 'torchscript'"),
        ({"image_size": 0}, "`image_size` must be 1 to 16384 pixels, or two such numbers, got 0"),
        ({"image_size": (3, 4, 5)}, "`image_size` must be"),
        ({"image_size": True}, "`image_size` must be"),
        ({"preprocess": True}, "do not specify their preprocessing: give `preprocessing`"),
        ({"categories": ("a",)}, "1 categories for 3 classes"),
        ({"platforms": ["gpu"]}, r"`platforms` must be some of cpu, cuda, tpu, rocm, got \['gpu'\]"),
        ({"platforms": []}, "`platforms` must be"),
        ({"preprocessing": jresnet.Preprocessing(0, 16)}, "resize must be null or 1 to 4096"),
        ({"preprocessing": jresnet.Preprocessing(20, 16, (0.5, 0.5), (0.5, 0.5))}, "mean must be one or three numbers"),
    ],
)  # fmt: skip
@NEEDS_FLATBUFFERS
def test_mistakes(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        jresnet.export(model_of(CIFAR), tmp_path / "a", **{"image_size": 16} | given)
    assert not list(tmp_path.iterdir())


@NEEDS_FLATBUFFERS
def test_a_path_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`model` must be a model or weights of jresnet.get_weights"):
        jresnet.export("w.safetensors", tmp_path / "a")  # type: ignore[arg-type]


def test_a_name_of_weights_is_refused(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(InputError, match="would be a program, but "):
            jresnet.export(model_of(CIFAR), tmp_path / name, image_size=16)
    assert not list(tmp_path.iterdir())


@NEEDS_FLATBUFFERS
def test_nothing_is_overwritten_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_to_jax", lambda *_: (b"new", {}))
    path, model = tmp_path / "a", model_of(CIFAR)
    for file in (path, tmp_path / "a.json"):
        file.write_text("old")
        with pytest.raises(InputError, match=rf"{file.name} exists: choose another place, or replace it with `force`"):
            jresnet.export(model, path, image_size=16)
        assert file.read_text() == "old"
        file.unlink()
    path.write_text("old")
    jresnet.export(model, path, image_size=16, force=True)
    assert path.read_text() == "new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is a folder, a device or a broken link"):
        jresnet.export(model, tmp_path / "folder", image_size=16, force=True)
    with pytest.raises(InputError, match=r"cannot write a: there is no folder .*nowhere"):
        jresnet.export(model, tmp_path / "nowhere" / "a", image_size=16)


def test_plainly_leaves_no_primitive_of_our_own() -> None:
    model = jresnet.fuse(model_of(IMAGENET))
    assert "jresnet_" in str(jax.make_jaxpr(model)(X))
    with plainly():
        text = str(jax.make_jaxpr(lambda x: model(x))(X))
    assert "jresnet_" not in text
    assert "conv_general_dilated" in text


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for format, library, extra in (("onnx", "jax2onnx", "onnx"), ("jax", "flatbuffers", "export")):
        with pytest.raises(
            InputError,
            match=rf"needs the library {library}, which cannot be imported .*pip install 'jresnet\[{extra}\]'",
        ):
            jresnet.export(model_of(CIFAR), tmp_path / "a", format, image_size=16)


@pytest.mark.filterwarnings("ignore")  # jax2onnx's own
@pytest.mark.parametrize("config", [CIFAR, IMAGENET])
def test_onnx_logits(config: jresnet.ResNetConfig, tmp_path: Path) -> None:
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed: pip install 'jresnet[onnx]'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, which jax2onnx needs, is not installed")
    model, path = model_of(config), tmp_path / "a.onnx"
    jresnet.export(model, path, "onnx", image_size=(16, 12))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        (found,) = session.run(["logits"], {"images": X[:batch]})
        np.testing.assert_allclose(found, model(X[:batch]), rtol=1e-4, atol=1e-5)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 18, 23, 3), np.uint8)
    jresnet.export(model, path, "onnx", image_size=(18, 23), preprocess=True, preprocessing=HOW, force=True)
    (found,) = onnxruntime.InferenceSession(path).run(None, {"images": pixels})
    np.testing.assert_allclose(found, model(exporting.preparation(18, 23, HOW)(pixels)), rtol=1e-3, atol=1e-4)


DEEP: dict[str, Any] = {"stem": "deep", "stem_channels": 16, "shortcut": "average"}
PARTS = {
    "blur, eca": jresnet.ResNetConfig("basic", (1, 1), (16, 16), 3, antialias="blur", attention="eca"),
    "average": jresnet.ResNetConfig("bottleneck", (1, 1), (8, 16), 3, antialias="average", **DEEP),
    "dilated, se": jresnet.ResNetConfig("basic", (1, 1, 1), (8, 8, 8), 3, output_stride=8, attention="se", **DEEP),
    "group": jresnet.ResNetConfig(
        "basic", (1, 1), (32, 32), 3, norm="group", stem="deep_conv", stem_channels=64, shortcut="projection_3x3"
    ),
}


@pytest.mark.filterwarnings("ignore")  # jax2onnx's own
@pytest.mark.parametrize("network", PARTS)
def test_onnx_logits_of_timms_parts(network: str, tmp_path: Path) -> None:
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed: pip install 'jresnet[onnx]'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, which jax2onnx needs, is not installed")
    model, path = model_of(PARTS[network]), tmp_path / "a.onnx"
    size = (48, 32) if network == "average" else (52, 38)  # odd maps within
    x = np.random.default_rng(0).standard_normal((3, *size, 3), np.float32)
    jresnet.export(model, path, "onnx", image_size=size)
    (found,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], {"images": x})
    assert np.linalg.norm(found - model(x)) < 1e-5 * np.linalg.norm(model(x))


@NEEDS_FLATBUFFERS
def test_the_command(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(weights), "--output", str(tmp_path / "a"), "--preprocess", "--image-size", "18", "24"]
    assert run("export", arguments, "jresnet export") == 0
    printed = capsys.readouterr().out
    assert "input    images uint8 [batch, 18, 24, 3]\noutput   logits float32 [batch, 3]\n" in printed
    assert jax.export.deserialize((tmp_path / "a").read_bytes()).call(np.zeros((1, 18, 24, 3), np.uint8)).shape == (
        1,
        3,
    )
    assert run("export", arguments, "jresnet export") == 1
    assert "a exists: --force replaces it" in capsys.readouterr().err
    for bad in (
        ["--image-size", "0"],
        ["--image-size", "16385"],
        ["--image-size=-3"],
        ["--image-size", *"123"],
        ["--image-size", "²"],
        ["--format", "x"],
    ):
        assert run("export", [str(weights), "--output", "x", *bad], "jresnet export") == 2
    assert export_command.parser("x").parse_args(["m", "--output", "a.onnx"]).format is None


def test_exported_values_are_the_models() -> None:
    """The weights are inside: nothing of the model is lost on the way."""
    model = model_of(CIFAR)
    before = {path: np.array(value) for path, value in params.arrays(model).items()}
    exporting._program(model)(X)
    for path, value in params.arrays(model).items():
        np.testing.assert_array_equal(value, before[path])
