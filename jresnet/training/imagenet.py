"""ImageNet from scratch: published recipes as rows of data, and the configuration of a run on images that are streamed.

The accuracies are the sources' own, of ResNet-50 on ImageNet-1k; none of the recipes has been run to its end by jresnet.
What a recipe's source does otherwise than jresnet can is said beside its row.
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
    """A row of :data:`RECIPES`; fields as :class:`ImageNetConfig`."""

    augment: str = "none"
    magnitude: float = 0.0
    repeats: int = 1
    loss: str = "softmax"
    target_threshold: float = 0.0
    test_size: int = 224
    test_resize: int
    interpolation: str = "bilinear"
    # A run's batch may be another one: the learning rate then changes in proportion ("linear", arXiv:1706.02677) or with
    # the root of the proportion ("root", arXiv:1904.00962, section 4).
    scaling: str = "linear"


RECIPES = {
    # 76.13 %: torchvision's IMAGENET1K_V1. https://github.com/pytorch/vision/tree/main/references/classification (ResNet):
    # train.py's defaults on 8 GPUs; its flags stand beside the values.
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
    # 78.1 %: "ResNet strikes back", arXiv:2110.00476, table 2, column A3; what the table leaves out is timm's: its arguments
    # "rand-m6-mstd0.5-inc1", BCE with a threshold of 0.2, crop_pct 0.95, and Lamb's max_grad_norm 1. A3 has no repeated
    # augmentation, which A1 and A2 have. Not as there: the warm-up begins at lr / (its steps), not at 1e-4; the cosine ends
    # at 0, not at 1e-6; RandAugment samples bilinearly where timm draws bilinear or bicubic.
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
    # https://pytorch.org/blog/how-to-train-state-of-the-art-models-using-torchvision-latest-primitives/. Not as there: the
    # rate changes every step, not every epoch; fc's bias does not decay; the average is taken every step, not every 32.
    "tv2": ImageNetRecipe(
        epochs=600, batch_size=1024,  # epochs 600; batch-size 128 on each of 8
        optimizer="sgd", lr=0.5, momentum=0.9, nesterov=False,  # lr 0.5
        weight_decay=2e-5, decay_norms=False, decoupled_decay=False,  # weight-decay 0.00002 norm-weight-decay 0.0
        schedule="cosine", milestones=(), gamma=0.1, warmup=5 / 600,  # lr-scheduler cosineannealinglr lr-warmup-epochs 5
        clip_norm=0.0, label_smoothing=0.1, zero_init_residual=False,  # label-smoothing 0.1
        # model-ema: model-ema-steps 32 model-ema-decay 0.99998 come to a share of 2e-5 * 1024 * 32 / 600 in 32 steps
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
    """All that decides the outcome of a run from scratch on images that are streamed."""

    recipe: str = option(
        "where what is not given comes from: "
        + "; ".join(f"{name}: {row.epochs} epochs, batch {row.batch_size}, {row.source}" for name, row in RECIPES.items()),
        "recipe", choices=tuple(RECIPES),
    )  # fmt: skip
    arch: str = option("any architecture of jresnet.list_models()", "network", metavar="NAME")
    data_digest: str = option("SHA-256 of the images' names and labels", "", "")  # a million files are not read for it
    image_size: int = option(
        "pixels, height and width of the training views", "recipe", metavar="N", least=1, most=4096
    )
    test_size: int = option("pixels of what is evaluated", "recipe", 224, metavar="N", least=1, most=4096)
    test_resize: int = option(
        "pixels of the shorter side before the centre of it is cut out", "recipe", 256, metavar="N", least=1, most=4096
    )
    interpolation: str = option("of resizing", "recipe", "bilinear", choices=("bilinear", "bicubic"))
    min_area: float = option(
        "the smallest share of an image's area that a random crop keeps", "recipe", 0.08, above=0, most=1
    )
    repeats: int = option(
        "views of an image in a batch; an epoch then sees one in so many of the images", "recipe", 1, metavar="N", least=1,
        most=64,
    )  # fmt: skip

    def pipeline(self) -> Pipeline:
        """What happens to the images."""
        mean, std = STATISTICS["imagenet"]
        return Pipeline(
            self.crop, self.image_size, self.flip, mean, std, self.random_erasing, self.mixup, self.cutmix, self.min_area,
            self.augment, self.magnitude,
        )  # fmt: skip

    def preprocessing(self) -> Preprocessing:
        """Of images to be evaluated."""
        return Preprocessing(self.test_resize, self.test_size, *STATISTICS["imagenet"], self.interpolation)

    def check(self) -> None:
        """Raises :class:`InputError` with everything that is wrong."""
        super().check()
        self.preprocessing().check()

    def _contradictions(self) -> list[str]:
        found = super()._contradictions()
        if self.flip == "alternate":
            found.append("`flip` alternate is for images in memory; images from disk take random")
        if self.batch_size % self.repeats:
            found.append(f"`batch_size` must be a multiple of `repeats` {self.repeats}, got {self.batch_size}")
        return found


def choose(recipe: str = "classic", **given: Any) -> tuple[ImageNetConfig, list[str]]:
    """The configuration of a run, and what there is to say about it.

    Args:
        recipe: a row of :data:`RECIPES`.
        given: fields of :class:`ImageNetConfig` that the user chose; None: the recipe's own. Warm-up and milestones move
            with the number of epochs, the learning rate with the batch.

    Raises:
        InputError: for an unknown recipe, or values out of range.
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
            how = "in proportion to" if row.scaling == "linear" else "with the root of"
            notes.append(
                f"lr {values['lr']:g}: the recipe's {row.lr:g} for a batch of {row.batch_size:,}, {how} the batch"
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
    """The images of a listing as two splits; none of them is opened before it is trained on.

    Args:
        listing: of :func:`jresnet.data.folder.find`, with images held for validation.
        config: of the run; the classes of ImageNet's folders get their English names.

    Raises:
        DataError: there are no images for validation.
    """
    if listing.held is None:
        raise DataError(
            f"{listing.name} has no images to judge by: put some into a folder val beside train, by class as there"
        )
    parts = (listing.train, listing.held)
    train, held = (Split(Files(part.sources, config.preprocessing()), part.labels) for part in parts)  # type: ignore[arg-type]
    total = hashlib.sha256()
    for part in parts:
        total.update(part.sources.digest() + part.labels.astype("<i4").tobytes())
    classes = published.categories() if listing.classes == published.wnids() else listing.classes
    return Dataset("images", classes, train, held, listing.name, listing.notes, {}, total.hexdigest())
