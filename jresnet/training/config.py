"""A run's configuration: a recipe's row, a dataset's and the flags' changes, checked; ``config.json`` holds the outcome."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jresnet.errors import InputError
from jresnet.models import zoo
from jresnet.models.resnet import Stem
from jresnet.training import recipes
from jresnet.training.augment import Pipeline
from jresnet.weights.preprocessing import STATISTICS


@dataclass(frozen=True)
class RunConfig:
    """All that decides a run's outcome; fields that a recipe has too are explained in :class:`jresnet.training.recipes.Recipe`."""

    arch: str
    dataset: str  # "cifar10" | "digits"
    recipe: str  # the name of the row of recipes.RECIPES that the other fields come from, unless overridden
    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    decoupled_decay: bool
    decay_norms: bool
    clip_norm: float
    schedule: str
    warmup_epochs: float
    milestones: tuple[float, ...]  # epochs
    gamma: float
    label_smoothing: float
    ema: float
    zero_init_residual: bool
    crop: str
    image_size: int
    flip: str
    random_erasing: float
    mixup: float
    cutmix: float
    imagenet_statistics: bool
    stem: Stem  # of an ImageNet-type architecture
    precision: str  # "float32" | "bfloat16"
    remat: bool = False  # keep only the blocks' inputs for the backward pass, and compute the rest again
    bn: str = "global"  # "global" | "per-device": of train.train_step
    on_nan: str = "stop"  # "stop" | "rollback"
    limit_train: int | None = None  # first images only
    limit_test: int | None = None
    val_split: int = 0  # last training images held out
    seed: int = 0

    def pipeline(self) -> Pipeline:
        """What happens to the images."""
        mean, std = STATISTICS["imagenet" if self.imagenet_statistics else self.dataset]
        return Pipeline(
            self.crop, self.image_size, self.flip, mean, std, self.random_erasing, self.mixup, self.cutmix
        )  # fmt: skip

    def check(self) -> None:
        """Raises :class:`InputError` with everything that is out of range."""
        zoo.find(self.arch)
        problems = [
            f"unknown {name.replace('_', ' ')} {getattr(self, name)!r}: there are {', '.join(choices)}"
            for name, choices in CHOICES.items()
            if getattr(self, name) not in choices
        ]
        for names, low, high in RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    problems.append(f"{name} must be {_range(low, high)}, got {value}")
        problems += [f"{name} must be above 0, got 0" for name in ("lr", "gamma") if getattr(self, name) == 0]
        problems += [
            f"{name} must be below 1, got 1"
            for name in ("momentum", "ema", "label_smoothing")
            if getattr(self, name) == 1
        ]
        problems += ["nesterov needs a momentum above 0"] if self.nesterov and self.momentum == 0 else []
        if self.schedule == "step":
            least = self.warmup_epochs
            problems += [f"milestone {m:g} is not above 0" for m in self.milestones if m <= 0]
            problems += [f"milestone {m:g} lies in the warm-up" for m in self.milestones if 0 < m < least]
        elif self.milestones:
            problems.append(f"milestones belong to --schedule step, not {self.schedule}")
        if self.warmup_epochs > self.epochs:
            problems.append(f"warmup_epochs {self.warmup_epochs:g} are more than the run's {self.epochs}")
        if problems:
            raise InputError("; ".join(problems))


CHOICES = {
    "optimizer": tuple(recipes.OPTIMIZERS),
    "schedule": tuple(recipes.SCHEDULES),
    "crop": ("pad", "resized"),
    "flip": ("none", "random", "alternate"),
    "precision": ("float32", "bfloat16"),
    "bn": ("global", "per-device"),
    "on_nan": ("stop", "rollback"),
}
_INFINITY = float("inf")
RANGES = (  # names of fields, the least and the largest value
    ("epochs batch_size image_size limit_train limit_test", 1, _INFINITY),
    ("val_split lr gamma weight_decay clip_norm warmup_epochs mixup cutmix", 0, _INFINITY),
    ("momentum ema label_smoothing random_erasing", 0, 1),
    ("seed", 0, 2**32 - 1),
)


def _range(low: float, high: float) -> str:
    return f"at least {low:g}" if high == _INFINITY else f"from {low:g} to {high:.0f}"


def default_config(
    *, recipe: str = "step", dataset: str = "cifar10", arch: str | None = None, **overrides: Any
) -> RunConfig:
    """The configuration of ``recipe`` on ``dataset``; an override of None means the recipe's own value.

    Raises:
        InputError: for an unknown recipe, dataset or architecture, or values out of range.
    """
    if recipe not in recipes.RECIPES:
        raise InputError(f"unknown recipe {recipe!r}: there are {', '.join(recipes.RECIPES)}")
    if dataset not in recipes.DATASETS:
        raise InputError(f"unknown dataset {dataset!r}: there are {', '.join(recipes.DATASETS)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    row = dataclasses.asdict(recipes.RECIPES[recipe])
    for name, table in (("optimizer", recipes.OPTIMIZERS), ("schedule", recipes.SCHEDULES)):
        if given.get(name, row[name]) != row[name]:
            row |= table.get(given[name], {})
    smaller = recipes.DATASETS[dataset]
    row["lr"] *= smaller.get("batch_size", row["batch_size"]) / row["batch_size"]
    values = row | smaller | given
    values["arch"] = arch = arch or row["arch"] or "resnet34"
    if zoo.find(arch).config.stem == "cifar":
        values["stem"] = "cifar"
    if "milestones" not in given:
        values["milestones"] = recipes.milestones_in_epochs(values["milestones"], values["epochs"])
    values["milestones"] = tuple(float(m) for m in values["milestones"])
    values.setdefault("warmup_epochs", values["warmup"] * values["epochs"])
    if values.get("precision") in (None, "auto"):
        values["precision"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    config = RunConfig(**{k: v for k, v in values.items() if k in fields}, dataset=dataset, recipe=recipe)
    config.check()
    return config


def read_config(out: Path) -> RunConfig | None:
    """The configuration of the run in ``out``; None where there is none.

    Raises:
        InputError: where its ``config.json`` is damaged.
    """
    path = out / "config.json"
    try:
        if not path.exists():
            return None
        values = json.loads(path.read_text())["run"]
        return RunConfig(**{**values, "milestones": tuple(values["milestones"])})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no run's configuration ({error}): choose another --out") from error


def read_runs(out: Path) -> int | None:
    """How many seeds the run in ``out`` has, where it has several."""
    return json.loads((out / "config.json").read_text()).get("runs")


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """``field was X, now Y`` for each field that differs."""
    return [
        f"{field.name} was {getattr(before, field.name)!r}, now {getattr(now, field.name)!r}"
        for field in dataclasses.fields(RunConfig)
        if getattr(before, field.name) != getattr(now, field.name)
    ]
