"""A run's configuration: what recipes and data sets bring, what is refused, and damaged files of configurations."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jresnet.errors import InputError
from jresnet.training import recipes
from jresnet.training.config import RunConfig, default_config, read_config, read_runs
from jresnet.training.program import load_data
from jresnet.training.trainer import Options
from jresnet.weights.preprocessing import STATISTICS


@pytest.mark.parametrize("dataset", recipes.DATASETS)
@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_every_recipe_is_a_run_on_every_dataset(recipe: str, dataset: str) -> None:
    found = default_config(recipe=recipe, dataset=dataset)
    row = dataclasses.asdict(recipes.RECIPES[recipe]) | recipes.DATASETS[dataset]
    for name in (
        "momentum",
        "schedule",
        "label_smoothing",
        "ema",
        "crop",
        "image_size",
        "flip",
        "epochs",
        "batch_size",
    ):
        assert getattr(found, name) == row[name]
    assert found.pipeline().mean == STATISTICS["imagenet" if found.imagenet_statistics else dataset][0]
    assert found.arch == (row["arch"] or "resnet34")


def test_a_recipes_times_are_shares_of_the_run() -> None:
    assert default_config().milestones == (100, 150)
    assert default_config(epochs=10).milestones == (5, 7.5)
    assert default_config(epochs=10, milestones=[3]).milestones == (3,)
    assert default_config(recipe="fast", epochs=10).warmup_epochs == 2
    assert default_config(recipe="blog", epochs=30).milestones == (10, 20)


def test_a_datasets_smaller_batch_brings_a_smaller_rate() -> None:
    assert [default_config(dataset="digits", recipe=name).lr for name in ("step", "fast")] == pytest.approx(
        [0.025, 0.025]
    )
    assert default_config(dataset="digits", lr=0.1).lr == 0.1
    assert default_config(batch_size=32).lr == 0.1  # the user's own batch says nothing of the rate


def test_another_optimizer_or_schedule_brings_its_own_values() -> None:
    found = default_config(optimizer="adamw", schedule="onecycle")
    assert (found.lr, found.weight_decay, found.nesterov) == (1e-3, 1e-2, False)  # PyTorch's defaults
    assert (found.warmup_epochs, found.milestones) == (40, ())
    assert default_config(optimizer="adamw", lr=0.01).lr == 0.01
    assert default_config(recipe="fast", schedule="step").milestones == (10, 15)


def test_statistics_are_the_datas() -> None:
    pixels = load_data(default_config(dataset="digits"), None).train.images / 255
    mean, std = STATISTICS["digits"]
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), mean, atol=5e-4)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), std, atol=5e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "mnist"}, "unknown `dataset` 'mnist': there are cifar10, cifar100, digits"),
        ({"recipe": "fasst"}, "unknown `recipe` 'fasst': there are step, fast, blog"),
        ({"arch": "resnet35"}, "unknown architecture 'resnet35'"),
        ({"precision": "float16"}, "`precision` must be one of float32, bfloat16, got 'float16'"),
        ({"image_size": 64}, "`image_size` must be 32 with `crop` pad, which does not scale images, got 64"),
        ({"image_size": 28}, "`image_size` must be 32 with `crop` pad"),
        ({"image_size": 27, "crop": "resized"}, "`image_size` must be at least 28 with `crop` resized, got 27"),
        ({"momentum": 0.0}, "`nesterov` needs a `momentum` above 0"),
        (
            {"warmup_epochs": 201.0, "milestones": ()},
            "a warm-up of 201 epochs is longer than the run's 200: fewer `warmup",
        ),
        ({"warmup_epochs": 120.0}, "milestone 100 is within the warm-up"),
        ({"epochs": 8.5, "lr": "0.1"}, "`epochs` must be a whole number, got 8.5; `lr` must be a number, got '0.1'"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        default_config(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("size", [28, 32, 224])
def test_sizes_that_fit_the_crop(size: int) -> None:
    default_config(crop="resized", image_size=size)


def fields_of(*kinds: str) -> list[str]:
    return [field.name for field in dataclasses.fields(RunConfig) if str(field.type) in kinds]


@pytest.mark.parametrize("name", fields_of("int", "float", "int | None"))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1, 10**400, 1e308, True, "1", [1]])
def test_every_number_is_checked(name: str, value: Any) -> None:
    config = dataclasses.replace(default_config(), **{name: value})
    with pytest.raises(InputError, match=f"`{name}` must be "):
        config.check()


@pytest.mark.parametrize("name", fields_of("str", "bool", "tuple[float, ...]"))
@pytest.mark.parametrize("value", [None, 1.5, ["resnet34"], ("a",), float("nan")])
def test_every_other_field_is_checked(name: str, value: Any) -> None:
    config = dataclasses.replace(default_config(), **{name: value})
    with pytest.raises(InputError, match=f"`{name}` must be "):
        config.check()


@pytest.mark.parametrize("name", fields_of("int", "int | None"))
def test_whole_numbers_are_such_that_jax_counts_to(name: str) -> None:
    with pytest.raises(InputError, match=f"`{name}` must be "):
        dataclasses.replace(default_config(), **{name: 10**12}).check()


def test_options_are_checked() -> None:
    Options(checkpoint_minutes=None).check()
    for value in (float("nan"), -1.0, "ten"):
        with pytest.raises(InputError, match="`checkpoint_minutes` must be "):
            Options(checkpoint_minutes=value).check()  # type: ignore[arg-type]


def written(folder: Path, content: Any) -> Path:
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_configuration_comes_back(tmp_path: Path) -> None:
    config = default_config(recipe="fast", limit_train=100)
    written(tmp_path, {"run": dataclasses.asdict(config), "runs": 3})
    assert read_config(tmp_path) == config
    assert read_runs(tmp_path) == 3
    assert read_config(tmp_path / "none") is None
    assert read_runs(tmp_path / "none") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": "8"}, {"epochs": 8.5}, {"lr": None}, {"milestones": ["a"]}, {"milestones": 3}, {"arch": ["x"]},
        {"arch": "resnet35"}, {"image_size": "32"}, {"stem": 5}, {"lr": float("nan")}, {"seed": -1}, {"unknown": 1},
        {"crop": "pad", "image_size": 64}, {"nesterov": 1}, {"optimizer": None}, {"batch_size": True},
    ],
)  # fmt: skip
def test_a_configuration_with_impossible_values(tmp_path: Path, changes: dict[str, Any]) -> None:
    written(tmp_path, {"run": dataclasses.asdict(default_config()) | changes})
    with pytest.raises(InputError, match=r"config\.json is not the configuration of a run \(.*: choose another `out`"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", "null", '{"run": 5}', '{"run": {}}', '{"run": []}', "[" * 10**5, '{"run": ' * 10**5, "\x00"],
)
def test_a_damaged_configuration(tmp_path: Path, content: str) -> None:
    written(tmp_path, content)
    for read in (read_config, read_runs):
        with pytest.raises(InputError, match=r"config\.json is not the configuration of a run"):
            read(tmp_path)


def test_a_configuration_that_is_a_pipe(tmp_path: Path) -> None:
    """It would never answer."""
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(
        InputError, match=r"config\.json is not the configuration of a run \(it is a folder, a device or a pipe\)"
    ):
        read_config(tmp_path)


@pytest.mark.parametrize("runs", ["3", 0, -1, 2.0, True, [3]])
def test_a_damaged_number_of_seeds(tmp_path: Path, runs: Any) -> None:
    written(tmp_path, {"run": dataclasses.asdict(default_config()), "runs": runs})
    with pytest.raises(InputError, match="runs must be a whole number of at least 1"):
        read_runs(tmp_path)
