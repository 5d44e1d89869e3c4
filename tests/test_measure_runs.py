"""scripts/measure_runs.py at sizes that tell nothing of speed."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
from conftest import command, load_script
from flax import nnx

from jresnet.models.resnet import ResNet, ResNetConfig

SCRIPT = "scripts/measure_runs.py"
TINY = ResNetConfig("basic", (1, 1), (4, 8), num_classes=10, stem="cifar", shortcut="pad")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("measure_runs")


def test_seeds_at_once_take_the_same_step(script: ModuleType) -> None:
    found = script.measure(lambda seed: ResNet(TINY, rngs=nnx.Rngs(seed)), 8, batch_size=4, runs=3, rounds=2)
    assert len(found.sequential) == len(found.vmapped) == len(found.ratios) == 2
    assert found.difference < 1e-4
    assert all(math.isfinite(ratio) for ratio in found.ratios)


def test_what_cannot_be_used_is_said() -> None:
    unknown = command(SCRIPT, "--arch", "resnet19")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr.startswith("error: unknown architecture 'resnet19'")
    assert command(SCRIPT, "--runs", "0").returncode == 2
