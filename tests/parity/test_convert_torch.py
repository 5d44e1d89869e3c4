"""Files written by torch, converted by the command, and compared with torchvision by it."""

from __future__ import annotations

import json
from pathlib import Path

import networks
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
    assert report["verify"]["jresnet"] <= verify.ALLOWED * max(report["verify"]["torch"], verify.USUAL)
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
    assert "relative distance of the logits to PyTorch's in float64" in printed
    model = jresnet.create("resnet18", weights="IMAGENET1K_V1")
    found = verify.compare(model, reference, 64)
    assert found.is_rounding, found
    with pytest.warns(UserWarning, match="fresh head for 10 classes"):
        fresh = jresnet.create("resnet18", weights="IMAGENET1K_V1", num_classes=10)
    assert fresh.fc.bias[...].shape == (10,)


def test_a_whole_module_is_refused_with_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "whole.pth"
    torch.save(networks.CifarResNet(20), source)
    assert torch2flax.main(["resnet20_cifar", "--weights", str(source), "--output", str(tmp_path / "x")]) == 1
    assert "torch.save(model.state_dict()" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.pth"]


def test_pytorchs_networks_bring_in_no_jax() -> None:
    """In the benchmark it would count as PyTorch's memory and start."""
    code = "import sys; from convert import reference; reference.CifarResNet; assert 'jax' not in sys.modules"
    done = command("-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr
