"""scripts/benchmark.py's peers: the same weights and images as jresnet, and the same results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from benchmark import driver, table
from benchmark.suites import Row

from convert import verify
from jresnet.models import zoo
from jresnet.models.resnet import ResNetConfig

REPOSITORY = Path(__file__).parent.parent.parent
TINY = ResNetConfig("basic", (1, 1, 1), (4, 8, 16), num_classes=10, stem="cifar", shortcut="pad")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workers' own, with what they have compiled."""
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "SECONDS", 0.01)
    monkeypatch.setattr(driver, "EPOCH", 16)


def measure(folder: Path, row: Any, config: ResNetConfig, names: list[str]) -> dict[str, Any]:
    about = {"config": dataclasses.asdict(config), "gflop": 1.0}
    return driver.measure(driver.Workplace(folder, "cpu", 1), row, names, about)


def assert_same(found: dict[str, Any]) -> None:
    """Everybody's gradient or logits are float64's but for rounding, of which PyTorch's own is the yardstick."""
    yardstick = found["torch"][0]["error"]
    assert 0 < yardstick < 1e-5
    for name, rounds in found.items():
        assert isinstance(rounds, list), rounds
        assert 0 < rounds[0]["error"] < verify.ALLOWED * yardstick, name
        assert rounds[0]["images_per_second"] > 0
        assert ("compile_seconds" in rounds[0]) == (name in ("jresnet", "torch-compile"))
        assert name == "jresnet" or rounds[0]["note"] == "channels-last"


@pytest.mark.parametrize("task", ["train", pytest.param("infer", marks=pytest.mark.long)])
def test_the_same_results(folder: Path, task: str) -> None:
    """The whole gradient, or the logits."""
    row = Row(task, task, "resnet20_cifar", 8, 8)
    others = ["timm"] if task == "infer" else []
    found = measure(folder, row, TINY, ["jresnet", "torch", *others])
    for name in others:  # its reason; the others go on
        assert found.pop(name) == "timm has no resnet20_cifar with the cifar stem"
    assert_same(found)
    theirs = table.evaluate("torch", found, 1.0, 0.0)
    assert theirs["ratios"] == [found["torch"][0]["seconds"] / found["jresnet"][0]["seconds"]]


@pytest.mark.long
@pytest.mark.parametrize("task", ["train", "infer"])
def test_all_peers(folder: Path, task: str) -> None:
    """torch.compile, which needs a C++ compiler, and timm too."""
    row = Row(task, task, "resnet18", 64, 4)
    assert_same(measure(folder, row, zoo.configure("resnet18"), ["torch", "torch-compile", "timm"]))


@pytest.mark.long
def test_an_epoch(folder: Path) -> None:
    """Of 16 images, in steps of 6."""
    row = Row("train", "epoch", "tiny", 8, 6, "bfloat16")
    found = measure(folder, row, TINY, ["torch"])["torch"][0]
    assert found["images_per_second"] == 12 / found["seconds"] > 0


def test_products(folder: Path) -> None:
    found = driver.Workplace(folder, "cpu", 1).ask("torch", "gemm", precision="float32")
    assert found["gflops"] > 0
