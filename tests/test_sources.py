"""Where weights come from: what a text means, and what the weights then say of themselves. No torch, no network."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import REPOSITORY, command, written_anyway
from flax import nnx

import jresnet
from jresnet import sources
from jresnet.errors import InputError, WeightsError
from jresnet.files import sha256_of
from jresnet.models import params
from jresnet.pytorch import statedict, torchsave
from jresnet.weights import native
from jresnet.weights.preprocessing import STATISTICS, Preprocessing


@pytest.fixture(scope="module")
def model() -> jresnet.ResNet:
    return jresnet.create("resnet20_cifar", num_classes=4, seed=2)


@pytest.fixture
def pth(model: jresnet.ResNet, tmp_path: Path) -> Path:
    """As torch.save writes it."""
    torchsave.write(tmp_path / "mine.pth", statedict.state_dict(model, counters=7))
    return tmp_path / "mine.pth"


@pytest.mark.parametrize("name", ["mine.pth", "mine.pt", "mine.th", "mine.ckpt", "mine", "mine.safetensors"])
def test_files_of_pytorch(model: jresnet.ResNet, pth: Path, name: str) -> None:
    path = pth.with_name(name)
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(statedict.state_dict(model, counters=7), path)
    else:
        pth.rename(path)
    found = sources.load(path, "resnet20_cifar")
    assert native.digest(found.values) == native.digest(params.arrays(model))
    assert found.config == model.config  # the number of classes is the file's
    assert found.metadata == {
        "source": name, "source_sha256": sha256_of(path), "dialect": "torchvision", "num_batches_tracked": "7",
    }  # fmt: skip
    assert (found.spec, found.preprocessing, found.categories) == (str(path), None, None)
    assert found.conversion


@pytest.mark.parametrize("name", ["native.safetensors", "native"])
def test_native_files_say_their_architecture(native_file: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(native_file.read_bytes())
    found = sources.load(str(path))
    assert (found.arch, found.conversion) == ("resnet20_cifar", None)
    assert native.digest(found.values) == found.metadata["digest"]
    with pytest.raises(WeightsError, match="its architecture is resnet20_cifar, not resnet18"):
        sources.load(path, "resnet18")


def test_a_model_from_a_file_of_pytorch(model: jresnet.ResNet, pth: Path) -> None:
    again = jresnet.create("resnet20_cifar", weights=pth)
    assert native.digest(params.arrays(again)) == native.digest(params.arrays(model))
    with pytest.warns(UserWarning, match="new head for 6 classes|stem for 1 input channel"):
        other = jresnet.create("resnet20_cifar", weights=pth, num_classes=6, in_channels=1)
    assert (other.config.num_classes, other.config.in_channels) == (6, 1)
    np.testing.assert_array_equal(other.bn1.var[...], model.bn1.var[...])
    headless = jresnet.create("resnet20_cifar", weights=pth, num_classes=0)
    x = np.ones((1, 32, 32, 3), np.float32)
    np.testing.assert_array_equal(headless(x), again.embed(x))
    with pytest.raises(WeightsError, match=r"contains a resnet20_cifar, not a resnet32_cifar"):
        jresnet.create("resnet32_cifar", weights=pth)


def test_the_channels_are_the_files(tmp_path: Path) -> None:
    grey = jresnet.create("resnet20_cifar", in_channels=1)
    torchsave.write(tmp_path / "grey.pth", statedict.state_dict(grey))
    assert jresnet.create("resnet20_cifar", weights=tmp_path / "grey.pth").config.in_channels == 1
    with pytest.raises(WeightsError, match="its in_channels is 1, not 4: only a stem for 3 can be adapted"):
        jresnet.create("resnet20_cifar", weights=tmp_path / "grey.pth", in_channels=4)


def test_a_users_own_convert_py_does_no_harm(tmp_path: Path) -> None:
    """Nor is torch needed."""
    model = jresnet.create("resnet18", num_classes=3, seed=5)
    torchsave.write(tmp_path / "mine.pth", statedict.state_dict(model))
    for name in ("convert", "torch", "torchvision", "scripts"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the user\\'s own module')")
    code = (
        "import jresnet; model = jresnet.create('resnet18', weights='mine.pth');"
        "print(model.config.num_classes, float(model.fc.bias[...][0]))"
    )
    done = command("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", str(float(model.fc.bias[...][0]))]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_names_are_not_shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("resnet50", "DEFAULT", "IMAGENET1K_V1", "resnet50:IMAGENET1K_V1"):
        Path(name).mkdir() if kind == "folder" else Path(name).touch()
    assert sources.find("resnet50").spec == "resnet50:IMAGENET1K_V2"
    assert sources.find("resnet50", "resnet50").spec == "resnet50:IMAGENET1K_V2"
    assert sources.find("ResNet50:imagenet1k_v1").spec == "resnet50:IMAGENET1K_V1"
    assert sources.find("resnet50:IMAGENET1K_V1", "resnet50").label == "imagenet1k_v1"
    assert sources.find("DEFAULT", "resnet18").spec == "resnet18:IMAGENET1K_V1"
    assert sources.find("IMAGENET1K_V1", "resnet50").spec == "resnet50:IMAGENET1K_V1"
    for path in (os.path.join(".", "resnet50"), Path("resnet50"), str(tmp_path / "DEFAULT")):
        assert sources.find(path, "resnet50").path == Path(path)


@pytest.mark.parametrize(
    ("spec", "arch", "message"),
    [
        ("", "resnet50", "an empty string"),
        ("", None, "an empty string"),
        ("resnet18:IMAGENET1K_V1", "resnet50", "belong to resnet18, not to resnet50"),
        ("resnet18", "resnet50", "belong to resnet18, not to resnet50"),
        ("resnet50:IMAGENET1K_V9", None, "resnet50 has no weights 'IMAGENET1K_V9'"),
        ("resnet50:", None, "resnet50:IMAGENET1K_V2"),
        ("IMAGENET1K_V9", "resnet50", "did you mean IMAGENET1K_V"),
        ("IMAGENET1K_V1", None, "needs an architecture: write resnet50:IMAGENET1K_V1"),
        ("IMAGENET1K_V1", "resnet20_cifar", "no weights are published for 'resnet20_cifar'"),
        ("resnet20_cifar", None, "no weights are published for 'resnet20_cifar'"),
        ("resnet51", None, r"no weights are published for 'resnet51' \(did you mean"),
        ("x.pth", "resnet51", "unknown architecture 'resnet51'"),
    ],
)
def test_what_is_no_source(spec: str, arch: str | None, message: str) -> None:
    if spec == "resnet50:":
        assert sources.find(spec).spec == message
        return
    with pytest.raises(InputError, match=message):
        sources.find(spec, arch)


def test_a_file_says_its_architecture(model: jresnet.ResNet, pth: Path) -> None:
    found = sources.load(pth)
    assert (found.arch, found.config) == ("resnet20_cifar", model.config)
    for again in (jresnet.create(weights=pth), jresnet.load(pth), jresnet.load(str(pth))):
        assert native.digest(params.arrays(again)) == native.digest(params.arrays(model))
    with pytest.warns(UserWarning, match="new head for 7 classes"):
        assert jresnet.create(weights=pth, num_classes=7).config.num_classes == 7
    with pytest.raises(InputError, match="an architecture or weights, got neither"):
        jresnet.create()


def test_a_network_without_a_row_of_the_zoo(tmp_path: Path) -> None:
    config = jresnet.ResNetConfig("basic", (1, 1, 1, 1), (48, 96, 192, 384), num_classes=37, in_channels=5)
    model = jresnet.ResNet(config, rngs=nnx.Rngs(0))
    torchsave.write(tmp_path / "mine.pth", statedict.state_dict(model))
    found = sources.load(tmp_path / "mine.pth")
    assert (found.arch, found.config) == (None, config)
    again = jresnet.load(tmp_path / "mine.pth")
    assert native.digest(params.arrays(again)) == native.digest(params.arrays(model))
    with pytest.raises(
        WeightsError, match=r"contains a ResNet that is not in the zoo, not a resnet18: basic blocks 1-1-1-1"
    ):
        jresnet.create("resnet18", weights=tmp_path / "mine.pth")


def test_missing_files(tmp_path: Path) -> None:
    for name in ("x.pth", "x.safetensors", "folder/x"):
        with pytest.raises(WeightsError, match="No such file"):
            sources.load(str(tmp_path / name), "resnet18")


@pytest.mark.parametrize(("dialect", "statistics"), [("akamaster", "imagenet"), ("torchvision", None)])
def test_the_preprocessing_of_a_dialect(tmp_path: Path, dialect: str, statistics: str | None) -> None:
    model = jresnet.create("resnet20_cifar")
    torchsave.write(tmp_path / "x.th", statedict.state_dict(model, dialect))
    found = sources.load(tmp_path / "x.th", "resnet20_cifar")
    assert found.metadata["dialect"] == dialect
    assert found.preprocessing == (Preprocessing(None, 32, *STATISTICS[statistics]) if statistics else None)


def test_what_a_file_says_wrongly_is_told_when_it_is_asked(tmp_path: Path) -> None:
    model = jresnet.create("resnet20_cifar")
    names = json.dumps(["a"] * 9)
    written_anyway(tmp_path / "x.safetensors", model, preprocessing="{}", categories=names)
    found = sources.load(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="the preprocessing that the weights file states is invalid"):
        _ = found.preprocessing
    with pytest.raises(WeightsError, match="are not 10 names"):
        _ = found.categories
    assert jresnet.create("resnet20_cifar", weights=tmp_path / "x.safetensors")


def test_a_files_name_need_not_be_unicode(pth: Path) -> None:
    path = pth.with_name(os.fsdecode(b"\xff.pth"))
    pth.rename(path)
    assert sources.load(path, "resnet20_cifar").metadata["source"] == "\ufffd.pth"


# --- Other files than torch.save's


def npz(path: Path, arrays: dict[str, np.ndarray], compressed: bool = False) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("compressed", [True, False])
def test_numpys_files(model: jresnet.ResNet, tmp_path: Path, compressed: bool) -> None:
    path = npz(tmp_path / "mine.npz", statedict.state_dict(model, counters=7), compressed)
    found = sources.load(path)
    assert len(repr(found)) < 1000  # no arrays
    assert (found.arch, found.config) == ("resnet20_cifar", model.config)
    assert native.digest(found.values) == native.digest(params.arrays(model))
    assert found.metadata["num_batches_tracked"] == "7"


def entry(shape: str, dtype: str = "<f4", size: int = 8) -> bytes:
    """A .npy of ``size`` zero bytes whose header says something else."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (entry("(1000000000000,)"), "of another size than its header"),
        (entry("(-2, -1)"), "damaged|of another size"),
        (entry("(1,)", "|O"), "of objects"),
        (entry("(1000000,)", size=4_000_000), "inflates to more than 32 times its size"),
        (b"\x93NUMPY\x09\x00" + bytes(20), "damaged"),
        (b"no array", "damaged"),
    ],
)
def test_a_strangers_npz(tmp_path: Path, content: bytes, message: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("conv1.weight.npy", content)
    with pytest.raises(WeightsError, match=message):
        sources.load(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "is an HDF5 file .Keras."),
        (b"\x81\xa6params\x81\xa1a" + bytes(600), "is a msgpack file .Flax."),
        (b"\xde\x00\x20\xa6params\x81\xa1a" + bytes(600), "is a msgpack file .Flax."),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(600), "is an ONNX file"),
        (b"\x08\x0a\x3a\x83\x10\x0a\x05graph" + bytes(600), "is an ONNX file"),
        (b"\x08\x01\x12\x83\x10" + bytes(600), "is a TensorFlow SavedModel"),
        (b"\x1c\0\0\0TFL3" + bytes(600), "is a TensorFlow Lite file"),
        (b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}', "is a JSON file"),
    ],
)
def test_foreign_files(tmp_path: Path, content: bytes, message: str) -> None:
    """One sentence says what it is, and what would help."""
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(WeightsError, match=f"{message}.*save.*with torch.save|{message}.*in one file"):
        sources.load(tmp_path / "weights")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"\x93NUMPY\x01\x00", r"is a \.npy file of one array; save .* with numpy\.savez"),
        ("a.pth.gz", b"\x1f\x8b\x08\x08", "is a compressed file; unpack it"),
        ("model.ckpt.index", b"\0", "is part of a TensorFlow checkpoint"),
        ("model.ckpt.data-00000-of-00001", b"\0", "is part of a TensorFlow checkpoint"),
        ("a.keras", {"model.weights.h5": b"\x89HDF"}, "is a Keras file"),
        ("a.zip", {"model.pth": b"PK"}, "is a zip archive with a file of weights inside; unpack it"),
    ],
)
def test_files_that_are_nearly_right(
    tmp_path: Path, name: str, content: bytes | dict[str, bytes], message: str
) -> None:
    if isinstance(content, dict):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry_name, data in content.items():
                archive.writestr(entry_name, data)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        sources.load(tmp_path / name)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_checkpoint_in_several_files(model: jresnet.ResNet, tmp_path: Path, kind: str) -> None:
    """By its index, or by its folder."""
    tensors = statedict.state_dict(model, counters=7)
    index = tmp_path / ("model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json")
    where = {key: f"part-{i % 2}.{kind}" for i, key in enumerate(tensors)}
    for name in sorted(set(where.values())):
        part = {key: tensors[key] for key in where if where[key] == name}
        if kind == "bin":
            torchsave.write(tmp_path / name, part)
        else:
            safetensors.numpy.save_file(part, tmp_path / name)
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    for source in (index, tmp_path):
        found = sources.load(source)
        assert native.digest(found.values) == native.digest(params.arrays(model))
    (tmp_path / f"part-1.{kind}").unlink()
    with pytest.raises(
        WeightsError, match=rf"names the file part-1\.{kind}, which is missing: put it into the same folder"
    ):
        sources.load(index)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../x.safetensors"}, r"names the file \.\./x\.safetensors, which is missing"),
        ({"a": "model.safetensors.index.json"}, "which is missing"),
        ({"a": ""}, "which is missing"),
        ({"a": 3}, "is not the index"),
        ({}, "is not the index"),
        ({"conv9.weight": "x.safetensors"}, r"names tensors that are missing from its files: conv9\.weight"),
    ],
)
def test_a_strangers_index(tmp_path: Path, weight_map: dict, message: str) -> None:
    safetensors.numpy.save_file({"a": np.ones(1, np.float32)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match=message):
        sources.load(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([".metadata", "__0_0.distcp"], "format_utils dcp_to_torch"),
        (["latest", "zero_to_fp32.py"], "the zero_to_fp32.py inside"),
        (["saved_model.pb"], "a TensorFlow SavedModel"),
        (["_CHECKPOINT_METADATA"], "an Orbax checkpoint"),
        (["a.pth", "b.pth", "notes.txt"], "name one of its files, a.pth, b.pth"),
        (["notes.txt"], "there are notes.txt"),
        ([], "there are no files"),
    ],
)
def test_folders_without_weights(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(WeightsError, match=message):
        sources.load(tmp_path)
    if names[-1:] == ["__0_0.distcp"]:
        with pytest.raises(WeightsError, match=message):
            sources.load(tmp_path / names[-1])


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("torch.qint8", "loses the float weights"),
        ("numpy.core.multiarray._reconstruct", "numpy.savez"),
        ("numpy._core.numeric._frombuffer", "numpy.savez"),
    ],
)
def test_pickles_of_other_things(tmp_path: Path, name: str, advice: str) -> None:
    module, _, function = name.rpartition(".")
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02c" + f"{module}\n{function}\n.".encode())
    with pytest.raises(WeightsError, match=f"forbidden global {name}, .*{advice}"):
        sources.load(tmp_path / "x.pkl")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_detectron2s_pickles(tmp_path: Path, protocol: int) -> None:
    arrays = {
        "stem.conv1.weight": np.ones((4, 3, 7, 7), np.float32),
        "res2.0.conv1.weight": np.ones((4, 4), np.float32),
    }
    content = pickle.dumps({"model": arrays, "__author__": "x", "matching_heuristics": True}, protocol)
    (tmp_path / "model.pkl").write_bytes(content)
    with pytest.raises(WeightsError, match=r"as published by detectron2, with numpy\.savez"):
        sources.load(tmp_path / "model.pkl")
    np.savez(tmp_path / "model.npz", **arrays)
    with pytest.raises(WeightsError, match="contains no ResNet but a ResNet with detectron2's or Caffe's names"):
        sources.load(tmp_path / "model.npz")
