"""Fine-tuning is PyTorch's: frozen parts, frozen statistics and parameter groups, ten steps in float64.

``python -m pytest tests/parity/test_transfer_torch.py -s`` prints the largest relative error of any tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

import jresnet
from convert import reference
from convert.verify import relative
from jresnet.models import params
from jresnet.pytorch import keymap, statedict

EXACT = 1e-10  # relative L2 error of a tensor; rounding alone gives 1e-16 to 1e-13
STEPS, BATCH, SIZE = 10, 8, 16
CONFIG = jresnet.ResNetConfig("basic", (1, 1), (4, 8), num_classes=5, stem="cifar", shortcut="projection")


def pair() -> tuple[jresnet.ResNet, nn.Module]:
    """jresnet's and PyTorch's network of the same float64 parameters and random statistics."""
    torch.manual_seed(0)
    theirs = reference.ResNet(CONFIG)
    networks.randomise(theirs)
    found = statedict.match(theirs.state_dict())
    assert found.config == CONFIG
    ours = params.fill(found.config, found.values)
    nnx.update(ours, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), nnx.state(ours)))
    return ours, theirs.double()


def part_of(name: str) -> str:
    """torch's parameter -> stem, layer1, ..., head."""
    first = name.partition(".")[0]
    return {"conv1": "stem", "bn1": "stem", "fc": "head"}.get(first, first)


def their_optimizer(
    kind: str, theirs: nn.Module, rates: dict[str, float], decays: dict[str, float] | float
) -> torch.optim.Optimizer:
    groups = [
        {
            "params": [value],
            "lr": LR[kind] * rates.get(part_of(name), 1.0),
            "weight_decay": decays.get(part_of(name), 0.0) if isinstance(decays, dict) else decays,
        }
        for name, value in theirs.named_parameters()
        if value.requires_grad
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(groups)


LR = {"sgd": 0.05, "adamw": 1e-3}
PARTS = ("stem", "layer1", "layer2", "head")


def frozen_backbone(ours: jresnet.ResNet, theirs: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    for name, value in theirs.named_parameters():
        value.requires_grad_(part_of(name) == "head")
    return {"frozen": ("backbone",), "weight_decay": 0.01}, {"rates": {}, "decays": 0.01}


def frozen_statistics(ours: jresnet.ResNet, theirs: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """All of them, and scale and bias of the first stage."""
    ours.freeze_statistics()
    for name, module in theirs.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            if name.startswith("layer1"):
                module.requires_grad_(False)
    return {"frozen": ("layer1.*.bn*",), "weight_decay": 0.01}, {"rates": {}, "decays": 0.01}


def layer_wise(ours: jresnet.ResNet, theirs: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """With a weight decay by part, and the statistics of two parts frozen."""
    ours.freeze_statistics("stem", "layer1")
    theirs.bn1.eval()
    theirs.layer1.eval()
    rates = jresnet.optim.layer_rates(ours, 0.5)
    assert rates == {part: 0.5 ** (3 - number) for number, part in enumerate(PARTS)}
    decays = {"stem": 0.1, "layer1": 0.03, "layer2": 0.01, "head": 0.0}
    return {"rates": rates, "weight_decay": decays}, {"rates": rates, "decays": decays}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (frozen_backbone, "adamw"),
        (frozen_statistics, "sgd"),
        (layer_wise, "sgd"),
        (layer_wise, "adamw"),
        pytest.param(frozen_backbone, "sgd", marks=pytest.mark.long),
        pytest.param(frozen_statistics, "adamw", marks=pytest.mark.long),
    ],
)
def test_ten_steps_are_pytorchs(kind: str, case: Callable[..., Any]) -> None:
    draw = np.random.default_rng(1)
    images = draw.standard_normal((STEPS, BATCH, SIZE, SIZE, 3))
    labels = draw.integers(0, CONFIG.num_classes, (STEPS, BATCH))
    with jax.enable_x64(True):
        ours, theirs = pair()
        theirs.train()
        options, groups = case(ours, theirs)
        before = {path: np.array(value) for path, value in params.arrays(ours).items()}
        optimizer = nnx.Optimizer(ours, jresnet.optim.optimizer(kind, LR[kind], **options), wrt=nnx.Param)
        torch_optimizer = their_optimizer(kind, theirs, **groups)

        @nnx.jit
        def step(model: jresnet.ResNet, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
            def loss_of(model: jresnet.ResNet) -> jax.Array:
                return optax.softmax_cross_entropy_with_integer_labels(model(x, train=True), y).mean()

            loss, gradients = nnx.value_and_grad(loss_of)(model)
            optimizer.update(model, gradients)
            return loss

        losses = []
        for x, y in zip(images, labels, strict=True):
            torch_optimizer.zero_grad()
            loss = F.cross_entropy(theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())), torch.from_numpy(y))
            loss.backward()
            torch_optimizer.step()
            losses.append((float(step(ours, optimizer, jnp.asarray(x), jnp.asarray(y))), float(loss.detach())))
        after = {path: np.array(value) for path, value in params.arrays(ours).items()}
    state = theirs.state_dict()
    errors = {path: relative(after[path], keymap.to_flax(state[keymap.torch_key(path)].numpy())) for path in after}
    worst = max(errors, key=errors.__getitem__)
    print(f"{kind}, {case.__name__}: {errors[worst]:.1e} ({worst})")
    assert errors[worst] < EXACT, worst
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=EXACT)
    held = {path for path in after if after[path].tobytes() == before[path].tobytes()}
    assert held == {path for path in after if stays(case, path)}


def stays(case: Callable[..., Any], path: str) -> bool:
    """What a case freezes; it is the same bit by bit."""
    statistic = path.endswith((".mean", ".var"))
    if case is frozen_backbone:
        return not statistic and not path.startswith("fc")
    if case is frozen_statistics:
        return statistic or (path.startswith("layer1.") and ".bn" in path)
    return statistic and path.startswith(("bn1", "layer1"))
