"""Files written by torch, converted by the command, and compared with torchvision by it."""

from __future__ import annotations

import json
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from conftest import command

from convert import reference, torch2flax, verify
from jresnet import files, sources
from jresnet.errors import WeightsError
from jresnet.models import params
from jresnet.models.resnet import ResNetConfig
from jresnet.pytorch import keymap, statedict


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save(tmp_path: Path, capsys: pytest.CaptureFixture[str], zipped: bool) -> None:
    source, output = tmp_path / "resnet18.pth", tmp_path / "resnet18.safetensors"
    model = networks.build("resnet18")
    torch.save(model.state_dict(), source, _use_new_zipfile_serialization=zipped)
    arguments = ["resnet18", "--weights", str(source), "--output", str(output), "--verify", "always", "--json"]
    assert torch2flax.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["tensors"], report["dropped"], report["dialect"]) == (102, 20, "torchvision")
    assert report["verify"]["done"]
    assert report["verify"]["jresnet"] <= verify.ALLOWED * report["verify"]["torch"]
    assert output.exists()


def test_a_published_file_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name, from torch's own cache folder, its digest checked; a file of the right name and wrong content is refused."""
    import dataclasses

    import jresnet
    from jresnet.weights import published as pretrained

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    row = pretrained.find("resnet18")
    path = pretrained.cache_dir() / row.filename
    path.parent.mkdir(parents=True)
    reference = networks.build("resnet18")
    torch.save(reference.state_dict(), path)
    assert torch2flax.main(["resnet18"]) == 1
    assert "is damaged or another file" in capsys.readouterr().err
    assert list(tmp_path.rglob("*.safetensors")) == []

    mine = dataclasses.replace(row, sha256=files.sha256_of(path))
    monkeypatch.setattr(pretrained, "find", lambda *_: mine)
    output = tmp_path / "out.safetensors"
    assert torch2flax.main(["resnet18", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "IMAGENET1K_V1 (torchvision's default): 69.758 % top-1" in printed
    assert "relative distance to PyTorch's float64 logits" in printed
    model = jresnet.create("resnet18", weights="IMAGENET1K_V1")
    found = verify.compare(model, reference, 64)
    assert found.is_rounding, found
    with pytest.warns(UserWarning, match="new head for 10 classes"):
        fresh = jresnet.create("resnet18", weights="IMAGENET1K_V1", num_classes=10)
    assert fresh.fc.bias[...].shape == (10,)


def test_pytorchs_networks_bring_in_no_jax() -> None:
    """In the benchmark it would count as PyTorch's memory and start."""
    code = "import sys; from convert import reference; reference.ResNet; assert 'jax' not in sys.modules"
    done = command("-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr


def small(classes: int = 7) -> torch.nn.Module:
    """A network without a row of the zoo."""
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    networks.randomise(model)
    return model.eval()


FORMS = (
    "compile of DataParallel", "Lightning", "timm's train.py", "DINO", "mmpretrain", "a head behind a Dropout", "halved",
    "a module of modules", "a list", "an object beside it", "a whole module", "a whole DataParallel", "a whole compile",
)  # fmt: skip


class Beside:
    """A script's own class, whose objects it saves beside the tensors."""

    def __init__(self) -> None:
        self.lr, self.me = 0.1, self


def forms(model: torch.nn.Module) -> dict[str, object]:
    """What training scripts save of ``model``."""
    from torch import nn
    from torch.nn import DataParallel

    state = model.state_dict()
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    behind_dropout = dict(state)
    for leaf in ("weight", "bias"):
        behind_dropout[f"fc.1.{leaf}"] = behind_dropout.pop(f"fc.{leaf}")
    lightning = {f"model.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(7)}
    return {
        "compile of DataParallel": torch.compile(DataParallel(model), backend="eager").state_dict(),
        "Lightning": {
            "epoch": 3, "pytorch-lightning_version": "2.5", "state_dict": lightning, "hyper_parameters": {"lr": 0.1},
            "optimizer_states": [optimizer.state_dict()],
        },
        "timm's train.py": {"epoch": 3, "state_dict": other, "state_dict_ema": state, "optimizer": optimizer.state_dict()},
        "DINO": {
            "student": {f"module.backbone.{key}": value for key, value in other.items()},
            "teacher": {f"backbone.{key}": value for key, value in state.items()},
        },
        "mmpretrain": {
            "meta": {},
            "state_dict": {("head." if key.startswith("fc.") else "backbone.") + key: v for key, v in state.items()},
        },
        "a head behind a Dropout": behind_dropout,
        "halved": {key: value.half() for key, value in state.items()},
        "a list": [3, state],
        "an object beside it": {"model": state, "args": Beside(), "where": Path("x"), "best": np.float32(3) * np.ones(2)},
        "a whole module": model,
        "a whole DataParallel": {"model": DataParallel(model), "epoch": 3},
        "a whole compile": torch.compile(DataParallel(model), backend="eager"),
        "a module of modules": nn.ModuleDict({"any": nn.ModuleList([nn.Linear(2, 2), model])}).state_dict(),
    }  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_people_have(tmp_path: Path, form: str) -> None:
    """A file written by torch becomes the network that it came from, with nothing said."""
    import jresnet

    model = small()
    torch.save(forms(model)[form], tmp_path / "model.pth")
    if form == "halved":
        model = model.half().float()
    found = verify.compare(jresnet.load(tmp_path / "model.pth"), model, 64)
    assert found.is_rounding, found


def tiny(**options: object) -> torch.nn.Module:
    """A network of a few kilobytes with torchvision's names, for forms in which only names and places differ."""
    config = ResNetConfig("basic", (1, 1, 1, 1), (4, 8, 12, 16), **{"num_classes": 7} | options)
    torch.manual_seed(0)
    model = reference.network(None, config)
    networks.randomise(model)
    return model.eval()


def check(path: Path, model: torch.nn.Module, **chosen: object) -> statedict.Conversion:
    """Asserts that the file's logits, or its features if it has no head, are those of ``model``."""
    weights = sources.load(path, **chosen)
    found = verify.compare(params.fill(weights.config, weights.values), model, 64)
    assert found.is_rounding, found
    return weights.conversion


PREFIXES = (
    "module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.", "base_encoder.", "encoder_q.", "resnet.",
    "student.", "teacher.", "module._orig_mod.", "_orig_mod.module.model.", "model.backbone.encoder.resnet.net.",
    "online.never_seen.", "layer1.0.", "net/",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    model = tiny()
    torch.save({"epoch": 3, "weights": {prefix + k: v for k, v in model.state_dict().items()}}, tmp_path / "model.pth")
    assert check(tmp_path / "model.pth", model).notes == ()
    check(tmp_path / "model.pth", model, prefix=prefix, key="weights")


HEADS = ("fc.1", "fc.0", "last_linear", "classifier", "classifier.1", "head", "head.fc", "my_head")


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("bias", [True, False])
def test_heads(tmp_path: Path, name: str, bias: bool) -> None:
    model = tiny()
    if not bias:
        model.fc.bias = None
    state = {k.replace("fc.", f"{name}."): v for k, v in model.state_dict().items()}
    if name != "my_head":  # which is found only if nothing else is there
        state["loss.weight"] = torch.ones(7)
    torch.save(state, tmp_path / "model.pth")
    found = check(tmp_path / "model.pth", model)
    assert (f"{name} has no bias: zeros are used" in found.notes) == (not bias)


def linear(name: str, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(outputs, inputs), f"{name}.bias": torch.randn(outputs)}


MLP = linear("fc.0", 16, 16) | linear("fc.2", 16, 8)
# Forms without a last layer: what is beside the body, what its keys begin with, and a note
HEADLESS = {
    "no fc": ({}, "", "the last layer is missing"),
    "projection head in fc": (MLP, "", "fc.0.weight, fc.0.bias, fc.2.weight, fc.2.bias"),
    "projector": (linear("projector", 16, 8), "backbone.", "projector.weight, projector.bias"),
    "SwAV": (
        linear("module.projection_head.0", 16, 8) | {"module.prototypes.weight": torch.randn(30, 8)},
        "module.",
        "projection_head.0.weight, module.projection_head.0.bias, module.prototypes.weight",
    ),
    "SimSiam": (
        {f"module.encoder.{k}": v for k, v in MLP.items()} | linear("module.predictor.0", 8, 8),
        "module.encoder.",
        "module.predictor.0.weight",
    ),
    "MoCo": (
        {"module.queue": torch.randn(8, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)},
        "module.encoder_q.",
        "ignored, not part of the network: module.queue, module.queue_ptr",
    ),
}


@pytest.mark.parametrize("form", HEADLESS)
def test_files_without_a_head(tmp_path: Path, form: str) -> None:
    """The body's features, or a fresh head if a number of classes is asked for."""
    import jresnet

    beside, prefix, note = HEADLESS[form]
    model = tiny()
    model.fc = torch.nn.Identity()
    body = model.state_dict()
    state = {prefix + k: v for k, v in body.items()} | beside
    if form == "MoCo":
        state = {f"module.encoder_k.{k}": torch.zeros_like(v) for k, v in body.items()} | state
    torch.save({"arch": "x", "state_dict": state}, tmp_path / "model.pth")
    found = check(tmp_path / "model.pth", model)
    assert found.headless
    assert any(note in said for said in found.notes)
    assert any("also found: 'module.encoder_k.'" in said for said in found.notes) == (form == "MoCo")
    with pytest.warns(UserWarning, match="new head for 3 classes, to be trained"):
        fresh = jresnet.create(weights=tmp_path / "model.pth", num_classes=3)
    assert fresh.fc.kernel[...].shape == (16, 3)


def beside(model: torch.nn.Module) -> dict[str, tuple[object, str]]:
    """Networks with other entries, and what the notes say of these."""
    state = model.state_dict()
    counters = {
        f"{name}.total_ops".lstrip("."): torch.zeros(1, dtype=torch.float64) for name, _ in model.named_modules()
    }
    wrapped = torch.nn.ModuleDict({"model": model, "loss": torch.nn.CrossEntropyLoss(torch.ones(7))})
    wrapped.register_buffer("mean", torch.zeros(3, 1, 1))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    return {
        "a profiler's counters": (state | counters, "total_ops, conv1.total_ops, bn1.total_ops"),
        "a loss and a buffer": (wrapped.state_dict(), "ignored, not part of the network: mean, loss.weight"),
        "flat DINO": (
            {f"student.{k}": v for k, v in other.items()} | {f"teacher.{k}": v for k, v in state.items()},
            "read from 'teacher.'; also found: 'student.'",
        ),
        "timm's EMA": (
            {"state_dict": other, "state_dict_ema": {f"module.{k}": v for k, v in state.items()}},
            "read from 'state_dict_ema'; also found: 'state_dict'",
        ),
        "an averaged model": ({"model": other, "model_ema": averaged.state_dict()}, "read from 'model_ema'"),
        "halved counters": (
            {k: torch.tensor(7e4).half() if k.endswith("tracked") else v for k, v in state.items()},
            "ignored, not a number of batches: bn1.num_batches_tracked",
        ),
        "counters of an average": ({k: (v + 2 * v) / 3 for k, v in state.items()}, ""),
        "counters in bfloat16": ({k: v.bfloat16() if "tracked" in k else v for k, v in state.items()}, ""),
        "no counters": ({k: v for k, v in state.items() if "tracked" not in k}, ""),
        "Sequential(body, head)": (
            {("1." if k.startswith("fc.") else "0.") + k.removeprefix("fc."): v for k, v in state.items()},
            "1 is taken as the last layer",
        ),
    }  # fmt: skip


BESIDE = tuple(beside(tiny()))


@pytest.mark.parametrize("form", BESIDE)
def test_what_is_beside_the_network(tmp_path: Path, form: str) -> None:
    model = tiny()
    saved, note = beside(model)[form]
    torch.save(saved, tmp_path / "model.pth")
    found = check(tmp_path / "model.pth", model)
    assert any(note in said for said in found.notes) if note else found.notes == ()


@pytest.mark.parametrize("kept", ["first", "second", "both", "one of each"])
def test_two_names_of_one_tensor(tmp_path: Path, kept: str) -> None:
    """The tutorial's network registers its stages twice; files without copies have kept either name."""
    model = tiny(shortcut="projection_first")
    tensors = statedict.match(model.state_dict()).values
    state = {}
    for i, (path, value) in enumerate(tensors.items()):
        first = keymap.torch_key(path, "resnet34_projection")
        second = keymap.alias(first, "resnet34_projection") or first
        names = {"first": [first], "second": [second], "both": [first, second], "one of each": [(first, second)[i % 2]]}
        state |= dict.fromkeys(names[kept], torch.from_numpy(keymap.to_torch(value)))
    torch.save(state, tmp_path / "model.pth")
    assert check(tmp_path / "model.pth", model).dialect == "resnet34_projection"


def test_fastai(tmp_path: Path) -> None:
    """``Sequential(body, head)``: the body goes in, its own head, of pools and two linear layers, does not."""
    from torch import nn

    model = small()
    body = nn.Sequential(*list(model.children())[:-2])
    layers = (nn.BatchNorm1d(1024), nn.Dropout(), nn.Linear(1024, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    learner = nn.Sequential(body, nn.Sequential(nn.Identity(), nn.Flatten(), *layers))
    torch.save({"model": learner.state_dict(), "opt": {}}, tmp_path / "model.pth")
    model.fc = nn.Identity()
    found = check(tmp_path / "model.pth", model)
    assert (found.dialect, found.headless) == ("children", True)
    assert any(note.startswith("ignored, not part of the network: 1.2.weight, 1.2.bias") for note in found.notes)


def test_tensors_without_data() -> None:
    state = {key: value.to("meta") for key, value in tiny().state_dict().items()}
    with pytest.raises(WeightsError, match=r"62 without data, on torch's device meta: conv1\.weight, "):
        statedict.match(state)


def test_numpys_file_of_a_state_dict(tmp_path: Path) -> None:
    model = tiny()
    np.savez(tmp_path / "model.npz", **{f"module.{k}": v.numpy() for k, v in model.state_dict().items()})
    check(tmp_path / "model.npz", model)


def test_a_network_without_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command finds its sizes, says them in one line, and writes them into the file."""
    import jresnet

    model = tiny(num_classes=37, in_channels=5)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert torch2flax.main([str(tmp_path / "model.pth"), "--output", str(tmp_path / "x.safetensors")]) == 0
    line = "basic blocks 1-1-1-1, widths 4-8-12-16, 7x7 stem for 5 channels, projection shortcuts, 37 classes"
    assert f"found    an unnamed ResNet: {line}\n" in capsys.readouterr().out
    found = verify.compare(jresnet.load(tmp_path / "x.safetensors"), model, 64)
    assert found.is_rounding, found


def test_backbones_of_torchvision(tmp_path: Path) -> None:
    """IntermediateLayerGetter has no head; a segmentation network's is none of a ResNet's."""
    from torchvision.models._utils import IntermediateLayerGetter

    import jresnet

    model = small()
    backbone = IntermediateLayerGetter(model, {"layer4": "out"})
    state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.ones(9, 512, 3, 3)}, tmp_path / "model.pth")
    found = jresnet.create(weights=tmp_path / "model.pth")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = backbone(images)["out"].numpy().transpose(0, 2, 3, 1)
    given = found.features(images.numpy().transpose(0, 2, 3, 1))["layer4"]
    np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_the_backbone_of_a_segmentation_network(tmp_path: Path) -> None:
    """Its last layer, ``classifier.4``, is a convolution; the backbone is dilated, as torchvision's are."""
    from torchvision.models._utils import IntermediateLayerGetter

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = IntermediateLayerGetter(
                bottlenecks(replace_stride_with_dilation=[False, True, True]), {"layer4": "out"}
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.backbone(x)["out"].mean((2, 3))

    model = Features().eval()
    head = {"classifier.4.weight": torch.ones(9, 256, 1, 1), "classifier.4.bias": torch.ones(9)}
    torch.save({"model": model.state_dict() | head}, tmp_path / "model.pth")
    found = check(tmp_path / "model.pth", model)
    assert (found.config.output_stride, found.headless) == (8, True)


def test_the_command_needs_a_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"net": networks.build("resnet18", num_classes=10).state_dict()}, "model.pth")
    assert torch2flax.main(["model.pth"]) == 0
    printed = capsys.readouterr().out
    line = "basic blocks 2-2-2-2, widths 64-128-256-512, 7x7 stem for 3 channels, projection shortcuts, 10 classes"
    assert f"found    resnet18: {line}\n" in printed
    assert "assumed  no dilation (else --output-stride), ReLU after each block's sum\n" in printed
    assert "verified against PyTorch's resnet18 under these assumptions: relative distance" in printed
    assert Path("resnet18-model.safetensors").exists()


@pytest.mark.parametrize("draws", [30, pytest.param(200, marks=pytest.mark.long)])
def test_no_draw_decides_whether_a_conversion_is_right(draws: int) -> None:
    """All correct conversions pass, and each of a tenth with one wrong tensor is refused."""

    refused = 0
    for seed in range(draws):
        torch.manual_seed(seed)
        network = networks.CifarResNet(8)
        networks.randomise(network)
        found = statedict.match(network.state_dict())
        tensors = found.torchvision()
        model = params.fill(found.config, found.values)
        assert verify.check(model, "resnet8_cifar", tensors, "always").done
        if seed % 10 == 0:
            path = sorted(found.values)[seed // 2 % len(found.values)]
            broken = found.values | {path: np.roll(found.values[path], 1)}
            with pytest.raises(WeightsError, match="is not the network PyTorch computes"):
                verify.check(params.fill(found.config, broken), "resnet8_cifar", tensors, "always")
            refused += 1
    assert refused == draws // 10


# --- Networks of the same tensors and another function


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_segmentation_networks_are_dilated(name: str) -> None:
    model = getattr(networks.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=2)
    found = statedict.match(model.state_dict())
    assert (found.arch, found.config.output_stride, found.config.num_classes) == ("resnet50", 8, 0)
    assert any("as torchvision's segmentation networks have it" in note for note in found.notes)
    assert statedict.match(model.state_dict(), output_stride=32).config.output_stride is None


def bottlenecks(**options: object) -> torch.nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    torch.manual_seed(0)
    model = ResNet(Bottleneck, [1, 1, 2, 2], num_classes=7, **options)
    networks.randomise(model)
    return model.eval()


def caffe() -> torch.nn.Module:
    model = bottlenecks()
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return model


def pooled() -> torch.nn.Module:
    model = small()
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    return model


def unpooled() -> torch.nn.Module:
    model = small()
    model.maxpool = torch.nn.Identity()
    return model


FUNCTIONS = {
    "caffe": (caffe, {"stride_in": "1x1"}, {"meta": {"cfg": "backbone=dict(type='ResNet', depth=50, style='caffe')"}}),
    "dilated": (
        lambda: bottlenecks(replace_stride_with_dilation=[False, True, True]),
        {"output_stride": 8},
        {"hyper_parameters": {"replace_stride_with_dilation": [False, True, True]}},
    ),
    "pooled": (pooled, {"stem": "cifar_pool"}, {"args": {"use_maxpool": True}}),
    "unpooled": (unpooled, {"stem": "imagenet_no_pool"}, {"args": {"no_max_pool": True}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_what_shapes_do_not_tell(tmp_path: Path, kind: str) -> None:
    """By an option, by what the checkpoint says, and by the whole module: the logits of the network that wrote the file."""
    import jresnet

    build, option, said = FUNCTIONS[kind]
    model = build()
    state = model.state_dict()
    right = params.fill(*_of(statedict.match(state, **option)))
    found = verify.compare(right, model, 64)
    assert found.is_rounding, found
    for i, saved in enumerate((said | {"state_dict": state}, model, {"model": model})):
        torch.save(saved, tmp_path / f"{i}.pth")
        assert jresnet.load(tmp_path / f"{i}.pth").config == right.config
    if "stem" not in option:  # a 3x3 stem is taken to have no max-pool
        other = params.fill(*_of(statedict.match(state)))
        assert not verify.compare(other, model, 64).jresnet < 0.01


def _of(found: object) -> tuple:
    return found.config, found.values  # type: ignore[attr-defined]


def test_the_command_takes_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = caffe()
    torch.save(model.state_dict(), tmp_path / "caffe.pth")
    arguments = [str(tmp_path / "caffe.pth"), "--output", str(tmp_path / "x.safetensors"), "--force"]
    assert torch2flax.main([*arguments, "--verify", "never"]) == 0
    printed = capsys.readouterr().out
    assert "assumed  stride on the 3x3 convolution (else --stride-in 1x1), no dilation (else " in printed
    assert torch2flax.main([*arguments, "--stride-in", "1x1"]) == 0
    printed = capsys.readouterr().out
    assert "stride on the 1x1 convolution, 7 classes" in printed
    assert "verified against PyTorch's network of this configuration" in printed


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_torchscript(tmp_path: Path, how: str) -> None:
    import jresnet

    model = small()
    program = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.ones(1, 3, 64, 64))
    torch.jit.save(program, tmp_path / "model.pt")
    found = verify.compare(jresnet.load(tmp_path / "model.pt"), model, 64)
    assert found.is_rounding, found


def test_pre_activation_is_refused(tmp_path: Path) -> None:
    """The blocks of He et al. 2016b: normalisation, ReLU, convolution."""
    import jresnet

    class Block(torch.nn.Module):
        def __init__(self, inputs: int, outputs: int):
            super().__init__()
            self.bn1, self.conv1 = torch.nn.BatchNorm2d(inputs), torch.nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
            self.bn2, self.conv2 = torch.nn.BatchNorm2d(outputs), torch.nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.shortcut = torch.nn.Sequential(torch.nn.Conv2d(inputs, outputs, 1, 2, bias=False))

    model = torch.nn.ModuleDict({"conv1": torch.nn.Conv2d(3, 8, 3, bias=False), "linear": torch.nn.Linear(32, 10)})
    model.update({f"layer{i + 1}": torch.nn.Sequential(Block(8 * 2**i, 16 * 2**i)) for i in range(2)})
    torch.save({"net": model.state_dict()}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="contains a pre-activation ResNet"):
        jresnet.load(tmp_path / "model.pth")
