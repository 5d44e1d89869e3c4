"""Training recipes as data. Flags of ``jresnet train`` override their fields; ``config.json`` contains the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jresnet.training.fields import option

ARCH = "resnet34"  # default architecture, unless the recipe has one

# Changes that a data set makes to every recipe. The 1,437 training digits are 1/35 of CIFAR-10 and much easier, so that four
# epochs of smaller batches suffice. The learning rate is scaled with the batch (arXiv:1706.02677, section 2.1). Digits are
# not mirrored, because a mirrored digit is another digit, or not a digit.
DATASETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "cifar100": {},
    "digits": {"epochs": 4, "batch_size": 32, "flip": "none"},
}

# Defaults of an optimizer or schedule, if it is not the recipe's.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "weight_decay": 5e-4, "nesterov": True},
    "adamw": {"lr": 1e-3, "weight_decay": 1e-2, "nesterov": False},  # PyTorch's defaults
    # arXiv:2110.00476, table 2, A2: lr 5e-3 for batches of 2,048, scaled linearly to 128 (arXiv:1706.02677)
    "lamb": {"lr": 3e-4, "weight_decay": 0.02, "nesterov": False},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "step": {"milestones": (0.5, 0.75)},
    "cosine": {"milestones": ()},
    "onecycle": {"milestones": (), "warmup": 0.2},
}
_ADAMW = OPTIMIZERS["adamw"]
MAX_EPOCHS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """The settings of a recipe: optimizer, schedule, loss and augmentation."""

    # Length and optimizer
    epochs: int = option("passes over the training images", "recipe", metavar="N", least=1, most=MAX_EPOCHS)
    batch_size: int = option("images per step, over all devices", "recipe", metavar="N", least=1)
    optimizer: str = option(
        f"adamw has default lr {_ADAMW['lr']:g} and weight decay {_ADAMW['weight_decay']:g}; b2 of adamw and lamb is 0.999",
        "recipe",
        choices=tuple(OPTIMIZERS),
    )  # fmt: skip
    lr: float = option("peak learning rate", "recipe", above=0)
    momentum: float = option(
        "momentum of SGD as in PyTorch (buf = momentum * buf + g), or b1 of AdamW and LAMB", "recipe", least=0, below=1
    )
    nesterov: bool = option("Nesterov momentum", "recipe")
    weight_decay: float = option("weight decay, multiplied by the learning rate", "recipe", metavar="F", least=0)
    decay_norms: bool = option(
        "weight decay also on BN's parameters and all biases, as in PyTorch's optimizers", "recipe"
    )
    decoupled_decay: bool = option(  # arXiv:1711.05101
        "apply SGD's weight decay after the momentum, which weakens it by 1 / (1 - momentum); AdamW always does so",
        "recipe",
    )
    clip_norm: float = option(
        "clip the global gradient norm to this value; 0: no clipping", "recipe", metavar="L", least=0
    )
    schedule: str = option(
        "learning rate after the warm-up: decreases at milestones, by a cosine to 0, or linearly to 0; onecycle has a "
        f"default warm-up of {SCHEDULES['onecycle']['warmup']:g} of the run",
        "recipe", choices=tuple(SCHEDULES),
    )  # fmt: skip
    gamma: float = option("factor of the learning rate at each milestone", "recipe", above=0, most=1)
    # Loss and weights
    label_smoothing: float = option(  # arXiv:1512.00567, section 7
        "fraction of the target spread over all classes", "recipe", metavar="F", least=0, below=1
    )
    ema: float = option(
        "decay per step of an exponential moving average of the weights, which is evaluated and saved; 0: none", "recipe",
        metavar="F", least=0, below=1,
    )  # fmt: skip
    zero_init_residual: bool = option(  # arXiv:1706.02677, section 5.1
        "initialise the last BN scale of each block to 0", "recipe"
    )
    # Images; the fields of augment.Pipeline
    crop: str = option("kind of random crop", "", choices=("pad", "resized"))
    image_size: int = option("height and width in pixels of the network's input", "", least=1, most=4096)
    flip: str = option(
        "mirror training images at random, or each in every second epoch", "recipe",
        choices=("none", "random", "alternate"),
    )  # fmt: skip
    random_erasing: float = option("probability of erasing a rectangle", "recipe", metavar="P", least=0, most=1)
    mixup: float = option("mix images and targets; weights from Beta(ALPHA, ALPHA)", "recipe", metavar="ALPHA", least=0)
    cutmix: float = option(
        "paste a rectangle of another image; if mixup is given too, each batch uses one of them", "recipe",
        metavar="ALPHA", least=0,
    )  # fmt: skip
    imagenet_statistics: bool = option("normalise with ImageNet's mean and std instead of the data set's", "")


@dataclass(frozen=True, kw_only=True)
class Recipe(Hyperparameters):
    """A row of :data:`RECIPES`. Durations are fractions of the run, because the user may change its number of epochs."""

    warmup: float = 0.0  # fraction of the run with a linear warm-up of the learning rate
    milestones: tuple[float, ...] | int  # of schedule "step": fractions of the run, or an interval in epochs
    arch: str | None = None  # default architecture of the recipe
    stem: str = "cifar"  # for ImageNet-type architectures
    source: str


RECIPES = {
    "step": Recipe(
        epochs=200, batch_size=128, optimizer="sgd", **OPTIMIZERS["sgd"], momentum=0.9, decoupled_decay=False,
        decay_norms=True, clip_norm=0.0, schedule="step", **SCHEDULES["step"], gamma=0.1, label_smoothing=0.0, ema=0.0,
        zero_init_residual=False, crop="pad", image_size=32, flip="random", random_erasing=0.0, mixup=0.0, cutmix=0.0,
        imagenet_statistics=False,
        source="He et al. 2016, section 4.2, with the weight decay and Nesterov momentum of arXiv:1605.07146",
    ),
    "fast": Recipe(
        epochs=20, batch_size=512, optimizer="sgd", lr=0.4, momentum=0.9, nesterov=True, weight_decay=5e-4,
        decoupled_decay=False, decay_norms=False, clip_norm=0.0, schedule="onecycle", **SCHEDULES["onecycle"], gamma=0.1,
        label_smoothing=0.1, ema=0.99, zero_init_residual=False, crop="pad", image_size=32, flip="alternate",
        random_erasing=0.0, mixup=0.0, cutmix=0.0, imagenet_statistics=False,
        source="one cycle: arXiv:1708.07120; alternating flip: arXiv:2404.00498; no decay on BN: arXiv:1812.01187",
    ),
    "blog": Recipe(
        epochs=100, batch_size=64, optimizer="sgd", lr=1e-3, momentum=0.9, nesterov=False, weight_decay=0.0,
        decoupled_decay=False, decay_norms=True, clip_norm=0.0, schedule="step", gamma=0.1, milestones=10,
        label_smoothing=0.0, ema=0.0, zero_init_residual=False, crop="resized", image_size=224, flip="random",
        random_erasing=0.0, mixup=0.0, cutmix=0.0, imagenet_statistics=True, arch="resnet34_projection", stem="imagenet",
        source="a widely copied tutorial; it keeps the epoch with the best accuracy on the test images",
    ),
}  # fmt: skip


def milestones_in_epochs(milestones: tuple[float, ...] | int, epochs: int) -> tuple[float, ...]:
    """Converts a recipe's milestones to epochs: 0.5 and 0.75 of 200 give 100 and 150; every 10 of 30 give 10 and 20."""
    if isinstance(milestones, int):
        return tuple(float(epoch) for epoch in range(milestones, epochs, milestones))
    return tuple(fraction * epochs for fraction in milestones)


def value_in_words(recipe: Recipe, name: str) -> str:
    """A recipe's value of a field of a run's configuration, for --help."""
    if name == "warmup_epochs":
        return f"{recipe.warmup:g} of the run" if recipe.warmup else "0"
    value = getattr(recipe, name) if name != "arch" else recipe.arch or ARCH
    if name == "milestones":
        if isinstance(value, int):
            return f"every {value}"
        return "at " + " and ".join(f"{share:.0%}" for share in value) if value else "none"
    return in_words(value)


def in_words(value: Any) -> str:
    """Formats the value of a field: booleans as yes and no, numbers as short as possible."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
