"""transformers' own ResNet in and out: folders of ``save_pretrained`` and ``from_pretrained``, and the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import networks
import numpy as np
import pytest
import torch

from convert import flax2torch, torch2flax, verify
from jresnet import sources
from jresnet.errors import WeightsError
from jresnet.models import params

networks.models  # noqa: B018 - transformers finds torchvision imported, which it would not import beside a CPU build
transformers = pytest.importorskip("transformers")


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


def build(**options: object) -> torch.nn.Module:
    chosen = {
        "embedding_size": 4,
        "hidden_sizes": [16, 32, 48],
        "depths": [1, 2, 1],
        "layer_type": "bottleneck",
    } | options
    labels = {0: "cat", 1: "dog", 2: "owl"}
    config = transformers.ResNetConfig(**chosen, id2label=labels, label2id={name: i for i, name in labels.items()})
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config)
    networks.randomise(model)
    return model.eval()


VARIANTS = {
    "bottleneck": {},
    "stride in the 1x1": {"downsample_in_bottleneck": True},
    "basic": {"layer_type": "basic", "hidden_sizes": [4, 8, 12]},
}


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("pickled", [False, True])
def test_in_and_out(tmp_path: Path, kind: str, pickled: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = build(**VARIANTS[kind]), tmp_path / "theirs"
    model.save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    said = {
        "crop_pct": 0.875, "do_resize": True, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": 224, "feature_extractor_type": "ConvNextFeatureExtractor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(said))

    native = tmp_path / "native.safetensors"
    assert torch2flax.main([str(folder), "--output", str(native)]) == 0, capsys.readouterr().err
    weights = sources.load(native)
    assert weights.categories == ("cat", "dog", "owl")
    assert weights.preprocessing is not None
    assert (weights.preprocessing.resize, weights.preprocessing.crop) == (256, 224)
    found = verify.compare(params.fill(weights.config, weights.values), Logits(model), 64)
    assert found.is_rounding, found

    assert flax2torch.main([str(native), "--output", str(tmp_path / "ours"), "--verify", "never"]) == 0
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours").eval()
    assert again.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        np.testing.assert_array_equal(again(images).logits, model(images).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act should be 'relu', not 'gelu'"),
        ({"downsample_in_first_stage": True}, "downsample_in_first_stage puts a stride"),
        ({"embedding_size": 8}, "embedding_size 8 is not the first stage's width, 4"),
    ],
)
def test_what_jresnet_has_not(tmp_path: Path, options: dict, message: str) -> None:
    build(**options).save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(WeightsError, match=message):
            sources.load(source)


def test_a_model_without_a_head(tmp_path: Path) -> None:
    body = build().resnet
    body.save_pretrained(tmp_path)
    weights = sources.load(tmp_path)
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3), np.float32)
    with torch.no_grad():
        wanted = body(torch.from_numpy(images.transpose(0, 3, 1, 2))).pooler_output.flatten(1).numpy()
    given = params.fill(weights.config, weights.values)(images)
    np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max()))
