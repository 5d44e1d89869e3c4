"""``jresnet.pytorch.torchfile`` against ``torch.load(weights_only=True)``, on files that torch wrote in both formats."""

import argparse
import contextlib
import io
import os
import warnings
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest

from jresnet.errors import WeightsError
from jresnet.pytorch.torchfile import read

torch = pytest.importorskip("torch")

DTYPES = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool", "complex64",
    "complex128",
]  # fmt: skip


def same(ours, theirs) -> None:
    """Bit by bit the same tensors, in the same containers of the same types."""
    if isinstance(theirs, torch.Tensor):
        assert type(ours) is np.ndarray
        assert f"torch.{ours.dtype.name}" == str(theirs.dtype)
        assert ours.shape == tuple(theirs.shape)
        assert ours.flags.c_contiguous
        assert ours.tobytes() == theirs.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(theirs, dict):
        assert type(ours) is type(theirs)
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert type(ours) is (list if isinstance(theirs, list) else tuple)
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other)
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs


@pytest.fixture(
    params=[("zip", 2), ("zip", 4), ("zip", 5), ("legacy", 2), ("legacy", 4)], ids=lambda p: f"{p[0]}{p[1]}"
)
def save(request, tmp_path):
    """Writes an object with torch; gives the file and what torch reads from it."""
    kind, protocol = request.param

    def save(value):
        path = tmp_path / "model.pth"
        torch.save(value, path, _use_new_zipfile_serialization=kind == "zip", pickle_protocol=protocol)
        try:  # torch.load(weights_only=True) knows protocol 2 only; the file is this test's own
            return path, torch.load(path, weights_only=protocol == 2)
        except AttributeError:  # torch 2.13 writes its younger dtypes into the legacy format, and cannot read them
            assert kind == "legacy"
            return path, value

    return save


@pytest.mark.filterwarnings("ignore")  # quantised tensors are deprecated
def test_no_other_dtype_is_misread(tmp_path):
    """``DTYPES`` are all that numpy can hold; the others are quantised, or packed into less than a byte."""
    found = {
        str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
    }
    assert set(DTYPES) <= found.keys()
    refused = []
    for name in sorted(found.keys() - set(DTYPES)):
        try:
            if name in ("quint8", "qint8", "qint32"):
                value = torch.quantize_per_tensor(torch.arange(4.0), 1.0, 0, found[name])
            else:
                value = torch.arange(16, dtype=torch.uint8).view(found[name])
            torch.save([value], tmp_path / "model.pth")
        except (RuntimeError, TypeError, AttributeError, KeyError):
            continue  # torch makes or saves no such tensor
        with pytest.raises(WeightsError, match="forbidden global"):
            read(tmp_path / "model.pth")
        refused.append(name)
    assert {"complex32", "float4_e2m1fn_x2", "qint8"} <= set(refused)


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(save, name):
    raw = torch.arange(48, dtype=torch.uint8).reshape(3, 16)
    value = raw % 2 == 0 if name == "bool" else raw.view(getattr(torch, name))
    path, theirs = save([value])
    same(read(path), theirs)
    same(read(path), [value])


def test_views(save):
    base = torch.randn(6, 4)
    value = {
        "base": base,
        "tied": base,
        "slice": base[1:3],
        "column": base[:, 2],
        "transposed": base.T,
        "steps": base[::2, 1::2],
        "one": base[3, 3],
        "scalar": torch.tensor(7),
        "truth": torch.tensor(True),
        "some truth": torch.arange(9).reshape(3, 3).gt(4).T,
        "empty": torch.empty(0),
        "empty rows": torch.empty(0, 5),
        "empty slice": base[6:],
        "permuted": torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    path, theirs = save(value)
    ours = read(path)
    same(ours, theirs)
    assert ours["base"] is ours["tied"]


def network():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 5)
    )


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "bool", "int64", "complex64"])
def test_shared_and_strided_storages_of_other_dtypes(save, name):
    base = (torch.arange(24) % 2 == 0 if name == "bool" else torch.arange(24).to(getattr(torch, name))).reshape(2, 3, 4)
    value = {
        "base": base,
        "tied": base,
        "permuted": base.permute(2, 0, 1),
        "column": base[:, :, 1],
        "steps": base[:, ::2, 1::2],
        "one": base[1, 2, 3],
        "flat": base.flatten(),
        "empty": base[2:],
    }
    path, theirs = save(value)
    ours = read(path)
    same(ours, theirs)
    assert ours["base"] is ours["tied"]
    assert not any(np.shares_memory(ours["base"], ours[name]) for name in value if name not in ("base", "tied"))


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("zipped", [True, False])
def test_cuda_storages(tmp_path, monkeypatch, name, zipped):
    """As torch writes a tensor of a GPU: the same but for its storage's location."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    base = torch.randn(4, 6).to(getattr(torch, name))
    path = tmp_path / "model.pth"
    torch.save({"base": base, "view": base.T[1:3]}, path, _use_new_zipfile_serialization=zipped)
    assert b"cuda:0" in path.read_bytes()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    same(read(path), theirs)


def test_state_dict(save):
    path, theirs = save(network().state_dict())
    assert theirs._metadata  # an attribute of the OrderedDict, which the file holds and the reader drops
    same(read(path), theirs)


def test_parameters(save):
    value = dict(network().named_parameters())
    path, theirs = save(value)
    assert isinstance(theirs["0.weight"], torch.nn.Parameter)
    same(read(path), theirs)


def test_tied_parameters(save):
    model = torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(3, 3), b=torch.nn.Linear(3, 3)))
    model.b.weight = model.a.weight
    path, theirs = save(model.state_dict())
    ours = read(path)
    same(ours, theirs)
    assert ours["a.weight"] is ours["b.weight"]


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_checkpoint(save, optimizer):
    """A training run's checkpoint: DataParallel's keys, optimizer and scheduler state, random state, loose values."""
    model = torch.nn.DataParallel(network())
    options = {"lr": 0.1, "momentum": 0.9} if optimizer == "SGD" else {"lr": 0.1}
    optim = getattr(torch.optim, optimizer)(model.parameters(), **options)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    optim.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optim, [2, 2, 5])
    checkpoint = {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": model.state_dict(),
        "optimizer": optim.state_dict(),
        "history": [0.5, None, True, -(2**40), 2**70, ("x", 1.5), b"bytes", {}],
        "rng": torch.get_rng_state(),
    }
    path, theirs = save(checkpoint)
    ours = read(path)
    assert "module.0.weight" in ours["state_dict"]
    same(ours, theirs)

    path, theirs = save(schedule.state_dict())
    assert type(theirs["milestones"]) is Counter
    same(read(path), {**theirs, "milestones": dict(theirs["milestones"])})


def test_values_beyond_tensors(save):
    """numpy scalars and a Namespace, which torch itself reads only with weights_only=False."""
    value = {
        "best": np.float64(91.5),
        "n": np.int64(3),
        "ok": np.bool_(True),
        "args": argparse.Namespace(lr=0.1, arch=["x"]),
    }
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path, _ = save({})
    path.write_bytes(buffer.getvalue())
    assert read(path) == {"best": 91.5, "n": 3, "ok": True, "args": {"lr": 0.1, "arch": ["x"]}}

    path, theirs = save([torch.Size([1, 2]), torch.float16, torch.device("cuda:1")])
    assert theirs[0] == (1, 2)
    assert read(path) == [(1, 2), np.dtype("float16"), ("cuda", 1)]


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.eye(2).to_sparse(), "forbidden global"),
        (torch.ones(1).expand(1000), r"larger than its storage of 4 bytes.*contiguous\(\)"),
        (torch.ones(2, dtype=torch.complex64).conj(), "lazy"),
        (torch.ones(2).untyped_storage(), "a storage or a function where a value"),
    ],
    ids=["sparse", "expanded", "conjugated", "storage"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_refused(tmp_path, value, match, zipped):
    torch.save(value, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=match):
        read(tmp_path / "model.pth")


@pytest.mark.parametrize("form", ["zip", "legacy", "script", "trace"])
def test_whole_modules(tmp_path, form):
    """The tensors that its state_dict has, by the same names, of a module whose class is not imported."""
    model, path = network().eval(), tmp_path / "model.pt"
    if form in ("zip", "legacy"):
        model[1].register_buffer("filt", torch.ones(3), persistent=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        if form == "script":
            torch.jit.save(torch.jit.script(model), path)
        elif form == "trace":
            torch.jit.save(torch.jit.trace(model, torch.ones(1, 3, 4, 4)), path)
        else:
            torch.save(model, path, _use_new_zipfile_serialization=form == "zip")
    found, state = read(path), model.state_dict()
    assert found.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value.numpy(), strict=True)
    if form in ("zip", "legacy"):
        assert found.settings["0"]["stride"] == (1, 1)


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
@pytest.mark.parametrize("prepare", [torch.jit.freeze, torch.jit.optimize_for_inference])
def test_a_program_without_parameters(tmp_path, prepare):
    torch.jit.save(prepare(torch.jit.script(network().eval())), tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"is a TorchScript program without parameters.*model\.state_dict\(\)"):
        read(tmp_path / "model.pt")


def test_archives_of_other_kinds(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network().eval(), (torch.ones(1, 3, 4, 4),))
        torch.export.save(program, tmp_path / "program.pt2")
    with pytest.raises(WeightsError, match=r"is a program of torch\.export"):
        read(tmp_path / "program.pt2")
    with torch.package.PackageExporter(str(tmp_path / "package.pt")) as exporter:
        exporter.save_pickle("model", "model.pkl", {"w": 1})
    with pytest.raises(WeightsError, match="not of torch"):
        read(tmp_path / "package.pt")


def test_every_flipped_byte_of_a_storage_is_found(tmp_path):
    path = tmp_path / "model.pth"
    value = torch.arange(40, dtype=torch.float32)
    torch.save({"w": value}, path)
    data = path.read_bytes()
    start = data.index(value.numpy().tobytes())
    for position in range(start, start + 160):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(WeightsError, match="CRC"):
            read(path)


def test_damage_to_files_of_torch(save):
    """Cut at every fifth byte, every third byte flipped: what is read from an archive nevertheless is what torch wrote."""
    path, theirs = save(
        {"w": torch.arange(3.0), "half": torch.arange(6, dtype=torch.float16).reshape(2, 3).T, "epoch": 7}
    )
    data = path.read_bytes()
    for length in range(0, len(data), 5):
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError):
            read(path)
    for position in range(0, len(data), 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        with contextlib.suppress(WeightsError):
            ours = read(path)
            if data.startswith(b"PK"):
                same(ours, theirs)


def test_akamaster_resnet20():
    """A file from the wild: legacy format, CUDA storages, ``torch._utils._rebuild_tensor``."""
    shared = os.environ.get("JRESNET_SHARED")
    if shared is None:
        pytest.skip("JRESNET_SHARED does not name the folder that holds weights/resnet20-12fca82f.th")
    path = Path(shared) / "weights" / "resnet20-12fca82f.th"
    same(read(path), torch.load(path, map_location="cpu", weights_only=True))
