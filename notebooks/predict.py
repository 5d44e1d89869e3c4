# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Classify a photo, and show where the class is
#
# A pretrained ResNet-50 classifies the photo, and Grad-CAM shows which regions support the class. The weights (98 MB)
# are downloaded once.

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
import matplotlib.pyplot as plt
from PIL import Image
from sklearn.datasets import load_sample_image

import jresnet

photo = Image.fromarray(load_sample_image("flower.jpg"))  # or Image.open("my_photo.jpg")
photo

# %% [markdown]
# `get_weights` returns the weights with their preprocessing and the names of the classes.

# %%
weights = jresnet.get_weights("resnet50", "IMAGENET1K_V2")
model = jresnet.create(weights=weights)
images = weights.preprocess(photo)
images.shape

# %%
chances = jax.nn.softmax(model(images)[0])
for i in chances.argsort()[::-1][:5]:
    print(f"{chances[i]:6.1%}  {weights.categories[i]}")

# %% [markdown]
# The heat map has a value from 0 to 1 for each pixel of the network's input. The next cell draws it over that input.

# %%
heat = jresnet.explain.grad_cam(model, images)[0]
shown = images[0] * jax.numpy.array(weights.preprocessing.std) + jax.numpy.array(weights.preprocessing.mean)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4))
left.imshow(shown.clip(0, 1))
left.set_title("what the network sees")
right.imshow(shown.clip(0, 1))
right.imshow(heat, cmap="viridis", alpha=0.6)
right.set_title(f"where: {weights.categories[int(chances.argmax())]}")
for axes in (left, right):
    axes.axis("off")
figure.tight_layout()
