"""timm loads what was pushed: the same logits, the same transform, and the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark.networks import randomise
from PIL import Image

import jresnet
from convert.installed import import_torchvision
from jresnet import sharing
from jresnet.weights import native
from jresnet.weights.preprocessing import Preprocessing

import_torchvision()

import timm  # noqa: E402
from timm.data import create_transform, resolve_model_data_config  # noqa: E402


def test_timm_loads_a_pushed_folder(tmp_path: Path) -> None:
    model = jresnet.create("resnet18", num_classes=4, seed=1)
    randomise(model)
    how = Preprocessing(73, 64, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bicubic")
    native.save(tmp_path / "w.safetensors", model, preprocessing=how, categories=["ant", "bee", "cat", "dog"])
    folder = sharing.push(tmp_path / "w.safetensors", tmp_path / "pushed")
    theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert theirs.pretrained_cfg["label_names"] == ["ant", "bee", "cat", "dog"]
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((240, 180))
    transform = create_transform(**resolve_model_data_config(theirs, use_test_size=True), is_training=False)
    with torch.no_grad():
        expected = theirs(transform(picture)[None]).numpy()
    weights = jresnet.get_weights(tmp_path / "w.safetensors")
    ours = np.asarray(model(weights.preprocess(picture)))
    assert np.linalg.norm(ours - expected) <= 2e-5 * np.linalg.norm(expected)
    card = (Path(folder) / "README.md").read_text()
    assert "timm.create_model('hf_hub:ORG/REPO', pretrained=True)" in card
    assert "torchvision.models.resnet18(num_classes=4)" in card
