"""Parity without torch: the logits that PyTorch gave, kept in tests/golden."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from convert import torch2flax, verify
from jresnet.models import params, zoo
from jresnet.pytorch import keymap

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import make_golden

FEW = ("resnet20_cifar", "resnet18", "resnext50_32x4d")  # both blocks, groups, and the three shortcuts


@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, marks=[] if arch in FEW else [pytest.mark.long]) for arch in make_golden.CASES],
)
def test_logits_are_pytorchs(arch: str) -> None:
    config = zoo.configure(arch)
    shapes = {keymap.torch_key(path): keymap.torch_shape(shape) for path, shape in params.shapes(config).items()}
    state_dict = {key: make_golden.golden_weights(key, shape) for key, shape in shapes.items()}
    model = torch2flax.convert(state_dict, arch)
    images = make_golden.golden_images(arch, config.in_channels)
    logits = nnx.jit(lambda model, x: model(x))(model, images)
    with np.load(make_golden.FILE) as golden:
        distance = verify.relative(np.asarray(logits), golden[arch])
        assert distance <= verify.ALLOWED * float(golden[f"{arch}.distance"])
