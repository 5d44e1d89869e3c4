"""What ``flax2torch`` writes, in torch: ``torch.load(weights_only=True)`` and ``load_state_dict(strict=True)``."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import networks
import numpy as np
import pytest
import safetensors.torch
import torch
from dialect_networks import DIALECT_NETWORKS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import jresnet
from convert import flax2torch, torch2flax, verify
from convert.installed import import_torchvision
from jresnet.models import params
from jresnet.pytorch import statedict, torchsave
from jresnet.weights import native

DTYPES = [np.dtype(name) for name in ("float32", "int64", "float64", "float16", ml_dtypes.bfloat16)]
ENTRIES = [(dialect, *entry) for dialect, entries in DIALECT_NETWORKS.items() for entry in entries]
REORDERED = (
    "resnet34_projection",
    "resnet18_d2l",
    "transformers",
)  # their blocks register in another order than torchvision's


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """The same keys, dtypes, shapes and bits."""
    return ours.keys() == theirs.keys() and all(
        (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape) and bits(ours[key]) == bits(value)
        for key, value in theirs.items()
    )


def every_bit(model: nn.Module, finite: bool = True) -> nn.Module:
    """Random bits in every float32, so denormals too, negative zeros where it is to be ``finite``; random counters."""
    draw = np.random.default_rng(0)
    for tensor in model.state_dict().values():
        if tensor.dtype == torch.float32:
            raw = draw.integers(0, 1 << 32, tensor.numel(), np.uint32).view(np.float32)
            raw = np.where(np.isfinite(raw), raw, np.float32(-0.0)) if finite else raw
            tensor.copy_(torch.from_numpy(raw).reshape(tensor.shape))
        else:
            tensor.fill_(int(draw.integers(1 << 40)))
    return model


@pytest.mark.parametrize(("dialect", "arch", "build"), ENTRIES, ids=[f"{d}-{a}" for d, a, _ in ENTRIES])
def test_no_bit_is_lost_in_memory(dialect: str, arch: str, build) -> None:
    """NaN payloads too, which no native file holds."""
    theirs = every_bit(build(), finite=False).state_dict()
    found = statedict.match({key: value.numpy() for key, value in theirs.items()}, arch, dialect=dialect)
    back = statedict.state_dict(params.fill(found.config, found.values), dialect, found.counters)
    assert same({key: torch.from_numpy(value) for key, value in back.items()}, theirs)


@pytest.mark.parametrize(
    ("dialect", "arch", "build"),
    [
        # That no bit is lost the test above tells of all; this one is about files and commands.
        pytest.param(*entry, marks=[pytest.mark.long] if entry[1] == "resnet50" and entry[0] != "torchvision" else [])
        for entry in ENTRIES
    ],
    ids=[f"{d}-{a}" for d, a, _ in ENTRIES],
)
def test_pytorch_to_flax_to_pytorch_is_exact(tmp_path: Path, dialect: str, arch: str, build) -> None:
    theirs = every_bit(build()).state_dict()
    source, native_file, output = tmp_path / "theirs.pth", tmp_path / "native.safetensors", tmp_path / "native.pth"
    torch.save(theirs, source)
    there = [arch, "--weights", str(source), "--output", str(native_file), "--dialect", dialect, "--verify", "never"]
    assert torch2flax.main(there) == 0
    assert flax2torch.main([str(native_file), "--verify", "never"]) == 0  # dialect and counters: from the file
    for mmap in (False, True):
        ours = torch.load(output, weights_only=True, mmap=mmap)
        assert same(ours, theirs)
        fresh = build()
        fresh.load_state_dict(ours, strict=True)
        assert same(fresh.state_dict(), theirs)
    if dialect not in REORDERED:
        assert list(ours) == list(theirs)

    if arch != "resnet50":  # for time's sake
        output = tmp_path / "out.safetensors"
        assert flax2torch.main([str(native_file), "--output", str(output), "--verify", "never"]) == 0
        assert same(safetensors.torch.load_file(output), theirs)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_network_trained_here_is_torchvisions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    """The lines that the command prints load it, and it computes the same function."""
    native_file, output = tmp_path / "mine.safetensors", tmp_path / f"out{suffix}"
    model = jresnet.create("resnet18", num_classes=10, seed=1)
    native.save(native_file, model, "resnet18")
    assert flax2torch.main([str(native_file), "--output", str(output), "--verify", "always", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verify"]["done"]
    names = {"torchvision": import_torchvision(), "torch": torch, "safetensors": safetensors}
    exec(report["load"], names)  # two lines of our own
    theirs = names["model"]
    found = verify.compare(model, theirs, 64, batch=16)  # of two images alone the ratio is chance
    assert found.is_rounding, found
    assert not any(count for key, count in theirs.state_dict().items() if key.endswith("num_batches_tracked"))


def test_a_live_model_without_a_file() -> None:
    model = jresnet.create("resnet18", num_classes=5)
    theirs = networks.models.resnet18(num_classes=5)
    tensors = {key: torch.from_numpy(value) for key, value in statedict.state_dict(model, counters=9).items()}
    theirs.load_state_dict(tensors, strict=True)
    assert theirs.bn1.num_batches_tracked == 9
    assert list(tensors) == list(theirs.state_dict())


def test_two_names_share_their_memory(tmp_path: Path) -> None:
    """As in torch's own files, and unlike in safetensors, which holds copies."""
    one = np.arange(4, dtype=np.float32)
    torchsave.write(tmp_path / "x.pth", {"a": one, "b": one, "c": one.copy()})
    found = torch.load(tmp_path / "x.pth", weights_only=True)
    assert found["a"].data_ptr() == found["b"].data_ptr() != found["c"].data_ptr()


def test_a_mapped_file_is_aligned(tmp_path: Path) -> None:
    torchsave.write(tmp_path / "x.pth", {str(n): np.zeros(n, np.float32) for n in range(1, 9)})
    found = torch.load(tmp_path / "x.pth", weights_only=True, mmap=True)
    assert [tensor.data_ptr() % torchsave.ALIGNMENT for tensor in found.values()] == [0] * 8


def test_torch_finds_the_storages_by_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed offsets are for torch's own layout: torch must not fall for them, and its debug check must be content."""
    from torch.utils.serialization import config

    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    values = {str(n): np.arange(n, dtype=np.float32) for n in range(1, 9)}
    torchsave.write(tmp_path / "x.pth", values)
    for mmap in (False, True):
        with config.patch("load.calculate_storage_offsets", True):
            found = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
        assert all(np.array_equal(found[name].numpy(), value) for name, value in values.items())


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4), st.integers(0, 2**32)),
        max_size=5,
    )
)
def test_torch_reads_what_is_written(tmp_path_factory: pytest.TempPathFactory, table: dict) -> None:
    path = tmp_path_factory.mktemp("written") / "x.pth"
    tensors = {}
    for name, (dtype, shape, seed) in table.items():
        nbytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
        tensors[name] = np.frombuffer(np.random.default_rng(seed).bytes(nbytes), dtype).reshape(shape).T
    torchsave.write(path, tensors)
    for mmap in (False, True):
        found = torch.load(path, weights_only=True, mmap=mmap)
        assert list(found) == list(tensors)
        for name, value in tensors.items():
            assert str(found[name].dtype) == f"torch.{value.dtype.name}"
            assert tuple(found[name].shape) == value.shape
            assert bits(found[name]) == value.tobytes()
