# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune on a folder of images
#
# You need one folder per class: `photos/CLASS/*.png`. If the folder `photos` does not exist, this notebook
# creates it from scikit-learn's digits. You can use your own folder instead.

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
import matplotlib.pyplot as plt
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

import jresnet
from jresnet.commands import dispatch

photos = Path("photos")
if not photos.exists():
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if label < 3 and number < 300:
            path = photos / f"digit {label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15).astype("uint8")).resize((64, 64)).save(path)
print({folder.name: len(list(folder.iterdir())) for folder in sorted(photos.iterdir())})

# %% [markdown]
# The command trains the head first, then all layers. It chooses learning rate, batch size and epochs from the number
# of images. `dispatch` runs it in the notebook; in a terminal, type `jresnet finetune --weights resnet18:IMAGENET1K_V1 ...`.

# %%
command = "finetune --weights resnet18:IMAGENET1K_V1 --data photos --out run --epochs 5"
print("exit code", dispatch(command.split()))

# %% [markdown]
# The result is a file with the weights, the names of the classes and the preprocessing.

# %%
weights = jresnet.get_weights("run/last.safetensors")
model = jresnet.create(weights=weights)
some = sorted(photos.rglob("*.png"))[::23][:6]
pictures = [ImageOps.exif_transpose(Image.open(path)) for path in some]  # upright, as in training
found = model(weights.preprocess(pictures)).argmax(-1)
figure, places = plt.subplots(1, len(some), figsize=(2 * len(some), 2.4))
for axes, picture, i in zip(places, pictures, found, strict=True):
    axes.imshow(picture, cmap="gray")
    axes.set_title(weights.categories[int(i)])
    axes.axis("off")

# %% [markdown]
# `run` also contains training curves, a confusion matrix, and the images with the largest loss.

# %%
Image.open("run/confusion.png").convert("RGB")
