"""Files written by torch, converted by the command, and compared with torchvision by it."""

from __future__ import annotations

import json
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from conftest import command

from convert import torch2flax, verify
from jresnet import files


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
    "a module of modules", "a list", "an object beside it", "a whole module", "a whole DataParallel",
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

    from jresnet.errors import WeightsError
    from jresnet.models import params
    from jresnet.pytorch import statedict

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
    from jresnet.pytorch import statedict

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
    from jresnet.models import params
    from jresnet.pytorch import statedict

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
    from jresnet.errors import WeightsError

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
