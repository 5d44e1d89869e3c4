"""A file of any dialect becomes the network that wrote it: found by itself, and the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dialect_networks import DIALECT_NETWORKS
from networks import randomise
from torch import nn

from convert import torch2flax, verify
from jresnet import sources
from jresnet.errors import WeightsError
from jresnet.models import params
from jresnet.pytorch import keymap, statedict
from jresnet.weights import native

ALL = [(dialect, arch, build) for dialect, rows in DIALECT_NETWORKS.items() for arch, build in rows]


def randomised(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    randomise(model)
    return model.eval()


@pytest.mark.parametrize(("dialect", "arch", "build"), ALL, ids=[f"{row[0]}-{row[1]}" for row in ALL])
def test_found_and_the_same_function(dialect: str, arch: str, build: Callable[[], nn.Module]) -> None:
    """With nothing said at all."""
    network = randomised(build)
    found = statedict.match(network.state_dict())
    assert (found.dialect, found.arch) == (dialect, arch)
    model = params.fill(found.config, found.values)
    size = 32 if found.config.stem == "cifar" else 64
    result = verify.compare(model, network, size)
    assert result.is_rounding, result


def test_the_command_on_a_checkpoint_of_a_dialect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kuangliu's checkpoints: {'net': ..., 'acc', 'epoch'} of a DataParallel network, with CIFAR-10's statistics."""
    network = randomised(DIALECT_NETWORKS["kuangliu"][0][1])
    source, output = tmp_path / "ckpt.pth", tmp_path / "out.safetensors"
    torch.save({"net": nn.DataParallel(network).state_dict(), "acc": 95.5, "epoch": 3}, source)
    arguments = ["resnet18", "--weights", str(source), "--output", str(output), "--verify", "always", "--json"]
    assert torch2flax.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dialect"] == "kuangliu"
    _, config, _, metadata = native.read(output)
    assert (config.stem, config.num_classes) == ("cifar", 10)
    assert json.loads(metadata["preprocessing"])["std"] == [0.2023, 0.1994, 0.2010]


def test_second_names_must_be_of_the_same_tensors() -> None:
    network = randomised(DIALECT_NETWORKS["resnet34_projection"][0][1])
    state_dict = {key: value.clone() for key, value in network.state_dict().items()}
    assert "Conv.3.0.left.0.weight" in state_dict
    assert torch2flax.convert(state_dict, "resnet34_projection")
    state_dict["Conv.3.0.left.0.weight"][0, 0, 0, 0] += 1
    with pytest.raises(WeightsError, match=r"1 different under two names: Conv\.3\.0\.left\.0\.weight is not layer4"):
        torch2flax.convert(state_dict, "resnet34_projection")


def test_averaged_weights_go_before_the_last_ones(tmp_path: Path) -> None:
    """torchvision's reference script saves 'model' and 'model_ema', an AveragedModel with its own counter."""
    network = randomised(DIALECT_NETWORKS["akamaster"][0][1])
    averaged = torch.optim.swa_utils.AveragedModel(network)
    averaged.update_parameters(network)
    with torch.no_grad():
        averaged.module.linear.bias += 1
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": network.state_dict(), "model_ema": averaged.state_dict(), "epoch": 3}, path)
    found = statedict.match(sources.open_file(path)[0], "resnet20_cifar")
    np.testing.assert_array_equal(found.values["fc.bias"], averaged.module.linear.bias.detach().numpy())
    assert found.notes == ("read from 'model_ema'; also found: 'model'",)


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_a_stem_is_adapted_as_timm_adapts_it(channels: int) -> None:
    from timm.models import adapt_input_conv

    network = randomised(DIALECT_NETWORKS["torchvision"][0][1])
    model = torch2flax.convert(network.state_dict(), "resnet18", in_channels=channels)
    wanted = adapt_input_conv(channels, network.conv1.weight.detach()).numpy()
    np.testing.assert_allclose(keymap.to_torch(np.asarray(model.conv1.kernel[...])), wanted, rtol=1e-6, atol=1e-8)


def test_half_and_bf16_and_views(tmp_path: Path) -> None:
    """Narrow tensors, one storage shared by all, and transposed ones, through a file."""
    network = randomised(DIALECT_NETWORKS["chenyaofo"][0][1])
    for dtype in (torch.bfloat16, torch.float16):
        network_ = {
            key: value.to(dtype) if value.is_floating_point() else value for key, value in network.state_dict().items()
        }
        flat = torch.cat([value.flatten() for value in network_.values() if value.is_floating_point()])
        tensors, at = {}, 0
        for key, value in network_.items():
            if value.is_floating_point():
                tensors[key] = flat[at : at + value.numel()].view(value.shape)
                at += value.numel()
        tensors["fc.weight"] = tensors["fc.weight"].t().contiguous().t()
        torch.save(tensors, tmp_path / "views.pth")
        found = statedict.match(sources.open_file(tmp_path / "views.pth")[0], "resnet20_cifar")
        for key, value in found.torchvision().items():
            np.testing.assert_array_equal(value, network_[key].float().numpy())
