"""The configuration of a run: a recipe with the changes of a data set and of the user; stored in ``config.json``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import jax

from jresnet.errors import InputError
from jresnet.files import read_ordinary
from jresnet.models import zoo
from jresnet.models.config import Stem
from jresnet.training import recipes
from jresnet.training.augment import Pipeline
from jresnet.training.fields import option, problems
from jresnet.training.recipes import Hyperparameters
from jresnet.weights.preprocessing import STATISTICS, Preprocessing

MAX_CONFIG = 2**20  # largest config.json that is read, in bytes; usual ones have about 2,000
Config = TypeVar("Config", bound="RunConfig")
IMAGE = 32  # height and width in pixels of the data sets' images


@dataclass(frozen=True, kw_only=True)
class RunConfig(Hyperparameters):
    """All settings that determine the result of a run."""

    arch: str = option("any architecture of jresnet.list_models()", "", metavar="NAME")
    dataset: str = option(
        "digits: 1,797 handwritten digits that come with scikit-learn", "data", choices=tuple(recipes.DATASETS)
    )
    recipe: str = option(
        "the defaults of the other options: "
        + "; ".join(
            f"{name}: {row.epochs} epochs, batch {row.batch_size}, lr {row.lr:g}, schedule {row.schedule}"
            + (f", {row.arch} at {row.image_size} pixels" if row.arch else "")
            for name, row in recipes.RECIPES.items()
        ),
        "", choices=tuple(recipes.RECIPES),
    )  # fmt: skip
    warmup_epochs: float = option("epochs of linear warm-up of the learning rate", "recipe", metavar="N", least=0)
    milestones: tuple[float, ...] = option(
        "epochs at which schedule step multiplies the learning rate by gamma", "recipe", metavar="EPOCH", above=0,
        most=recipes.MAX_EPOCHS,
    )  # fmt: skip
    stem: str = option("first layers of an ImageNet-type architecture", "", choices=get_args(Stem))
    precision: str = option(
        "compute dtype of the convolutions; auto is bfloat16 on GPU and TPU, float32 on the CPU", "network",
        choices=("float32", "bfloat16"), automatic=True,
    )  # fmt: skip
    weights: str | None = option(
        "start from these weights: a native or PyTorch file, published weights (resnet50:IMAGENET1K_V2), or hf:ORG/REPO; "
        "they determine the architecture, and the head is newly initialised if their classes differ",
        "network", None, metavar="W", none="random ones",
    )  # fmt: skip
    augment: str = option(
        "additional augmentation: colour jitter, RandAugment (timm's rand-mM-mstd0.5-inc1) or TrivialAugment", "recipe",
        "none", choices=("none", "jitter", "rand", "trivial"),
    )  # fmt: skip
    magnitude: float = option(
        "magnitude of augment rand, from 0 to 10, or ten times the strength of augment jitter",
        "recipe",
        4.0,
        metavar="M",
        least=0,
        most=10,
    )
    loss: str = option(
        "softmax cross-entropy, or the mean binary cross-entropy over all classes", "recipe", "softmax",
        choices=("softmax", "sigmoid"),
    )  # fmt: skip
    target_threshold: float = option(
        "for loss sigmoid: targets above it become 1, the others 0; 0: targets are not changed", "recipe", 0.0,
        metavar="F", least=0, below=1,
    )  # fmt: skip
    remat: bool = option(
        "store only the blocks' inputs for the backward pass and recompute the rest: less memory, slower", "recipe",
        False,
    )  # fmt: skip
    bn: str = option(
        "BatchNorm over the whole batch, or over each device's part as in PyTorch's DDP", "devices", "global",
        choices=("global", "per-device"),
    )  # fmt: skip
    on_nan: str = option(
        "if the loss is not finite: stop, or return to the last checkpoint and continue in another order, at most three "
        "times", "when something is wrong", "stop", choices=("stop", "rollback"),
    )  # fmt: skip
    limit_train: int | None = option("only the first N training images", "data", None, metavar="N", none="all", least=1)
    limit_test: int | None = option("only the first N test images", "data", None, metavar="N", none="all", least=1)
    val_split: int = option(
        "hold out the last N training images and choose the best epoch on them", "data", 0, metavar="N", least=0
    )
    seed: int = option("seed of parameters, order and augmentation", "recipe", 0, metavar="N", least=0, most=2**32 - 1)

    def pipeline(self) -> Pipeline:
        """The augmentation and normalisation of images."""
        mean, std = STATISTICS["imagenet" if self.imagenet_statistics else self.dataset]
        return Pipeline(
            self.crop, self.image_size, self.flip, mean, std, self.random_erasing, self.mixup, self.cutmix,
            augment=self.augment, magnitude=self.magnitude,
        )  # fmt: skip

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parts of the network that are not trained (:mod:`jresnet.models.paths`)."""
        return ()

    @property
    def details(self) -> tuple[str, ...]:
        """Phrases that describe settings of this kind of run, to print."""
        return ()

    @property
    def repeats(self) -> int:
        """The number of views of an image in a batch."""
        return 1

    def preprocessing(self) -> Preprocessing:
        """The preprocessing for evaluation."""
        pipeline = self.pipeline()
        resize = round(self.image_size * 8 / 7) if self.crop == "resized" else None
        return Preprocessing(resize, self.image_size, pipeline.mean, pipeline.std)

    def check(self) -> None:
        """Raises :class:`InputError` that lists all invalid values: types, choices, ranges and contradictions."""
        self._check_fields()
        zoo.find(self.arch)

    def _check_fields(self) -> None:
        found = problems(self)
        if not found:  # the comparisons below need values of the right types
            found = self._contradictions()
        if found:
            raise InputError("; ".join(found))

    def _contradictions(self) -> list[str]:
        found = ["`nesterov` needs a `momentum` above 0"] if self.nesterov and self.momentum == 0 else []
        if self.loss != "sigmoid" and self.target_threshold:
            found.append(f"`target_threshold` is only for `loss` sigmoid, not {self.loss}")
        if self.schedule != "step" and self.milestones:
            found.append(f"`milestones` are only for `schedule` step, not {self.schedule}")
        found += [f"milestone {m:g} is within the warm-up" for m in self.milestones if m < self.warmup_epochs]
        if self.warmup_epochs > self.epochs:
            found.append(
                f"a warm-up of {self.warmup_epochs:g} epochs is longer than the run's {self.epochs}: fewer "
                "`warmup_epochs`, or more `epochs`"
            )
        return found + self._wrong_sizes()

    def _wrong_sizes(self) -> list[str]:
        """Problems of sizes that cannot be cropped from a data set's images, which all have the same size."""
        found = []
        if self.crop == "pad" and self.image_size != IMAGE:
            found.append(
                f"`image_size` must be {IMAGE} with `crop` pad, which does not scale images, got {self.image_size}"
            )
        least = IMAGE * 7 // 8  # then the evaluation view is the centre crop of an image of IMAGE pixels
        if self.crop == "resized" and self.image_size < least:
            found.append(f"`image_size` must be at least {least} with `crop` resized, got {self.image_size}")
        return found


@dataclass(frozen=True, kw_only=True)
class FilesConfig(RunConfig):
    """The configuration of a run on image files, which may have any size and are ordered by class."""

    dataset: str = option("images", "", metavar="DATA")
    # The first N images would belong to one class.
    limit_train: int | None = option("not used", "", None)
    limit_test: int | None = option("not used", "", None)
    val_split: int = option("not used: the validation images are separate", "", 0, least=0, most=0)
    images: str = option("location of the images, as the user gave it", "", "")

    def _wrong_sizes(self) -> list[str]:
        return []


def default_config(
    *, recipe: str = "step", dataset: str = "cifar10", arch: str | None = None, **overrides: Any
) -> RunConfig:
    """The configuration of ``recipe`` on ``dataset``; overrides of None are ignored.

    Raises:
        InputError: unknown recipe, data set or architecture, or values out of range.
        TypeError: an override is not a field of :class:`RunConfig`.
    """
    if recipe not in recipes.RECIPES:
        raise InputError(f"unknown `recipe` {recipe!r}: there are {', '.join(recipes.RECIPES)}")
    if dataset not in recipes.DATASETS:
        raise InputError(f"unknown `dataset` {dataset!r}: there are {', '.join(recipes.DATASETS)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    row = dataclasses.asdict(recipes.RECIPES[recipe])
    for name, table in (("optimizer", recipes.OPTIMIZERS), ("schedule", recipes.SCHEDULES)):
        if given.get(name, row[name]) != row[name]:
            row |= table.get(given[name], {})
    smaller = recipes.DATASETS[dataset]
    row["lr"] *= smaller.get("batch_size", row["batch_size"]) / row["batch_size"]
    values = row | smaller | given
    values["arch"] = (row["arch"] or recipes.ARCH) if arch is None else arch
    if zoo.find(values["arch"]).config.stem == "cifar":
        values["stem"] = "cifar"
    if "milestones" not in given and type(values["epochs"]) is int:
        values["milestones"] = recipes.milestones_in_epochs(values["milestones"], values["epochs"])
    values["milestones"] = tuple(values["milestones"])
    values.setdefault("warmup_epochs", values["warmup"] * values["epochs"])
    if values.get("precision") in (None, "auto"):
        values["precision"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    for name in ("warmup", "source"):
        del values[name]
    config = RunConfig(**values, dataset=dataset, recipe=recipe)
    config.check()
    return config


def read_config(out: Path, kind: type[Config] = RunConfig) -> Config | None:  # type: ignore[assignment]
    """Reads the configuration of the run in ``out``, of class ``kind``; None if there is no run.

    Raises:
        InputError: its ``config.json`` is damaged.
    """
    content = _read(out, kind)
    return content and content[0]


def read_runs(out: Path, kind: type[RunConfig] = RunConfig) -> int | None:
    """The number of seeds of the run in ``out``; None for a single run or no run; raises as :func:`read_config`."""
    content = _read(out, kind)
    return content and content[1]


def _read(out: Path, kind: type[Config]) -> tuple[Config, int | None] | None:
    path = out / "config.json"
    try:
        if not path.exists():
            return None
        content = json.loads(read_ordinary(path, MAX_CONFIG))
        values, runs = content["run"], content.get("runs")
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        config = kind(**known)
        config.check()
        if runs is not None and (type(runs) is not int or runs < 1):
            raise InputError(f"runs must be a whole number of at least 1, got {str(runs)[:60]}")
    except (OSError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:500]
        raise InputError(f"{path} is not the configuration of a run ({reason}): choose another `out`") from error
    return config, runs


def why_not_longer(before: RunConfig, now: RunConfig, begun: int) -> str | None:
    """The reason why a run cannot continue with other ``epochs`` and ``milestones``.

    Args:
        before: configuration of the run.
        now: configuration to continue with, which differs only in these fields.
        begun: number of epochs that were started.

    Returns:
        A reason, or None if the started epochs would have been the same with the new configuration.
    """
    if begun == 0:
        return None
    if now.epochs < begun:
        return f"{begun} epochs have already been started"
    if now.schedule != "step":
        return (
            f"with `schedule` {now.schedule} all learning rates depend on the number of epochs, so that the {begun} epochs "
            "already started would have used others"
        )
    passed = [[m for m in config.milestones if m < begun] for config in (before, now)]
    if passed[0] != passed[1]:
        return f"milestones before epoch {begun} cannot change any more"
    return None


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """A phrase ``field was X, now Y`` for each field that differs."""
    return [
        f"`{field.name}`{_meaning(field)} was {getattr(before, field.name)!r}, now {getattr(now, field.name)!r}"
        for field in dataclasses.fields(now)
        if getattr(before, field.name) != getattr(now, field.name)
    ]


def _meaning(field: dataclasses.Field[Any]) -> str:
    """For a digest, the help text that says of what; empty for other fields."""
    return f", {field.metadata['option'].help}," if field.name.endswith("_digest") else ""
