"""The accelerators' floors, from the shapes."""

from __future__ import annotations

import json

import pytest
from benchmark.networks import macs
from gpu import floors

from jresnet.models import zoo


@pytest.fixture(scope="module")
def resnet18() -> list[floors.Layer]:
    return floors.layers(zoo.configure("resnet18", stem="cifar", num_classes=10), 32)


def test_every_product_is_counted(resnet18: list[floors.Layer]) -> None:
    config = zoo.configure("resnet18", stem="cifar", num_classes=10)
    assert sum(layer.macs for layer in resnet18) == macs(config, 32) == 555_422_720
    assert len(resnet18) == 20 + 1  # stem, 16 of blocks, 3 of shortcuts; the head
    assert sum(layer.weights for layer in resnet18) == 11_173_962 - 2 * 4_800 - 10  # BNs and the head's bias have none


def test_a_training_step_by_hand() -> None:
    one = [floors.Layer("conv", macs=100, reads=10, writes=20, weights=5, normalised=True)]
    found = floors.work(one, 3, "train", "bfloat16")
    assert found.flops == 3 * 2 * 3 * 100
    # Forward x read, y written; backward dy read twice, x once, dx written. Weights: float32 five times, bfloat16 four.
    assert found.fused == 3 * 2 * (30 + 60) + 5 * (20 + 8)
    assert found.unfused == found.fused + 3 * 2 * 8 * 20
    assert floors.work(one, 3, "train", "bfloat16", remat=True).flops == 4 / 3 * found.flops
    assert floors.work(one, 3, "infer", "float32") == floors.Work(600, 3 * 4 * 30 + 20, 3 * 4 * 30 + 20, 0)


def test_an_exchange_of_gradients() -> None:
    assert floors.exchange(10**9, 1, 1e9, 1.0) == 0
    assert floors.exchange(10**9, 2, 4e9, 1.0) == 1 + 2
    assert floors.exchange(10**9, 8, 7e9, 0.0) == 1


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert floors.main(["--arch", "resnet20_cifar", "--batch", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"]["as it is"]["H200"]["arithmetic"] == pytest.approx(
        found["work"]["as it is"]["flops"] / 989e12
    )
    assert floors.main(["--arch", "resnet20_cifar", "--layers"]) == 0
    assert "| conv 3x3, 32x32x3 -> 32x32x16 |" in capsys.readouterr().out
    assert floors.main(["--arch", "resnet21_cifar"]) == 1
    assert "resnet20_cifar" in capsys.readouterr().err
    assert floors.main(["--batch", "0"]) == 2
