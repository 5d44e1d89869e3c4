# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train ResNet-20 on the digits
#
# This notebook trains the CIFAR network of the ResNet paper on scikit-learn's digits. It needs no download and takes a
# minute on two cores. To train on CIFAR-10, use `--dataset cifar10`.

# %%
# In Colab, first upload jresnet's wheel next to this notebook. If jresnet is installed, this cell does nothing.
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("jresnet") is None:
    wheel = max(Path(".").glob("jresnet-*.whl"))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{wheel}[train]"], check=True)

# %%
import json

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import jresnet
from jresnet.commands import dispatch
from jresnet.data import load

# %% [markdown]
# Train with the command, which writes weights, checkpoints, metrics and plots into a folder.

# %%
command = "train --depth 20 --dataset digits --out runs/digits"
print("exit code", dispatch(command.split()))

# %%
rows = [json.loads(line) for line in Path("runs/digits/metrics.jsonl").read_text().splitlines()]
plt.plot([row["epoch"] for row in rows], [100 * row["train_accuracy"] for row in rows], "o-", label="training")
plt.plot([row["epoch"] for row in rows], [100 * row["test_accuracy"] for row in rows], "s--", label="test")
plt.xlabel("epoch")
plt.ylabel("accuracy (%)")
plt.legend()

# %% [markdown]
# Train with your own loop, with Flax's optimizer and jit.

# %%
data = load("digits")
model = jresnet.create("resnet20_cifar")
model.train()
optimizer = nnx.Optimizer(model, optax.sgd(0.025, momentum=0.9, nesterov=True), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, images, labels):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


images, labels = data.train.images / 255.0 - 0.5, data.train.labels
order = np.random.default_rng(0).permutation(len(labels))[:1280].reshape(-1, 32)
for number, batch in enumerate(order):
    loss = step(model, optimizer, images[batch], labels[batch])
    if number % 10 == 0:
        print(number, float(loss))

# %%
model.eval()
test = jax.jit(lambda images: model(images))(data.test.images[:100] / 255.0 - 0.5)
print(f"{(test.argmax(-1) == data.test.labels[:100]).mean():.1%} of 100 test images")
