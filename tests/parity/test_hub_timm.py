"""timm's own configurations, as it writes them for the Hub, and its networks' names of tensors."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import safetensors.torch
import torch
from networks import TORCHVISION

import jresnet
from convert import torch2flax, verify
from convert.installed import import_torchvision
from jresnet.errors import WeightsError
from jresnet.files import sha256_of
from jresnet.models import zoo
from jresnet.models.config import STEMS
from jresnet.weights import hub, timm_config
from jresnet.weights.preprocessing import Preprocessing

import_torchvision()  # which timm imports, and which does not import by itself beside a CPU build of torch

import timm  # noqa: E402
from timm.data import create_transform, resolve_model_data_config  # noqa: E402
from timm.models import get_pretrained_cfg, list_pretrained  # noqa: E402
from timm.models._hub import save_config_for_hf  # noqa: E402

TAGGED = [name for name in list_pretrained() if name.partition(".")[0] in zoo.IN_TIMM]


def skeleton(arch: str) -> Any:
    """timm's network without memory for its parameters."""
    with torch.device("meta"):
        return timm.create_model(arch, pretrained=False)


def configured(name: str, path: Path, **changed: Any) -> Any:
    """timm's network, and the config.json that it writes for the weights ``name``, with some entries changed."""
    model = skeleton("resnet18")  # the head's width and the number of classes are all that counts of it
    config = get_pretrained_cfg(name).to_dict() | {"architecture": name.partition(".")[0]} | changed
    model.pretrained_cfg, model.num_classes = config, config["num_classes"]
    save_config_for_hf(model, str(path))
    return model


def described(model: Any) -> Preprocessing:
    """timm's transform for evaluation in our terms."""
    resize, crop, to_tensor, normalize = create_transform(
        **resolve_model_data_config(model, use_test_size=True), is_training=False
    ).transforms
    assert type(to_tensor).__name__ == "MaybeToTensor"
    assert crop.size[0] == crop.size[1]
    mean, std = (tuple(np.float32(value).item() for value in values) for values in (normalize.mean, normalize.std))
    return Preprocessing(resize.size, crop.size[0], mean, std, resize.interpolation.value)


def single(preprocessing: Preprocessing) -> Preprocessing:
    """With mean and std as float32, which timm keeps them in."""
    mean, std = (tuple(map(float, np.float32(values))) for values in (preprocessing.mean, preprocessing.std))
    return Preprocessing(preprocessing.resize, preprocessing.crop, mean, std, preprocessing.interpolation)


def test_there_are_weights_of_every_name() -> None:
    """But of the seven that timm has trained none of, or does not share."""
    assert {name.partition(".")[0] for name in TAGGED} < zoo.IN_TIMM
    assert len(TAGGED) == 150  # in timm 1.0.31


@pytest.mark.parametrize("name", TAGGED)
def test_preprocessing_is_timms(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    model = configured(name, path)
    found = timm_config.read(path)
    assert (found.arch, found.num_classes) == (name.partition(".")[0], model.num_classes)
    assert found.preprocessing
    assert single(found.preprocessing) == described(model)


@pytest.mark.parametrize("size", [160, 224])
def test_sizes_are_rounded_as_timm_does(size: int, tmp_path: Path) -> None:
    for hundredths in range(80, 101):
        model = configured(
            "resnet18.a1_in1k", tmp_path / "c.json", input_size=(3, size, size), crop_pct=hundredths / 100
        )
        found = timm_config.read(tmp_path / "c.json").preprocessing
        assert found
        assert single(found) == described(model)


@pytest.mark.parametrize("changed", [{"crop_mode": "squash"}, {"crop_mode": "border"}, {"interpolation": "lanczos"}])
def test_what_jresnet_cannot_do_is_refused(changed: dict[str, str], tmp_path: Path) -> None:
    described(configured("resnet18.a1_in1k", tmp_path / "c.json"))
    configured("resnet18.a1_in1k", tmp_path / "c.json", **changed)
    with pytest.raises(WeightsError, match=next(iter(changed))):
        timm_config.read(tmp_path / "c.json")


@pytest.mark.parametrize("arch", TORCHVISION)
def test_names_and_shapes_of_tensors_are_torchvisions(arch: str) -> None:
    with torch.device("meta"):
        theirs = getattr(networks.models, arch)().state_dict()
    assert {key: value.shape for key, value in skeleton(arch).state_dict().items()} == {
        key: value.shape for key, value in theirs.items()
    }


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_logits_are_timms(arch: str) -> None:
    torch.manual_seed(0)
    reference = timm.create_model(arch, pretrained=False, num_classes=10)
    networks.randomise(reference)
    model = torch2flax.convert(reference.state_dict(), arch, num_classes=10)
    found = verify.compare(model, reference, 64)
    assert found.is_rounding, found


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Stands for the Hub: ``repository(NAME.TAG, weights)`` has timm's configuration and these weights."""
    monkeypatch.setattr(hub, "_head", lambda *_: HEAD)
    monkeypatch.setattr(hub, "_cached", lambda *_: None)
    monkeypatch.setattr(hub, "_beside", lambda repo, commit, name, progress: tmp_path / name)
    monkeypatch.setattr(hub, "_checked", lambda path, etag: sha256_of(path))

    def publish(name: str, weights: bytes) -> Any:
        folder = tmp_path / COMMIT
        folder.mkdir(exist_ok=True)
        (folder / hub.WEIGHTS).write_bytes(weights)
        monkeypatch.setattr(hub, "_download", lambda repo, *_: folder / hub.WEIGHTS if repo == f"timm/{name}" else None)
        return configured(name, tmp_path / hub.CONFIG)

    return publish


COMMIT = "1" * 40
HEAD = types.SimpleNamespace(commit_hash=COMMIT, etag="x", size=7)


def test_every_repository_of_timms_resolves(repository: Any) -> None:
    """Its network, its classes and its preprocessing, before the weights are read."""
    for name in TAGGED:
        model = repository(name, b"weights")
        found = hub.fetch(f"hf:timm/{name}")
        assert (found.spec, found.arch) == (f"hf:timm/{name}@{COMMIT}", name.partition(".")[0])
        assert found.num_classes == model.num_classes
        assert found.preprocessing
        assert single(found.preprocessing) == described(model)
        # timm's head is one linear layer after the global average, as jresnet's is.
        assert model.pretrained_cfg["classifier"] == "fc"
        stem = STEMS[zoo.find(found.arch).config.stem]
        assert model.pretrained_cfg["first_conv"] == ("conv1.0" if stem.inner else "conv1")


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k"])
def test_weights_are_loaded_by_their_name_on_the_hub(name: str, repository: Any) -> None:
    torch.manual_seed(0)
    reference = timm.create_model(name, pretrained=False)
    networks.randomise(reference)
    repository(name, safetensors.torch.save(reference.state_dict()))
    weights = jresnet.get_weights(f"hf:timm/{name}")
    assert (weights.arch, weights.preprocessing.crop) == ("test_resnet", 160)
    found = verify.compare(jresnet.create(weights=f"hf:timm/{name}"), reference, 64)
    assert found.is_rounding, found


@pytest.mark.parametrize(("name", "arch"), [("resnet18.a1_in1k", "resnetblur18"), ("resnet18.a1_in1k", "resnet18")])
def test_what_no_tensor_tells_is_the_configurations(name: str, arch: str, repository: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = timm.create_model(arch, pretrained=False)
    networks.randomise(reference)
    repository(name, safetensors.torch.save(reference.state_dict()))
    configured(name, tmp_path / hub.CONFIG, architecture=arch)
    found = verify.compare(jresnet.create(weights=f"hf:timm/{name}"), reference, 64)
    assert found.is_rounding, found
