"""The table of published weights against torchvision's own metadata, and the cache."""

import dataclasses
import hashlib
import json
import os
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import jresnet
from convert import torch2flax
from jresnet import download, sources
from jresnet.errors import DownloadError, InputError, WeightsError
from jresnet.models import params, zoo
from jresnet.pytorch import keymap
from jresnet.weights import published as pretrained
from jresnet.weights.preprocessing import Preprocessing

ARCHS = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
ROWS = [pretrained.find(arch, name) for arch in ARCHS for name in pretrained.names(arch)]


@pytest.fixture
def row(monkeypatch, tmp_path):
    """Weights of which the cache, in ``tmp_path``, may hold the file; without network."""

    def fail(*args: object, **kwargs: object) -> None:
        raise socket.gaierror("no network here")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    digest = hashlib.sha256(b"weights").hexdigest()
    url = f"https://a.invalid/models/resnet18-{digest[:8]}.pth"
    return dataclasses.replace(ROWS[0], url=url, sha256=digest)


def put(row: pretrained.Row, content: bytes) -> Path:
    path = pretrained.cache_dir() / row.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_digests_begin_with_the_digits_in_the_file_name():
    for row in ROWS:
        assert set(row.sha256) <= set("0123456789abcdef")
        assert len(row.sha256) in (8, 64)
        assert row.filename == f"{row.arch}-{row.sha256[:8]}.pth"
    assert len(ROWS) == 17
    assert sum(len(row.sha256) == 64 for row in ROWS) == 10
    assert len({row.sha256 for row in ROWS}) == 17


def test_categories():
    names = pretrained.categories()
    assert len(names) == len(set(names)) == 1000
    assert (names[0], names[207], names[-1]) == ("tench", "golden retriever", "toilet tissue")


def test_names_in_any_case_and_the_default():
    assert pretrained.find("resnet50").name == "IMAGENET1K_V2"
    assert pretrained.find("resnet50", "default") is pretrained.find("resnet50")
    assert pretrained.find("ResNet50", "imagenet1k_v1").filename == "resnet50-0676ba61.pth"
    assert pretrained.find("resnet34").name == "IMAGENET1K_V1"
    assert all(sum(row.default for row in ROWS if row.arch == arch) == 1 for arch in ARCHS)
    assert pretrained.names("resnet20_cifar") == ()


@pytest.mark.parametrize(
    ("arch", "name", "words"),
    [
        ("resnet50", "IMAGENET1K_V3", "did you mean IMAGENET1K_V2 or IMAGENET1K_V1.*and DEFAULT; a path"),
        ("resnet18", "v9", "resnet18 has no weights 'v9'. There are IMAGENET1K_V1 and DEFAULT"),
        ("resent50", None, r"did you mean resnet50.*wide_resnet101_2\. .*the path of a weights file"),
        ("resnet20_cifar", None, "no weights are published for 'resnet20_cifar'. There are .*path of a weights file"),
    ],
)
def test_unknown_names_say_what_there_is(arch, name, words):
    with pytest.raises(InputError, match=words):
        pretrained.find(arch, name)


def test_cache_is_torchs(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TORCH_HOME", "~/torch")
    expected = [tmp_path / "home" / "torch", tmp_path / "xdg" / "torch", tmp_path / "home" / ".cache" / "torch"]
    for folder, next_to_go in zip(expected, ("TORCH_HOME", "XDG_CACHE_HOME", None), strict=True):
        assert pretrained.cache_dir() == folder / "hub" / "checkpoints"
        if "torch" in sys.modules and hasattr(sys.modules["torch"], "hub"):
            assert sys.modules["torch"].hub.get_dir() == str(folder / "hub")
        if next_to_go:
            monkeypatch.delenv(next_to_go)


def test_cached_file_is_checked_and_used(row):
    assert pretrained.cached(row) is None
    path = put(row, b"weights")
    assert pretrained.cached(row) == path
    assert pretrained.fetch(row) == path


@pytest.mark.parametrize("digits", [8, 64])
def test_altered_cached_file_is_refused_and_left_alone(row, digits):
    row = dataclasses.replace(row, sha256=row.sha256[:digits])
    path = put(row, b"weightz")
    with pytest.raises(WeightsError, match=r"damaged or another file.*Delete the file") as caught:
        pretrained.fetch(row)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"weightz"


def test_folder_in_the_files_place(row):
    (pretrained.cache_dir() / row.filename).mkdir(parents=True)
    with pytest.raises(WeightsError, match=r"cannot read .*is a folder"):
        pretrained.fetch(row)


def test_missing_file_is_downloaded_into_the_cache(row, monkeypatch):
    calls = []

    def fetch(urls, path, *, sha256, progress):
        calls.append((urls, path, sha256, progress))
        return path

    monkeypatch.setattr(download, "fetch", fetch)
    path = pretrained.cache_dir() / row.filename
    assert pretrained.fetch(row, progress=False) == path
    assert calls == [([row.url], path, row.sha256, False)]


def test_offline_says_where_to_put_the_file(row):
    path = pretrained.cache_dir() / row.filename
    with pytest.raises(DownloadError, match="no network here") as caught:
        pretrained.fetch(row)
    assert f"put it at {path}" in str(caught.value)
    assert row.url in str(caught.value)
    assert "TORCH_HOME" in str(caught.value)
    assert list(path.parent.iterdir()) == []
    assert put(row, b"weights") == pretrained.fetch(row)


def test_preprocessing_through_json():
    for row in ROWS:
        assert Preprocessing.from_json(pretrained.metadata(row)["preprocessing"]) == row.preprocessing
    odd = Preprocessing(None, 32, (0.5,), (0.25,), "bicubic")
    assert Preprocessing.from_json(odd.to_json()) == odd


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"resize": 0, "crop": True}, ["resize must be null or 1 to 4096 pixels, got 0", "crop must be", "got True"]),
        ({"crop": 5000, "mean": [0, 0, 255]}, ["got 5000", "mean must be one or three numbers from 0 to 1"]),
        ({"mean": "0.5", "std": [0.0]}, ["mean must be .* got '0.5'", "std must be .* above 0 .* got .0.0,"]),
        ({"mean": [0.5, 0.5], "std": [float("nan")]}, ["mean must be", "std must be .* got .nan"]),
        ({"std": [1e400, 1, 1]}, ["std must be .* got .inf"]),
        ({"std": [0.5]}, ["mean has 3 values and std 1"]),
        (
            {"interpolation": "nearest", "antialias": False},
            ["'antialias' is unknown", "interpolation must be bilinear"],
        ),
        ({"mean": None, "resize": ...}, ["resize is missing", "mean must be .* got None"]),
        ({"crop": "x" * 10**6}, [r"got 'x{56}\.\.\."]),
    ],
)
def test_preprocessing_of_a_stranger(changes, problems):
    values = {**json.loads(Preprocessing(256, 224).to_json()), **changes}
    text = json.dumps({name: value for name, value in values.items() if value is not ...})
    with pytest.raises(WeightsError, match="the preprocessing that the weights file states is invalid") as caught:
        Preprocessing.from_json(text)
    for problem in problems:
        assert re.search(problem, str(caught.value)), problem
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["", "[1]", "3", "{", "[" * 100_000])
def test_preprocessing_that_is_no_object(text):
    with pytest.raises(WeightsError, match="the preprocessing that the weights file states is invalid"):
        Preprocessing.from_json(text)


# The digest of a published file is compared whenever it is loaded, whoever loads it.


@pytest.fixture(params=[8, 64])
def stand_in(request, row, monkeypatch):
    """The cached file of a row of the table whose digest has 8 or 64 digits: a random resnet20_cifar."""
    draw = np.random.default_rng(0)
    shapes = params.shapes(zoo.configure("resnet20_cifar"))
    tensors = {
        keymap.torch_key(path): draw.uniform(0.5, 1.5, keymap.torch_shape(shape)).astype(np.float32)
        for path, shape in shapes.items()
    }
    content = safetensors.numpy.save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    url = f"https://a.invalid/models/resnet20-{digest[:8]}.safetensors"
    row = dataclasses.replace(row, arch="resnet20_cifar", url=url, sha256=digest[: request.param])
    monkeypatch.setattr(pretrained, "_TABLE", (row,))
    return put(row, content)


@pytest.mark.parametrize("way", ["fetch", "load", "create", "default", "command"])
def test_file_altered_after_it_was_loaded_is_refused(stand_in, tmp_path, capsys, way):
    """One bit of a weight, which neither safetensors nor torch's legacy format finds; size and times are the same."""
    output = tmp_path / "out.safetensors"

    def load():
        if way == "fetch":
            return pretrained.fetch(pretrained.find("resnet20_cifar"))
        if way == "load":
            return sources.load("resnet20_cifar:IMAGENET1K_V1").values
        if way == "command":
            arguments = ["resnet20_cifar", "--weights", "imagenet1k_v1", "--output", str(output), "--verify", "never"]
            if torch2flax.main(arguments):
                raise WeightsError(capsys.readouterr().err)
            return output
        return jresnet.create("resnet20_cifar", weights="IMAGENET1K_V1" if way == "create" else "DEFAULT")

    assert load()
    output.unlink(missing_ok=True)
    content, times = stand_in.read_bytes(), stand_in.stat()
    stand_in.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(stand_in, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(WeightsError, match="is damaged or another file: its SHA-256 is"):
        load()
    assert not output.exists()
    stand_in.write_bytes(content)
    assert load()


@pytest.mark.parametrize(
    ("name", "warns"),
    [
        ("resnet20-12fca82f.th", False),
        ("resnet20-12fca82f0123456.pt", False),
        ("resnet20-12fca82e.th", True),
        ("a-b-20240131.pth", True),
        ("resnet20-12fca82.th", False),  # too few to tell
        ("resnet20-12FCA82E.th", False),
        ("resnet20_12fca82e.th", False),
        ("resnet20-12fca82e.safetensors", False),
        ("resnet20-12fca82e-best.th", False),
        ("resnet20.th", False),
    ],
)
def test_digits_in_a_files_name(name, warns):
    warning = pretrained.name_mismatch(name, "12fca82f0123456789" + "0" * 46)
    assert (warning is not None) == warns
    assert not warns or name in warning
