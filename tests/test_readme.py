"""What the README tells people to type."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from conftest import REPOSITORY

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
    params, _, _, loss = names["step"](names["params"], names["batch_stats"], names["opt_state"], images, jnp.arange(8))
    assert np.isfinite(loss)
    changed = jax.tree.map(lambda a, b: bool((np.array(a) != b).any()), params, before)
    assert all(jax.tree.leaves(changed))
