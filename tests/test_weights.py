from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import jresnet
from jresnet.errors import InputError, WeightsError
from jresnet.weights import native


def rewrite(path: Path, to: Path, change) -> Path:
    """A native file with changed arrays or metadata and a digest that fits, as a buggy or malicious writer would."""
    with safetensors.safe_open(path, framework="numpy") as file:
        values, metadata = {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata())  # noqa: SIM118
    change(values, metadata)
    metadata["digest"] = native.digest(values)
    to.write_bytes(safetensors.numpy.save(values, metadata))
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
    """In the header, in the arrays' bytes, in the last byte."""
    content = native_file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    draw = np.random.default_rng(0)
    places = [*draw.integers(8, header, 40), *draw.integers(header, len(content), 40), len(content) - 1]
    damaged = tmp_path / "damaged.safetensors"
    silent = []
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(draw.integers(8))
        damaged.write_bytes(flipped)
        try:
            arch, _, values, metadata = native.read(damaged)
        except WeightsError:
            continue
        # What gets through may only be a word of the provenance: arrays, architecture and configuration are the same.
        assert arch == "resnet20_cifar"
        assert native.digest(values) == metadata["digest"]
        silent.append(place)
    assert all(place < header for place in silent)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1000, -1])
def test_truncated_files(native_file: Path, tmp_path: Path, keep: int) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(native_file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"cut\.safetensors is no whole safetensors file"):
        native.load(cut)


def test_everything_that_is_wrong_is_listed(native_file: Path, tmp_path: Path) -> None:
    def change(values: dict, metadata: dict) -> None:
        del values["bn1.mean"]
        values["extra.kernel"] = np.zeros(3, np.float32)
        values["fc.bias"] = np.zeros(11, np.float32)
        values["bn1.scale"] = values["bn1.scale"].astype(np.float16)

    with pytest.raises(WeightsError) as caught:
        native.load(rewrite(native_file, tmp_path / "odd.safetensors", change))
    message = str(caught.value)
    for part in (
        "1 missing: bn1.mean", "1 unexpected: extra.kernel", "1 misshapen: fc.bias is [11], not [10]",
        "bn1.scale is float16, not float32",
    ):  # fmt: skip
        assert part in message


@pytest.mark.parametrize("config", ["{}", "[", '{"num_classes": "ten", "in_channels": 3, "stem": "cifar"}', "7"])
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
