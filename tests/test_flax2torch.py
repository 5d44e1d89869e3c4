"""Export to PyTorch, without torch: the way back of ``torch2flax``, and the writer that ``torchfile`` must read."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import REPOSITORY, command
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jresnet
from convert import flax2torch
from jresnet import sources
from jresnet.errors import InputError
from jresnet.models import params, zoo
from jresnet.models.resnet import ResNet
from jresnet.pytorch import keymap, statedict, torchfile, torchsave
from jresnet.weights import native

DTYPES = [np.dtype(name) for name in ("float32", "int64", "float64", "float16", ml_dtypes.bfloat16)]

# A small network that fits each dialect.
FITTING = {
    "torchvision": ("resnet20_cifar", {}),
    "akamaster": ("resnet20_cifar", {}),
    "kuangliu": ("resnet20_cifar", {"shortcut": "projection"}),
    "weiaicunzai": ("resnet20_cifar", {"shortcut": "projection", "num_classes": 100}),
    "chenyaofo": ("resnet20_cifar", {"shortcut": "projection"}),
    "resnet34_projection": ("resnet34_projection", {"num_classes": 10}),
    "resnet18_d2l": ("resnet18_d2l", {}),
    "transformers": ("resnet20_cifar", {"shortcut": "projection", "stem": "imagenet"}),
    "children": ("resnet20_cifar", {"shortcut": "projection", "stem": "imagenet"}),
}


def network(arch: str, **chosen) -> ResNet:
    """Every bit at random: NaN payloads, denormals and negative zeros are weights like others here."""
    draw = np.random.default_rng(0)
    config = zoo.configure(arch, **chosen)
    shapes = params.shapes(config)
    values = {path: draw.integers(0, 1 << 32, shape, np.uint32).view(np.float32) for path, shape in shapes.items()}
    return params.fill(config, values)


def counters_of(model: ResNet) -> dict[str, int]:
    """A number of its own for each counter, by torchvision's key."""
    norms = [path for path in params.arrays(model) if path.endswith(".var")]
    return {keymap.counter_key(path): 1000 + i for i, path in enumerate(norms)}


def save(folder: Path, arch: str, chosen: dict, **metadata: str) -> Path:
    path = folder / "native.safetensors"
    model = network(arch, **chosen)
    finite = {name: np.nan_to_num(value, nan=1) for name, value in params.arrays(model).items()}  # no file holds NaN
    native.save(path, params.fill(model.config, finite), arch, **metadata)
    return path


@pytest.mark.parametrize("dialect", keymap.DIALECTS)
def test_there_and_back_bit_by_bit(dialect: str) -> None:
    arch, chosen = FITTING[dialect]
    model = network(arch, **chosen)
    counters = counters_of(model)
    tensors = statedict.state_dict(model, dialect, counters)
    assert all(value.flags.c_contiguous for value in tensors.values())
    back = statedict.match(tensors, arch, dialect=dialect, **chosen)
    assert native.digest(back.values) == native.digest(params.arrays(model))
    assert back.counters == counters


def test_names_order_and_layout() -> None:
    model = jresnet.create("resnet20_cifar")
    tensors = statedict.state_dict(model, counters=7)
    assert [*tensors][:8] == [
        "conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked",
        "layer1.0.conv1.weight", "layer1.0.bn1.weight",
    ]  # fmt: skip
    assert [*tensors][-3:] == ["layer3.2.bn2.num_batches_tracked", "fc.weight", "fc.bias"]
    assert (tensors["conv1.weight"].shape, tensors["fc.weight"].shape) == ((16, 3, 3, 3), (10, 64))
    np.testing.assert_array_equal(tensors["fc.weight"], np.asarray(model.fc.kernel[...]).T)
    count = tensors["bn1.num_batches_tracked"]
    assert (count.dtype, count.shape, count.item()) == (np.int64, (), 7)


@pytest.mark.parametrize("arch", ["resnet152", "resnet110_cifar", "resnet34_projection", "resnet18_d2l"])
def test_every_leaf_has_its_place_in_the_order(arch: str) -> None:
    paths = params.shapes(zoo.configure(arch))
    ordered = sorted(paths, key=statedict._rank)
    assert ordered[0] == "conv1.kernel"
    assert ordered[-1] == "fc.bias"
    depths = [int(path.split(".")[1]) for path in ordered if path.startswith("layer1.")]
    assert depths == sorted(depths)  # 10 after 9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: setattr(model, "fc", nnx.Sequential(nnx.Linear(64, 7, rngs=nnx.Rngs(0)))), r"fc\.layers\.0"),
        (lambda model: setattr(model, "bn1", nnx.Conv(1, 1, 1, rngs=nnx.Rngs(0))), r"missing: bn1\.mean"),
    ],
)
def test_a_model_that_pytorchs_network_has_no_place_for(change: Callable, words: str) -> None:
    model = jresnet.create("resnet8_cifar")
    change(model)
    with pytest.raises(InputError, match=f"a PyTorch ResNet cannot hold this model: .*{words}"):
        statedict.state_dict(model)


def test_a_fused_model_has_no_state_dict() -> None:
    with pytest.raises(InputError, match=r"If the model is fused, use the model that was passed to jresnet.fuse"):
        statedict.state_dict(jresnet.fuse(jresnet.create("resnet8_cifar")))


def test_a_head_of_ones_own_goes_out() -> None:
    model = jresnet.create("resnet8_cifar")
    model.fc = nnx.Linear(64, 7, rngs=nnx.Rngs(0))
    assert statedict.state_dict(model)["fc.weight"].shape == (7, 64)


def test_a_dialect_without_such_a_network_is_refused() -> None:
    model = network("resnet20_cifar")
    with pytest.raises(InputError, match=r"kuangliu has no such network: shortcut is 'projection' there, 'pad' here"):
        statedict.state_dict(model, "kuangliu")
    with pytest.raises(InputError, match=r"Use one of torchvision, akamaster$"):
        statedict.state_dict(model, "chenyaofo")
    with pytest.raises(InputError, match=r"shortcut is 'conv' there, 'pad' here; conv_bias is True there, False here"):
        statedict.state_dict(model, "resnet18_d2l")
    with pytest.raises(InputError, match="unknown dialect 'tf': there are torchvision"):
        statedict.state_dict(model, "tf")


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4), st.integers(0, 2**32)),
        max_size=5,
    ),
    st.booleans(),
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, table: dict, transposed: bool) -> None:
    tensors = {}
    for name, (dtype, shape, seed) in table.items():
        nbytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
        value = np.frombuffer(np.random.default_rng(seed).bytes(nbytes), dtype).reshape(shape)
        tensors[name] = value.T if transposed else value
    path = tmp_path_factory.mktemp("written") / "x.pth"
    torchsave.write(path, tensors)
    found = torchfile.read(path)
    assert isinstance(found, dict)
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes()


def test_the_archive(tmp_path: Path) -> None:
    """Stored, aligned, dated alike, one storage for two names; and the same tensors give the same bytes."""
    one, two = np.arange(5, dtype=np.float32), np.array(3)
    for name in ("a.pth", "b.pth"):
        torchsave.write(tmp_path / name, {"first": one, "count": two, "second": one})
    content = (tmp_path / "a.pth").read_bytes()
    assert content == (tmp_path / "b.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None
        names = ["data.pkl", "byteorder", "data/0", "data/1", "version"]
        assert archive.namelist() == [f"archive/{name}" for name in names]
        for info in archive.infolist():
            extra = int.from_bytes(content[info.header_offset + 28 :][:2], "little")
            start = info.header_offset + 30 + len(info.filename) + extra
            assert start % torchsave.ALIGNMENT == 0
            assert content[start : start + info.file_size] == archive.read(info)
            assert info.date_time == (1980, 1, 1, 0, 0, 0)


def test_only_known_dtypes_are_written(tmp_path: Path) -> None:
    tensors = {"fine": np.zeros(1), "a": np.zeros(1, "complex64"), "b": np.zeros(1, ">f4")}
    with pytest.raises(InputError, match="a is complex64; b is >f4"):
        torchsave.write(tmp_path / "x.pth", tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(None, 0), ("4690", 4690), (json.dumps({"bn1.num_batches_tracked": 5}), {"bn1.num_batches_tracked": 5})],
)
def test_the_counters_of_a_native_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stored: str | None, expected: int | dict
) -> None:
    path = save(tmp_path, "resnet20_cifar", {}, **({"num_batches_tracked": stored} if stored else {}))
    assert flax2torch.main([str(path), "--verify", "never", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["tensors"], report["counters"]) == (97, 19)
    found = sources.open_file(tmp_path / "native.pth")[0]
    counts = {key: value.item() for key, value in found.items() if key.endswith("num_batches_tracked")}
    assert counts == {key: expected if isinstance(expected, int) else expected.get(key, 0) for key in counts}


@pytest.mark.parametrize("stored", ["-1", "1.5", "true", '{"bn1.num_batches_tracked": "5"}', "[" * 100_000, str(2**63)])
def test_counters_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], stored: str) -> None:
    path = save(tmp_path, "resnet20_cifar", {}, num_batches_tracked=stored)
    assert flax2torch.main([str(path), "--verify", "never"]) == 1
    assert "num_batches_tracked is not a number" in capsys.readouterr().err
    assert not (tmp_path / "native.pth").exists()


@pytest.mark.parametrize(
    ("arch", "chosen", "metadata", "dialect"),
    [
        ("resnet20_cifar", {}, {}, "torchvision"),
        ("resnet20_cifar", {}, {"dialect": "akamaster"}, "akamaster"),
        ("resnet18_d2l", {}, {}, "resnet18_d2l"),
    ],
)
def test_the_default_dialect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arch: str, chosen: dict, metadata: dict, dialect: str
) -> None:
    path = save(tmp_path, arch, chosen, **metadata)
    assert flax2torch.main([str(path), "--verify", "never", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dialect"] == dialect


def test_a_file_that_exists_is_replaced_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``mine.pth`` beside ``mine.safetensors`` is what the latter was converted from, with its optimizer and all."""
    path = save(tmp_path, "resnet20_cifar", {})
    for output, more in ((path.with_suffix(".pth"), []), (tmp_path / "x.pt", ["--output", str(tmp_path / "x.pt")])):
        output.write_text("the user's")
        assert flax2torch.main([str(path), "--verify", "never", *more]) == 1
        assert f"{output} exists: --force replaces it" in capsys.readouterr().err
        assert output.read_text() == "the user's"
        assert flax2torch.main([str(path), "--verify", "never", "--force", *more]) == 0
        assert len(sources.open_file(output)[0]) == 97 + 19


def test_safetensors(tmp_path: Path) -> None:
    path, output = save(tmp_path, "resnet34_projection", {"num_classes": 10}), tmp_path / "out.safetensors"
    assert flax2torch.main([str(path), "--output", str(output), "--verify", "never"]) == 0
    expected = statedict.state_dict(native.load(path), "resnet34_projection")
    tensors, metadata = native.read_safetensors(output)
    assert metadata == {"format": "pt"}
    assert native.digest(tensors) == native.digest(expected)
    assert tensors["layer1.0.left.0.weight"].tobytes() == tensors["Conv.0.0.left.0.weight"].tobytes()


def test_a_file_in_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "native.safetensors"
    model = jresnet.create("resnet20_cifar")
    values = {name: np.asarray(value, ml_dtypes.bfloat16) for name, value in params.arrays(model).items()}
    native.save(path, params.fill(model.config, values))
    assert flax2torch.main([str(path), "--verify", "never"]) == 0
    assert "parameters in bfloat16 are written as float32" in capsys.readouterr().out
    found = statedict.match(sources.open_file(path.with_suffix(".pth"))[0], "resnet20_cifar")
    assert all(np.array_equal(found.values[name], value.astype(np.float32)) for name, value in values.items())


def test_a_network_of_no_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "native.safetensors"
    model = jresnet.ResNet(jresnet.ResNetConfig("basic", (1,), (8,), 3), rngs=nnx.Rngs(0))
    native.save(path, model)
    assert flax2torch.main([str(path), "--verify", "never"]) == 0
    assert "a ResNet without a name" in capsys.readouterr().out
    found = statedict.match(sources.open_file(path.with_suffix(".pth"))[0])
    assert (found.arch, found.config) == (None, model.config)
    assert native.digest(found.values) == native.digest(params.arrays(model))


def test_a_folder_for_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Out and in again: weights, classes, preprocessing, and where the stride is."""
    config = jresnet.ResNetConfig("bottleneck", (1, 1), (4, 8), num_classes=2, stride_in="1x1")
    model, said = jresnet.ResNet(config, rngs=nnx.Rngs(0)), jresnet.Preprocessing(256, 224, interpolation="bicubic")
    native.save(tmp_path / "x.safetensors", model, preprocessing=said, categories=["cat", "dog"])
    arguments = [str(tmp_path / "x.safetensors"), "--output", str(tmp_path / "out"), "--verify", "never"]
    assert flax2torch.main(arguments) == 0
    assert "AutoModelForImageClassification.from_pretrained(" in capsys.readouterr().out
    assert flax2torch.main(arguments) == 1  # unasked, nothing is replaced
    assert "exists: --force" in capsys.readouterr().err
    for source in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        found = sources.load(source)
        assert (found.config, found.categories, found.preprocessing) == (config, ("cat", "dog"), said)
        assert native.digest(found.values) == native.digest(params.arrays(model))
    arguments[0] = str(tmp_path / "cifar.safetensors")
    native.save(arguments[0], jresnet.create("resnet20_cifar"))
    assert flax2torch.main([*arguments, "--force"]) == 1
    assert "transformers has no such network" in capsys.readouterr().err


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    """torch and torchvision cannot be imported here; what cannot be compared is said."""
    for name in ("torch", "torchvision"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    path = tmp_path / "mine.safetensors"
    native.save(path, jresnet.create("resnet18", num_classes=3), "resnet18")
    environment = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "PATH": "/usr/bin:/bin"}
    done = command("-m", "convert.flax2torch", path.name, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert [title for title, _ in lines[1:6]] == ["source", "mapped", "verify", "skipped", "wrote"]
    assert "102 tensors and 20 num_batches_tracked (torchvision naming)" in done.stdout
    assert "comparison with PyTorch: torch is not installed" in done.stdout
    assert done.stdout.endswith(
        "load it with\n"
        "         model = torchvision.models.resnet18(num_classes=3)\n"
        "         model.load_state_dict(torch.load('mine.pth', weights_only=True))\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "arguments are required: FILE"),
        (["{good}", "--dialect", "tf"], 2, "invalid choice"),
        (["none.safetensors"], 1, "none.safetensors"),
        (["x.pth"], 1, "x.pth is already a PyTorch file"),
        (["{good}", "--output", "{good}"], 1, "is the file to convert"),
        (["{good}", "--output", "x.onnx"], 1, "must end in .pth, .pt or .safetensors"),
        (["{good}", "--output", "none/x.pth"], 1, "there is no folder none"),
        (["{good}", "--dialect", "kuangliu"], 1, "shortcut is 'projection' there, 'pad' here"),
        (["{foreign}"], 1, "is not a jresnet-1 file"),
        (["{cut}"], 1, "cut.safetensors"),
        ([""], 1, "found a folder or a device"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    good = save(tmp_path, "resnet20_cifar", {})
    cut, foreign = tmp_path / "cut.safetensors", tmp_path / "foreign.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    foreign.write_bytes(safetensors.numpy.save({"conv1.weight": np.zeros((1, 1))}))
    before = sorted(tmp_path.rglob("*"))
    arguments = [argument.format(good=good, cut=cut, foreign=foreign) for argument in arguments] + ["--verify", "never"]
    if code == 2:
        with pytest.raises(SystemExit, match="2"):
            flax2torch.main(arguments)
    else:
        assert flax2torch.main(arguments) == code
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_what_does_not_read_back_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, honest = save(tmp_path, "resnet20_cifar", {}), torchsave.write

    def spoilt(path: Path, tensors: dict[str, np.ndarray]) -> None:
        honest(path, tensors | {"bn1.num_batches_tracked": np.array(1)})

    monkeypatch.setattr(torchsave, "write", spoilt)
    assert flax2torch.main([str(path), "--verify", "never"]) == 1
    assert "differs from what was written" in capsys.readouterr().err
    assert not (tmp_path / "native.pth").exists()
