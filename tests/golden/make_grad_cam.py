"""Writes grad_cam.npz, the maps of the PyTorch package ``grad-cam``: ``pip install grad-cam==1.5.7``, then run this file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).with_name("grad_cam.npz")


def main() -> None:
    """The command."""
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    import test_explain as given

    from convert import reference
    from convert.installed import import_torchvision
    from jresnet.pytorch import keymap

    import_torchvision()  # grad-cam does, too, and fails where its wheel is for another torch
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    values = given.drawn()
    model = reference.ResNet(given.TINY)
    counters = {key: value for key, value in model.state_dict().items() if key.endswith(keymap.COUNTER)}
    tensors = {keymap.torch_key(path): torch.from_numpy(keymap.to_torch(value)) for path, value in values.items()}
    model.load_state_dict(tensors | counters)
    model.eval()
    images = torch.from_numpy(given.X.transpose(0, 3, 1, 2).copy())
    classes = np.array([0, 3, 1, 4])
    found = {"classes": classes, "logits": model(images).detach().numpy()}
    for layer, module in {"layer3": model.layer3[-1], "layer2.0": model.layer2[0]}.items():
        with GradCAM(model=model, target_layers=[module]) as cam:
            found[f"{layer}.chosen"] = cam(images, [ClassifierOutputTarget(int(c)) for c in classes]).copy()
            found[f"{layer}.predicted"] = cam(images, None).copy()
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
