"""The table of architectures, and how little it takes to add one."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

import jresnet
from jresnet.models import params, zoo
from jresnet.pytorch import statedict
from jresnet.weights import native, timm_config


def test_the_pages_are_current(tmp_path: Path) -> None:
    assert models.main(["--check"]) == 0
    (tmp_path / "docs").mkdir()
    for name in models.PAGES:
        text = (models.ROOT / name).read_text()
        (tmp_path / name).write_text(text.replace("| resnet50d | 25,576,264 |", "| resnet50d | 1 |"))
    assert models.main(["--check"], tmp_path) == 1
    assert models.main([], tmp_path) == 0
    for name in models.PAGES:
        assert (tmp_path / name).read_text() == (models.ROOT / name).read_text()


def logits_of(model: jresnet.ResNet) -> jax.ShapeDtypeStruct:
    """Of an image, whose numbers are not computed."""
    return jax.eval_shape(model, jax.ShapeDtypeStruct((1, 40, 56, 3), jnp.float32))


def test_one_more_architecture_is_one_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything else is found from the row: construction, files of jresnet's and PyTorch's, timm's configurations, docs."""
    config = jresnet.ResNetConfig(
        "bottleneck", (1, 2), (8, 16), 7, attention="eca", stem="deep_tiered", shortcut="average", antialias="blur"
    )
    monkeypatch.setitem(zoo.ZOO, "ecaresnetblur11t", zoo.Row("ecaresnetblur11t", config, 1, 64, 0.1, "this test"))
    model = jresnet.create("ecaresnetblur11t")
    assert logits_of(model).shape == (1, 7)
    assert model.arch == "ecaresnetblur11t"
    assert "ecaresnetblur11t" in jresnet.list_models("*blur*")
    native.save(tmp_path / "w.safetensors", model)
    assert native.load(tmp_path / "w.safetensors").config == config
    found = statedict.match(statedict.state_dict(model), "ecaresnetblur11t")
    assert (found.arch, found.config) == ("ecaresnetblur11t", config)
    assert logits_of(jresnet.fuse(params.fill(found.config, found.values))).shape == (1, 7)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "ecaresnetblur11t", "num_classes": 7}))
    assert timm_config.read(tmp_path / "config.json").arch == "ecaresnetblur11t"
    assert "| ecaresnetblur11t | 1 | 0.1 | 64 | this test |" in models.table()


@pytest.mark.parametrize(
    "config",
    [
        jresnet.ResNetConfig(
            "bottleneck", (1, 2), (8, 16), 2, attention="eca", pruned=((6, ((3, 4),)), (9, ((5, 2), (5, 6))))
        ),
        jresnet.ResNetConfig(
            ("basic", "bottleneck"), (1, 1), (8, 16), 2, stem="deep_conv", attention="se", reduction=4
        ),
        jresnet.ResNetConfig("bottleneck", (1, 1), (32, 32), 2, norm="group", shortcut="projection_3x3"),
    ],
    ids=["pruned", "unequal", "group"],
)
def test_native_files_keep_a_configuration_of_parts(config: jresnet.ResNetConfig, tmp_path: Path) -> None:
    model = params.fill(config, {path: np.zeros(shape, np.float32) for path, shape in params.shapes(config).items()})
    native.save(tmp_path / "w.safetensors", model)
    assert native.load(tmp_path / "w.safetensors").config == config
    assert logits_of(model).shape == (1, 2)
