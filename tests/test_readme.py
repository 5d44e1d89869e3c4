"""What the README tells people to type."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY

import jresnet
from jresnet.models import params
from jresnet.pytorch import statedict
from jresnet.weights import native

PYTHON = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


def test_the_readmes_training_step_trains() -> None:
    (example,) = (block for block in PYTHON if "def step(" in block)
    # All but the lines that take weights from elsewhere, of a network that compiles faster.
    text = "\n".join(line for line in example.splitlines() if "weights=" not in line)
    assert text.count('"resnet18", num_classes=10, stem="cifar"') == 1
    names: dict = {}
    exec(text.replace('"resnet18", num_classes=10, stem="cifar"', '"resnet20_cifar"'), names)
    images = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
    before = jax.tree.map(np.array, names["params"])
    trained, _, _, loss = names["step"](
        names["params"], names["batch_stats"], names["opt_state"], images, jnp.arange(8)
    )
    assert np.isfinite(loss)
    changed = jax.tree.map(lambda a, b: bool((np.array(a) != b).any()), trained, before)
    assert all(jax.tree.leaves(changed))


def test_the_readmes_way_back_to_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (there,) = (block for block in PYTHON if "torch_model" in block)
    (back,) = (block for block in PYTHON if "torchsave" in block)
    monkeypatch.chdir(tmp_path)
    small = jresnet.create("resnet20_cifar")
    exec(back, {"model": small})
    names = {"torch_model": SimpleNamespace(state_dict=lambda: statedict.state_dict(small))}
    exec(there.replace("resnet50", "resnet20_cifar"), names)
    loaded = jresnet.create("resnet20_cifar", weights="model.pth")
    for model in (names["model"], loaded):
        assert native.digest(params.arrays(model)) == native.digest(params.arrays(small))
