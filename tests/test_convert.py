"""Import of PyTorch weights, without torch."""

from __future__ import annotations

import json
import os
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import REPOSITORY, command, randomise
from flax import nnx

import jresnet
from convert import flax2torch, torch2flax, verify
from jresnet.errors import InputError, WeightsError
from jresnet.models import params, zoo
from jresnet.models.zoo import ZOO
from jresnet.pytorch import keymap, statedict
from jresnet.weights import native


def state_dict_of(arch: str, dialect: str = "torchvision", **chosen) -> dict[str, np.ndarray]:
    """Random tensors by PyTorch's keys, in PyTorch's layout."""
    draw = np.random.default_rng(0)
    shapes = params.shapes(zoo.configure(arch, **chosen))
    tensors = {
        keymap.torch_key(path, dialect): draw.uniform(0.5, 1.5, keymap.torch_shape(shape)).astype(np.float32)
        for path, shape in shapes.items()
    }
    norms = [key.removesuffix("running_var") for key in tensors if key.endswith("running_var")]
    return tensors | {f"{norm}num_batches_tracked": np.array(7) for norm in norms}


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return state_dict_of("resnet20_cifar")


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path.write_bytes(safetensors.numpy.save({key: np.ascontiguousarray(value) for key, value in tensors.items()}))
    return path


def networks_of(dialect: str) -> list[str]:
    """The rows of the zoo that a dialect may have, by what cannot be chosen."""
    shared = {name: value for name, value in keymap.DIALECTS[dialect].config.items() if name not in zoo.FREE}
    return [row.name for row in ZOO.values() if all(getattr(row.config, name) == v for name, v in shared.items())]


def kinds() -> set[str]:
    """The shallowest row of each kind of network, so that all kinds of names occur."""
    first: dict[str, str] = {}
    for row in sorted(ZOO.values(), key=lambda row: sum(row.config.depths)):
        counted = {"depths": None, "widths": None, "num_classes": None, "pruned": row.config.pruned is not None}
        first.setdefault(str(sorted((vars(row.config) | counted).items())), row.name)
    return {*first.values()}


# A network's dialects follow each other: params.shapes keeps the newest 64 networks.
@pytest.mark.parametrize(
    ("arch", "dialect"),
    [
        pytest.param(arch, d, marks=[] if arch in kinds() else [pytest.mark.long])
        for arch in ZOO for d in keymap.DIALECTS if arch in networks_of(d)
    ],
)  # fmt: skip
def test_names_are_a_bijection(arch: str, dialect: str) -> None:
    if arch == "resnet1202_cifar":
        arch = "resnet110_cifar"  # the same names, a tenth of the time
    paths = params.shapes(zoo.configure(arch))
    keys = {keymap.torch_key(path, dialect) for path in paths}
    assert len(keys) == len(paths)
    counters = {keymap.counter_key(path, dialect) for path in paths if path.endswith(".var")}
    aliases = {keymap.alias(key, dialect) for key in keys} - {None}
    assert not counters & keys
    assert not aliases & (keys | counters)


def test_every_leaf_is_the_tensor_of_its_name(tensors: dict[str, np.ndarray]) -> None:
    model = torch2flax.convert(tensors, "resnet20_cifar")
    np.testing.assert_array_equal(model.conv1.kernel[...], tensors["conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(model.fc.kernel[...], tensors["fc.weight"].T)
    block = model.layer2[1]
    for leaf, key in (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var")):
        np.testing.assert_array_equal(getattr(block.bn2, leaf)[...], tensors[f"layer2.1.bn2.{key}"])


@pytest.mark.parametrize("prefix", ["module.", "net.", "backbone.", "_orig_mod.module.model.", "what.ever.0."])
@pytest.mark.parametrize("outer", [None, "state_dict", "model_ema", "what it is"])
def test_wrappers_are_peeled(tensors: dict[str, np.ndarray], prefix: str, outer: str | None) -> None:
    wrapped = {prefix + key: value for key, value in tensors.items()}
    model = torch2flax.convert({outer: wrapped, "epoch": 3} if outer else wrapped, "resnet20_cifar")
    np.testing.assert_array_equal(model.fc.bias[...], tensors["fc.bias"])


def test_akamasters_names() -> None:
    tensors = state_dict_of("resnet20_cifar", "akamaster")
    assert "linear.weight" in tensors
    found = statedict.match(tensors, "resnet20_cifar")
    assert (found.dialect, len(found.counters), len(found.values)) == ("akamaster", 19, 97)
    assert set(found.counters.values()) == {7}
    np.testing.assert_array_equal(found.values["fc.bias"], tensors["linear.bias"])


def test_a_dialect_can_be_forced(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(
        WeightsError,
        match=r"contains no ResNet in weiaicunzai naming: there is one without a prefix in torchvision naming$",
    ):
        torch2flax.convert(tensors, "resnet20_cifar", dialect="weiaicunzai")
    with pytest.raises(InputError, match="unknown dialect 'keras': there are torchvision, akamaster"):
        torch2flax.convert(tensors, "resnet20_cifar", dialect="keras")


def test_a_fresh_head_is_drawn_where_asked_for(tensors: dict[str, np.ndarray]) -> None:
    """The file's own head where the number is its own; a fresh one, by the seed, where it is another."""
    own = torch2flax.convert(tensors, "resnet20_cifar", num_classes=10)
    np.testing.assert_array_equal(own.fc.kernel[...], tensors["fc.weight"].T)
    fresh = [torch2flax.convert(tensors, "resnet20_cifar", num_classes=7, seed=seed) for seed in (0, 0, 1)]
    assert fresh[0].fc.kernel[...].shape == (64, 7)
    np.testing.assert_array_equal(fresh[0].fc.kernel[...], fresh[1].fc.kernel[...])
    assert not np.array_equal(fresh[0].fc.kernel[...], fresh[2].fc.kernel[...])
    np.testing.assert_array_equal(fresh[0].conv1.kernel[...], own.conv1.kernel[...])


def test_other_input_channels(tensors: dict[str, np.ndarray]) -> None:
    kernel = tensors["conv1.weight"].transpose(2, 3, 1, 0)
    grey = torch2flax.convert(tensors, "resnet20_cifar", in_channels=1)
    np.testing.assert_allclose(grey.conv1.kernel[...], kernel.sum(2, keepdims=True), rtol=1e-6)
    four = torch2flax.convert(tensors, "resnet20_cifar", in_channels=4)
    np.testing.assert_allclose(four.conv1.kernel[...], kernel[:, :, [0, 1, 2, 0]] * 0.75, rtol=1e-6)
    one = state_dict_of("resnet20_cifar", in_channels=1)
    with pytest.raises(WeightsError, match="its in_channels is 1, not 4: only a stem for 3 can be adapted"):
        torch2flax.convert(one, "resnet20_cifar", in_channels=4)


def test_counters_are_of_any_dtype(tensors: dict[str, np.ndarray]) -> None:
    """Halved, averaged and float files are whole networks: nothing reads the counters."""
    names = [key for key in tensors if key.endswith(keymap.COUNTER)]
    for dtype in (np.float16, np.float32, np.int32):
        found = statedict.match(tensors | {name: np.array(7.4, dtype) for name in names})
        assert set(found.counters.values()) == {7}
    odd = {"bn1.num_batches_tracked": np.zeros(3), "layer1.0.bn1.num_batches_tracked": np.array(np.inf, np.float16)}
    found = statedict.match(tensors | odd)
    assert len(found.counters) == 17
    assert found.notes == (f"ignored, not a number of batches: {', '.join(odd)}",)
    with pytest.raises(WeightsError, match=r"1 unexpected: layer9\.num_batches_tracked$"):
        statedict.match(tensors | {"layer9.num_batches_tracked": np.array(1)})


@pytest.mark.parametrize(
    ("dialect", "found", "asked"),
    [
        ("kuangliu", "resnet50", "resnet18"),
        ("torchvision", "wide_resnet50_2", "resnet50"),
        ("akamaster", "resnet32_cifar", "resnet20_cifar"),
    ],
)
def test_the_right_architecture_is_named(dialect: str, found: str, asked: str) -> None:
    chosen = {name: v for name, v in keymap.DIALECTS[dialect].config.items() if name in zoo.FREE}
    with pytest.raises(WeightsError, match=f"contains a {found}, not a {asked}: name that architecture$"):
        torch2flax.convert(state_dict_of(found, dialect, num_classes=7, **chosen), asked)


def test_names_of_a_stranger_are_printable(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(WeightsError) as caught:
        torch2flax.convert(tensors | {"layer1.\x1b[2J": np.zeros(1, np.float32)}, "resnet20_cifar")
    assert str(caught.value).isprintable()
    (note,) = statedict.match(tensors | {"\x1b[2J": np.zeros(1, np.float32)}).notes
    assert note.isprintable()


def test_a_container_that_holds_itself(tensors: dict[str, np.ndarray]) -> None:
    endless: dict = {}
    endless["model"] = endless
    with pytest.raises(WeightsError, match="expected a state_dict"):
        torch2flax.convert(endless, "resnet20_cifar")


def test_half_precision_becomes_float32(tensors: dict[str, np.ndarray]) -> None:
    import ml_dtypes

    for dtype in (np.float16, np.float64, ml_dtypes.bfloat16):
        narrow = {key: value if value.ndim == 0 else value.astype(dtype) for key, value in tensors.items()}
        bias = torch2flax.convert(narrow, "resnet20_cifar").fc.bias[...]
        assert bias.dtype == np.float32
        np.testing.assert_array_equal(bias, tensors["fc.bias"].astype(dtype).astype(np.float32))


def test_everything_that_is_wrong_is_listed(tensors: dict[str, np.ndarray]) -> None:
    odd = dict(tensors)
    del odd["layer1.0.bn1.running_mean"], odd["conv1.weight"]
    odd["layer9.weight"] = np.zeros(3, np.float32)
    odd["layer2.0.conv1.weight"] = np.zeros((100, 64), np.float32)
    odd["bn1.weight"] = np.zeros(16, np.int64)
    with pytest.raises(WeightsError) as caught:
        torch2flax.convert(odd, "resnet20_cifar")
    for part in (
        "2 missing: conv1.weight, layer1.0.bn1.running_mean", "1 unexpected: layer9.weight",
        "1 misshapen: layer2.0.conv1.weight is [100, 64], not [32, 16, 3, 3]",
        "1 of type int64, not floating point: bn1.weight",
    ):  # fmt: skip
        assert part in str(caught.value)


def test_stem_and_sizes_are_the_files() -> None:
    tensors = state_dict_of("resnet18", stem="cifar", in_channels=1, num_classes=10)
    for found in (torch2flax.convert(tensors), torch2flax.convert(tensors, "resnet18", stem="cifar", num_classes=10)):
        assert found.config == zoo.configure("resnet18", stem="cifar", in_channels=1, num_classes=10)
    with pytest.raises(WeightsError, match="contains a network whose stem is 'cifar', not 'imagenet': leave out stem"):
        torch2flax.convert(tensors, "resnet18", stem="imagenet")


@pytest.mark.parametrize("found", [{}, [], None, 3, {"epoch": 3}, {"state_dict": {"a": "b"}}, {3: np.zeros(2)}])
def test_what_is_no_state_dict(found: object) -> None:
    with pytest.raises(WeightsError, match=r"expected a state_dict .names to tensors., found"):
        torch2flax.convert(found, "resnet18")


def test_an_unknown_architecture(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(InputError, match="did you mean"):
        torch2flax.convert(tensors, "resnet21")


# The command line, as a command.


def test_the_command_converts(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    source, output = write(tmp_path / "mine.safetensors", tensors), tmp_path / "out.safetensors"
    done = command(
        "-m", "convert.torch2flax", "resnet20_cifar", "--weights", source, "--output", output, "--verify", "never"
    )
    assert done.returncode == 0, done.stderr
    assert "97 tensors, each used once (torchvision naming); 19 num_batches_tracked not used" in done.stdout
    arch, _, values, metadata = native.read(output)
    assert arch == "resnet20_cifar"
    np.testing.assert_array_equal(values["fc.bias"], tensors["fc.bias"])
    assert metadata["source"] == "mine.safetensors"
    assert len(metadata["source_sha256"]) == 64
    assert jresnet.create("resnet20_cifar", weights=output)


def test_the_command_needs_no_architecture(
    tensors: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    other = {f"b.{key}": value + 1 for key, value in tensors.items()}
    write(tmp_path / "mine.safetensors", {f"a.{key}": value for key, value in tensors.items()} | other)
    for more, expected in (([], 0), (["--prefix", "b"], 1)):
        assert torch2flax.main(["mine.safetensors", "--verify", "never", "--force", *more]) == 0
        printed = capsys.readouterr().out
        line = "basic blocks 3-3-3, widths 16-32-64, 3x3 stem for 3 channels, pad shortcuts, 10 classes"
        assert f"found    resnet20_cifar: {line}\n" in printed
        assert "assumed  stem at stride 1 without max-pool (else --stem cifar_pool), no dilation" in printed
        assert ("read from 'a.'; also found: 'b.'" in printed) == (not more)
        values = native.read(tmp_path / "resnet20_cifar-mine.safetensors")[2]
        np.testing.assert_array_equal(values["fc.bias"], tensors["fc.bias"] + expected)
    assert torch2flax.main(["mine.safetensors", "--shortcut", "pad", "--verify", "never", "--force"]) == 0
    with pytest.raises(SystemExit):
        torch2flax.main([])


def test_a_network_without_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = jresnet.ResNet(jresnet.ResNetConfig("basic", (1,), (4,), num_classes=2), rngs=nnx.Rngs(0))
    source = write(tmp_path / "mine.safetensors", statedict.state_dict(model))
    assert torch2flax.main([str(source), "--output", str(tmp_path / "out.safetensors")]) == 0
    assert "an unnamed ResNet: basic blocks 1, widths 4" in capsys.readouterr().out
    for file in (source, tmp_path / "out.safetensors"):
        assert jresnet.load(file).config == model.config


def test_a_fresh_head_for_a_file_without_one(tensors: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = {key: value for key, value in tensors.items() if not key.startswith("fc.")}
    source, output = write(tmp_path / "mine.safetensors", body), tmp_path / "out.safetensors"
    arguments = [str(source), "--output", str(output), "--verify", "never"]
    assert torch2flax.main(arguments) == 0
    assert native.read(output)[1].num_classes == 0
    assert torch2flax.main([*arguments, "--force", "--num-classes", "5"]) == 0
    assert "new head for 5 classes, to be trained: the weights have no head" in capsys.readouterr().out
    assert native.read(output)[1].num_classes == 5


def test_json(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    source = write(tmp_path / "mine.safetensors", tensors)
    done = command(
        "-m", "convert.torch2flax", "resnet20_cifar", "--weights", source, "--json", "--verify", "never",
        cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["output"] == "resnet20_cifar-mine.safetensors"
    assert report["tensors"] == 97
    assert report["verify"] == {"done": False, "reason": "--verify never"}
    assert (tmp_path / report["output"]).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["resnet51"], 1, "unknown architecture 'resnet51': did you mean resnet50"),
        (["mine"], 1, "there is no file 'mine': unknown architecture 'mine': there are resnet18, resnet34, resnet50, "),
        (["mine"], 1, "more (jresnet.list_models)"),
        ([], 2, "arguments are required: FILE|ARCH"),
        (["resnet50", "--verify", "sometimes"], 2, "invalid choice"),
        (["resnet50", "--weights", "IMAGENET1K_V3"], 1, "did you mean IMAGENET1K_V"),
        (["resnet20_cifar"], 1, "no weights are published for 'resnet20_cifar'"),
        (["resnet20_cifar", "--weights", "none.pth"], 1, "none.pth"),
        (["resnet20_cifar", "--weights", "{cut}"], 1, "is not a complete safetensors file"),
        (["resnet32_cifar", "--weights", "{good}"], 1, "contains a resnet20_cifar, not a resnet32_cifar"),
        (["resnet20_cifar", "--weights", "{good}", "--num-classes", "-1"], 1, "num_classes must be"),
        (["resnet20_cifar", "--weights", "{good}", "--output", "{good}"], 1, "is the file to convert"),
        (["resnet20_cifar", "--weights", "{good}", "--output", "none/out.safetensors"], 1, "there is no folder none"),
        (["resnet20_cifar", "--weights", "{good}", "--dialect", "keras"], 2, "invalid choice: 'keras'"),
        (["{good}", "--dialect", "weiaicunzai"], 1, "contains no ResNet in weiaicunzai naming"),
        (["{good}", "--prefix", "backbone"], 1, "contains no ResNet under 'backbone': there is one without a prefix"),
        (["{good}", "--shortcut", "conv"], 1, "whose shortcut is 'pad', not 'conv': leave out shortcut"),
        (["{good}", "--key", "model"], 1, "has no dict of tensors 'model': found '.'"),
        (["resnet20_cifar", "--weights", "hf:nothing"], 1, "hf:ORG/REPO[@REVISION]"),
    ],
)
def test_bad_input(
    tensors: dict, tmp_path: Path, arguments: list[str], code: int, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    good = write(tmp_path / "good.safetensors", tensors)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    before = sorted(tmp_path.rglob("*"))
    arguments = [argument.format(good=good, cut=cut) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    try:
        found = torch2flax.main(arguments)
    except SystemExit as end:  # argparse's
        found = end.code
    said = capsys.readouterr().err
    assert found == code, said
    assert message in said
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_without_torch_the_check_is_left_out_and_said_so(tensors: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise LookupError("torch is not installed")

    monkeypatch.setattr(verify, "import_torchvision", missing)
    model = torch2flax.convert(tensors, "resnet20_cifar")
    assert str(verify.check(model, "resnet20_cifar", {})) == "comparison with PyTorch: torch is not installed"
    with pytest.raises(InputError, match="--verify always: torch is not installed"):
        verify.check(model, "resnet20_cifar", {}, "always")


@pytest.mark.parametrize(
    ("jresnets", "torchs", "right"),
    [
        (9e-5, 1e-7, True),
        (2e-4, 1e-7, False),
        (2e-3, 1e-3, True),  # logits that nearly cancel
        (0.1, 1e-3, False),
        (float("nan"), 1e-7, False),
        (float("nan"), float("nan"), True),
        (float("inf"), 0.0, False),
    ],
)
def test_what_is_refused(
    tensors: dict, monkeypatch: pytest.MonkeyPatch, jresnets: float, torchs: float, right: bool
) -> None:
    monkeypatch.setattr(verify, "torch_model", lambda *_: None)
    monkeypatch.setattr(verify, "compare", lambda *_: verify.Check(True, jresnet=jresnets, torch=torchs))
    model = torch2flax.convert(tensors)
    if right:
        assert verify.check(model, None, {}).done
    else:
        with pytest.raises(WeightsError, match="is not the network PyTorch computes"):
            verify.check(model, None, {})


def test_the_distance_of_logits_that_are_zero() -> None:
    """Those of a head that was initialised to zero."""
    zero = np.zeros(3)
    assert (verify.relative(zero, zero), verify.relative(zero + 1, zero)) == (0, float("inf"))


def test_the_command_says_what_it_adapts(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    source, output = write(tmp_path / "mine-12345678.pt.safetensors", tensors), tmp_path / "out.safetensors"
    done = command(
        "-m", "convert.torch2flax", "resnet20_cifar", "--weights", source, "--output", output, "--verify", "never",
        "--num-classes", "7", "--in-channels", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "adapted  stem for 1 input channel: the kernel for 3, summed over the channels" in done.stdout
    assert "adapted  new head for 7 classes, to be trained: the weights have a head for 10" in done.stdout
    _, config, values, metadata = native.read(output)
    assert (config.num_classes, config.in_channels, values["fc.bias"].shape) == (7, 1, (7,))
    assert metadata["num_batches_tracked"] == "7"
    with pytest.warns(UserWarning, match="new head|stem for 1"):
        again = jresnet.create("resnet20_cifar", weights=output, num_classes=5, in_channels=1)
    assert again.config.num_classes == 5
    with pytest.raises(WeightsError, match="only a stem for 3 can be adapted"):
        jresnet.create("resnet20_cifar", weights=output, in_channels=3)


def test_a_file_that_exists_is_replaced_only_by_force(
    tensors: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.safetensors", tensors)
    arguments = ["resnet20_cifar", "--weights", "mine.safetensors", "--verify", "never"]
    for output in ("resnet20_cifar-mine.safetensors", "other.safetensors"):
        path = tmp_path / output
        path.write_text("the user's")
        more = ["--output", output] if output.startswith("other") else []
        assert torch2flax.main([*arguments, *more]) == 1
        assert f"{output} exists: --force replaces it" in capsys.readouterr().err
        assert path.read_text() == "the user's"
        assert torch2flax.main([*arguments, *more, "--force"]) == 0
        assert native.read(path)[0] == "resnet20_cifar"


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_only_an_ordinary_file_is_replaced(
    tensors: dict, native_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """As root ``--output /dev/null`` would take the device away."""
    source, output = write(tmp_path / "mine.safetensors", tensors), tmp_path / "out.safetensors"
    {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda path: os.symlink(source, path)}[kind](output)
    before, content = output.lstat(), source.read_bytes()
    for main, arguments in (
        (torch2flax.main, ["resnet20_cifar", "--weights", source]),
        (flax2torch.main, [native_file]),
    ):
        assert main([*map(str, arguments), "--output", str(output), "--force", "--verify", "never"]) == 1
        message = capsys.readouterr().err
        assert "is a link, a folder, a device or a pipe" in message or "is the file to convert" in message
        assert (output.lstat().st_ino, output.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert source.read_bytes() == content


def test_a_native_file_has_no_ending_of_pytorchs(
    tensors: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write(tmp_path / "mine.safetensors", tensors), tmp_path / "out.pth"
    assert torch2flax.main(["resnet20_cifar", "--weights", str(source), "--output", str(output)]) == 1
    assert "name the native file *.safetensors" in capsys.readouterr().err
    assert not output.exists()


def test_a_native_file_needs_no_conversion(
    native_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["resnet20_cifar", "--weights", str(native_file), "--output", str(tmp_path / "out.safetensors")]
    assert torch2flax.main(arguments) == 1
    assert "is already a native jresnet file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_commands_take_another_programs_name(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["jresnet.commands"]
    assert {"convert", "export-torch"} <= entries.keys()
    for name in ("convert", "export-torch"):
        main = EntryPoint(name, entries[name], "jresnet.commands").load()
        with pytest.raises(SystemExit, match="0"):
            main(["--help"], prog=f"jresnet {name}")
        assert f"usage: jresnet {name} " in capsys.readouterr().out


def test_a_deep_network_goes_through_its_own_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, with the stem's max-pool and all."""
    model = jresnet.create("resnet20_cifar", stem="imagenet")
    randomise(model)
    images = verify._images(model.config, 64, 2)
    whole = verify._logits(model, images)
    monkeypatch.setattr(verify, "TOGETHER", 0)
    np.testing.assert_allclose(verify._logits(model, images), whole, rtol=1e-4, atol=1e-5)
    assert isinstance(model.layer1[0], jresnet.BasicBlock)  # the caller's network is as it was


def test_the_network_trained_elsewhere(shared: Path, cifar10: Path, tmp_path: Path) -> None:
    """akamaster's ResNet-20: a legacy file, prefixed, CUDA storages; PyTorch gets 915 of the 1,000 clean images."""
    from flax import nnx

    from jresnet.data import cifar10 as data

    output = tmp_path / "resnet20.safetensors"
    source = shared / "weights" / "resnet20-12fca82f.th"
    assert torch2flax.main(["resnet20_cifar", "--weights", str(source), "--output", str(output)]) == 0
    model = jresnet.create("resnet20_cifar", weights=output)
    test = data.load_cifar10(cifar10, download=False).test
    mean, std = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))
    logits = nnx.jit(lambda model, x: model(x))(model, (test.images / np.float32(255) - mean) / std)
    assert int((np.asarray(logits).argmax(1) == test.labels).sum()) == 915
