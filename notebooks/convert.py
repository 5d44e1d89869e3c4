# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Convert your own PyTorch file to JAX and back
#
# jresnet reads files of `torch.save` without torch, and infers which ResNet they contain.

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
import jax
import numpy as np

import jresnet
from jresnet.pytorch import statedict, torchsave

# %% [markdown]
# Enter the name of your file here. If the file does not exist, this cell writes an example in PyTorch's format.

# %%
file = Path("my_resnet.pth")
if not file.exists():
    torchsave.write(file, statedict.state_dict(jresnet.create("resnet18", num_classes=10)))

# %%
model = jresnet.load(file)
print(model.arch, model.config)

# %% [markdown]
# Images are in channels-last layout, `[N, H, W, C]`. A batch prepared for PyTorch must be transposed.

# %%
for_torch = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
logits = model(for_torch.transpose(0, 2, 3, 1))
print(logits.shape, logits.dtype)

# %% [markdown]
# Save the converted weights as a native file, with the names of the classes.

# %%
names = [f"class {i}" for i in range(model.config.num_classes)]
jresnet.save("my_resnet.safetensors", model, categories=names)
same = jresnet.load("my_resnet.safetensors")
print(bool((same(for_torch.transpose(0, 2, 3, 1)) == logits).all()))

# %% [markdown]
# Convert back to PyTorch. The result is bit-identical.

# %%
torchsave.write("back.pth", statedict.state_dict(model))
before, after = (jax.tree.leaves(statedict.state_dict(jresnet.load(path))) for path in (file, "back.pth"))
print(all((one == other).all() for one, other in zip(before, after, strict=True)))

# %% [markdown]
# To start a network for other classes from the same weights, pass the number of classes. jresnet initialises a new head
# and issues a warning.

# %%
fresh = jresnet.create(weights="my_resnet.pth", num_classes=3)
print(fresh(for_torch.transpose(0, 2, 3, 1)).shape)
