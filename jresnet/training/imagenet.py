"""Training on ImageNet from scratch: a table of published recipes, and the configuration of a run on streamed images.

The accuracies are those of the sources, for ResNet-50 on ImageNet-1k; jresnet has not run any of these recipes completely.
Comments beside a recipe say where jresnet differs from its source.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import jax

from jresnet.data.dataset import Dataset, Split
from jresnet.data.folder import Listing
from jresnet.data.stream import Files
from jresnet.errors import DataError, InputError
from jresnet.models import zoo
from jresnet.training import recipes
from jresnet.training.augment import Pipeline
from jresnet.training.config import FilesConfig
from jresnet.training.fields import option
from jresnet.training.recipes import Recipe
from jresnet.weights import published
from jresnet.weights.preprocessing import STATISTICS, Preprocessing

ARCH = "resnet50"


@dataclass(frozen=True, kw_only=True)
class ImageNetRecipe(Recipe):
    """A row of :data:`RECIPES`; its fields are those of :class:`ImageNetConfig`."""

    augment: str = "none"
    magnitude: float = 0.0
    repeats: int = 1
    loss: str = "softmax"
    target_threshold: float = 0.0
    test_size: int = 224
    test_resize: int
    interpolation: str = "bilinear"
    # For another batch size, the learning rate is scaled in proportion to the batch ("linear", arXiv:1706.02677) or to its
    # square root ("root", arXiv:1904.00962, section 4).
    scaling: str = "linear"


RECIPES = {
    # 76.13 %: torchvision's IMAGENET1K_V1. https://github.com/pytorch/vision/tree/main/references/classification (ResNet):
    # train.py's defaults on 8 GPUs; comments give its flags.
    "classic": ImageNetRecipe(
        epochs=90, batch_size=256,  # epochs 90; batch-size 32 on each of 8
        optimizer="sgd", lr=0.1, momentum=0.9, nesterov=False,  # opt sgd lr 0.1 momentum 0.9
        weight_decay=1e-4, decay_norms=True, decoupled_decay=False,  # weight-decay 1e-4, on all parameters
        schedule="step", milestones=(1 / 3, 2 / 3), gamma=0.1, warmup=0.0,  # lr-step-size 30 lr-gamma 0.1
        clip_norm=0.0, label_smoothing=0.0, ema=0.0, zero_init_residual=False,
        crop="resized", image_size=224, flip="random", random_erasing=0.0, mixup=0.0, cutmix=0.0,
        test_resize=256, imagenet_statistics=True, arch=ARCH, stem="imagenet",
        source="torchvision, references/classification: IMAGENET1K_V1, 76.13 %",
    ),
    # 78.1 %: "ResNet strikes back", arXiv:2110.00476, table 2, column A3. Settings that are not in the table are timm's:
    # "rand-m6-mstd0.5-inc1", BCE with a threshold of 0.2, crop_pct 0.95, and Lamb's max_grad_norm 1. Unlike A1 and A2, A3
    # has no repeated augmentation. Differences: the warm-up starts at lr / (number of warm-up steps), not at 1e-4; the
    # cosine ends at 0, not at 1e-6; RandAugment always samples bilinearly, where timm draws bilinear or bicubic.
    "a3": ImageNetRecipe(
        epochs=100, batch_size=2048,
        optimizer="lamb", lr=8e-3, momentum=0.9, nesterov=False, scaling="root",
        weight_decay=0.02, decay_norms=False, decoupled_decay=False,  # timm: not on BatchNorm and biases
        schedule="cosine", milestones=(), gamma=0.1, warmup=0.05,  # 5 epochs
        clip_norm=1.0, label_smoothing=0.0, ema=0.0, zero_init_residual=False,
        crop="resized", image_size=160, flip="random", random_erasing=0.0, mixup=0.1, cutmix=1.0,
        augment="rand", magnitude=6.0, loss="sigmoid", target_threshold=0.2,
        test_resize=235, interpolation="bicubic",  # 224 / 0.95
        imagenet_statistics=True, arch=ARCH, stem="imagenet",
        source="arXiv:2110.00476, table 2, A3: 78.1 %",
    ),
    # 80.86 %: torchvision's IMAGENET1K_V2, https://github.com/pytorch/vision/issues/3995#issuecomment-1013906621 and
    # https://pytorch.org/blog/how-to-train-state-of-the-art-models-using-torchvision-latest-primitives/. Differences: the
    # learning rate changes every step, not every epoch; no weight decay on fc's bias; the average is updated every step, not
    # every 32 steps.
    "tv2": ImageNetRecipe(
        epochs=600, batch_size=1024,  # epochs 600; batch-size 128 on each of 8
        optimizer="sgd", lr=0.5, momentum=0.9, nesterov=False,  # lr 0.5
        weight_decay=2e-5, decay_norms=False, decoupled_decay=False,  # weight-decay 0.00002 norm-weight-decay 0.0
        schedule="cosine", milestones=(), gamma=0.1, warmup=5 / 600,  # lr-scheduler cosineannealinglr lr-warmup-epochs 5
        clip_norm=0.0, label_smoothing=0.1, zero_init_residual=False,  # label-smoothing 0.1
        # model-ema: model-ema-steps 32 model-ema-decay 0.99998 amount to a weight of 2e-5 * 1024 * 32 / 600 per 32 steps
        ema=0.999966,
        crop="resized", image_size=176, flip="random", random_erasing=0.1,  # train-crop-size 176 random-erase 0.1
        mixup=0.2, cutmix=1.0, augment="trivial",  # mixup-alpha 0.2 cutmix-alpha 1.0 auto-augment ta_wide
        repeats=4,  # ra-sampler ra-reps 4
        test_resize=232, imagenet_statistics=True, arch=ARCH, stem="imagenet",  # val-resize-size 232
        source="torchvision, references/classification: IMAGENET1K_V2, 80.86 %",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImageNetConfig(FilesConfig):
    """All settings that determine the result of a run from scratch on streamed images."""

    recipe: str = option(
        "the defaults of the other options: "
        + "; ".join(f"{name}: {row.epochs} epochs, batch {row.batch_size}, {row.source}" for name, row in RECIPES.items()),
        "recipe", choices=tuple(RECIPES),
    )  # fmt: skip
    arch: str = option("any architecture of jresnet.list_models()", "network", metavar="NAME")
    data_digest: str = option("SHA-256 of the images' names and labels", "", "")  # avoids reading a million files
    image_size: int = option(
        "height and width of the training views in pixels", "recipe", metavar="N", least=1, most=4096
    )
    test_size: int = option(
        "size of the centre crop for evaluation, in pixels", "recipe", 224, metavar="N", least=1, most=4096
    )
    test_resize: int = option(
        "size of the shorter side before the centre crop, in pixels", "recipe", 256, metavar="N", least=1, most=4096
    )
    interpolation: str = option("interpolation for resizing", "recipe", "bilinear", choices=("bilinear", "bicubic"))
    min_area: float = option(
        "smallest fraction of an image's area that a random crop covers", "recipe", 0.08, above=0, most=1
    )
    repeats: int = option(
        "views of an image in a batch; an epoch then covers 1 / N of the images",
        "recipe",
        1,
        metavar="N",
        least=1,
        most=64,
    )

    def pipeline(self) -> Pipeline:
        """The augmentation and normalisation of images."""
        mean, std = STATISTICS["imagenet"]
        return Pipeline(
            self.crop, self.image_size, self.flip, mean, std, self.random_erasing, self.mixup, self.cutmix, self.min_area,
            self.augment, self.magnitude,
        )  # fmt: skip

    def preprocessing(self) -> Preprocessing:
        """The preprocessing for evaluation."""
        return Preprocessing(self.test_resize, self.test_size, *STATISTICS["imagenet"], self.interpolation)

    def check(self) -> None:
        """Raises :class:`InputError` that lists all invalid values."""
        super().check()
        self.preprocessing().check()

    def _contradictions(self) -> list[str]:
        found = super()._contradictions()
        if self.flip == "alternate":
            found.append("`flip` alternate is for images in memory; use random for images from disk")
        if self.batch_size % self.repeats:
            found.append(f"`batch_size` must be a multiple of `repeats` {self.repeats}, got {self.batch_size}")
        return found


def choose(recipe: str = "classic", **given: Any) -> tuple[ImageNetConfig, list[str]]:
    """Chooses the configuration of a run.

    Args:
        recipe: a key of :data:`RECIPES`.
        given: fields of :class:`ImageNetConfig` that the user chose; None: the recipe's value. Warm-up and milestones are
            scaled with the number of epochs, and the learning rate with the batch size.

    Returns:
        The configuration, and notes on it.

    Raises:
        InputError: unknown recipe, or values out of range.
    """
    if recipe not in RECIPES:
        raise InputError(f"unknown `recipe` {recipe!r}: there are {', '.join(RECIPES)}")
    given = {name: value for name, value in given.items() if value is not None}
    row = RECIPES[recipe]
    values: dict[str, Any] = {
        field.name: getattr(row, field.name)
        for field in dataclasses.fields(row)
        if field.name not in ("warmup", "source", "scaling")
    }
    for name, table in (("optimizer", recipes.OPTIMIZERS), ("schedule", recipes.SCHEDULES)):
        if given.get(name, values[name]) != values[name]:
            values |= {key: value for key, value in table.get(given[name], {}).items() if key in values}
    values |= given
    notes = []
    if "lr" not in given and "optimizer" not in given and (batch := given.get("batch_size")) and type(batch) is int:
        share = max(batch, 1) / row.batch_size
        values["lr"] = row.lr * (share if row.scaling == "linear" else math.sqrt(share))
        if share != 1:
            how = "in proportion to the batch" if row.scaling == "linear" else "with the square root of the batch"
            notes.append(
                f"lr {values['lr']:g}: the recipe's {row.lr:g} for a batch of {row.batch_size:,}, scaled {how}"
            )
    if type(values["epochs"]) is int:
        values.setdefault("warmup_epochs", row.warmup * values["epochs"])
        if "milestones" not in given:
            values["milestones"] = recipes.milestones_in_epochs(values["milestones"], values["epochs"])
    values["milestones"] = tuple(values["milestones"])
    if zoo.find(values["arch"]).config.stem == "cifar":
        values["stem"] = "cifar"
    if values.get("precision") in (None, "auto"):
        values["precision"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    values.setdefault("dataset", "images")
    config = ImageNetConfig(**values, recipe=recipe)
    config.check()
    return config, notes


def dataset(listing: Listing, config: ImageNetConfig) -> Dataset:
    """The images of a listing as two splits; images are opened only when they are used.

    Args:
        listing: the result of :func:`jresnet.data.folder.find`, with validation images.
        config: configuration of the run. ImageNet's classes get their English names.

    Raises:
        DataError: there are no validation images.
    """
    if listing.held is None:
        raise DataError(
            f"{listing.name} has no validation images: put some into a folder val beside train, by class as there"
        )
    parts = (listing.train, listing.held)
    train, held = (Split(Files(part.sources, config.preprocessing()), part.labels) for part in parts)  # type: ignore[arg-type]
    total = hashlib.sha256()
    for part in parts:
        total.update(part.sources.digest() + part.labels.astype("<i4").tobytes())
    classes = published.categories() if listing.classes == published.wnids() else listing.classes
    return Dataset("images", classes, train, held, listing.name, listing.notes, {}, total.hexdigest())
