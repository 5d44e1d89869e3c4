"""Training recipes, as data. A flag of ``jresnet train`` overrides a field; ``config.json`` shows the outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jresnet.training.fields import option

ARCH = "resnet34"  # where neither the recipe nor the user names one

# What a dataset changes in every recipe. The 1,437 training digits are a 35th of CIFAR-10 and far easier: four epochs of
# smaller batches are enough, at a learning rate that is smaller by as much (arXiv:1706.02677, section 2.1). A mirrored digit
# is another digit or none.
DATASETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "cifar100": {},
    "digits": {"epochs": 4, "batch_size": 32, "flip": "none"},
}

# What an optimizer or schedule brings along, where neither its recipe nor the user says otherwise.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "weight_decay": 5e-4, "nesterov": True},
    "adamw": {"lr": 1e-3, "weight_decay": 1e-2, "nesterov": False},  # PyTorch's defaults
    # arXiv:2110.00476, table 2, A2, whose lr of 5e-3 is for batches of 2,048; linear scaling to 128 (arXiv:1706.02677)
    "lamb": {"lr": 3e-4, "weight_decay": 0.02, "nesterov": False},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "step": {"milestones": (0.5, 0.75)},
    "cosine": {"milestones": ()},
    "onecycle": {"milestones": (), "warmup": 0.2},
}
_ADAMW = OPTIMIZERS["adamw"]
MAX_EPOCHS = 1_000_000  # more than anybody trains


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """How to train, and what happens to the images: what a recipe decides for a run."""

    # Length and optimizer
    epochs: int = option("passes over the training images", "recipe", metavar="N", least=1, most=MAX_EPOCHS)
    batch_size: int = option("images a step, over all devices", "recipe", metavar="N", least=1)
    optimizer: str = option(
        f"adamw brings lr {_ADAMW['lr']:g} and weight decay {_ADAMW['weight_decay']:g}; its b2, and lamb's, is 0.999",
        "recipe",
        choices=tuple(OPTIMIZERS),
    )  # fmt: skip
    lr: float = option("highest learning rate", "recipe", above=0)
    momentum: float = option(
        "of PyTorch's SGD, buf = momentum * buf + g, or AdamW's and LAMB's b1; 0 to below 1", "recipe", least=0, below=1
    )
    nesterov: bool = option("Nesterov momentum", "recipe")
    weight_decay: float = option("weight decay, a step and unit of learning rate", "recipe", metavar="F", least=0)
    decay_norms: bool = option(
        "weight decay on BN's parameters and all biases too, as PyTorch's optimizers do", "recipe"
    )
    decoupled_decay: bool = option(  # arXiv:1711.05101
        "SGD's weight decay outside the momentum, where it acts 1 / (1 - momentum) times less; AdamW's always is",
        "recipe",
    )
    clip_norm: float = option(
        "longest gradient, over all parameters together; 0: no limit", "recipe", metavar="L", least=0
    )
    schedule: str = option(
        "of the learning rate after the warm-up: falls at milestones, as half a cosine to 0, or linearly to 0; onecycle "
        f"brings a warm-up of {SCHEDULES['onecycle']['warmup']:g} of the run",
        "recipe", choices=tuple(SCHEDULES),
    )  # fmt: skip
    gamma: float = option("factor of the learning rate at a milestone", "recipe", above=0, most=1)
    # Loss and weights
    label_smoothing: float = option(  # arXiv:1512.00567, section 7
        "share of the target spread over all classes", "recipe", metavar="F", least=0, below=1
    )
    ema: float = option(
        "decay a step of an average of the weights, which is then evaluated and kept; 0: none", "recipe",
        metavar="F", least=0, below=1,
    )  # fmt: skip
    zero_init_residual: bool = option(  # arXiv:1706.02677, section 5.1
        "start the last BN scale of each block at 0", "recipe"
    )
    # Images; the fields of augment.Pipeline
    crop: str = option("how an image is cut out", "", choices=("pad", "resized"))
    image_size: int = option("pixels, height and width of what the network sees", "", least=1, most=4096)
    flip: str = option(
        "mirror training images at random, or each in every second epoch", "recipe",
        choices=("none", "random", "alternate"),
    )  # fmt: skip
    random_erasing: float = option("probability of an erased rectangle", "recipe", metavar="P", least=0, most=1)
    mixup: float = option("mix images and targets, shares from Beta(ALPHA, ALPHA)", "recipe", metavar="ALPHA", least=0)
    cutmix: float = option(
        "paste a rectangle of another image; with mixup too, each batch has one of the two", "recipe",
        metavar="ALPHA", least=0,
    )  # fmt: skip
    imagenet_statistics: bool = option("normalise by ImageNet's mean and std instead of the dataset's own", "")


@dataclass(frozen=True, kw_only=True)
class Recipe(Hyperparameters):
    """A row of :data:`RECIPES`; lengths of time are shares of the run, whose epochs the user may choose."""

    warmup: float = 0.0  # share of the run in which the learning rate rises linearly to lr
    milestones: tuple[float, ...] | int  # of "step": shares of the run, or every so many epochs
    arch: str | None = None  # the architecture that belongs to the recipe
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
        source="one cycle: arXiv:1708.07120; alternating flip: arXiv:2404.00498; decay spares BN: arXiv:1812.01187",
    ),
    "blog": Recipe(
        epochs=100, batch_size=64, optimizer="sgd", lr=1e-3, momentum=0.9, nesterov=False, weight_decay=0.0,
        decoupled_decay=False, decay_norms=True, clip_norm=0.0, schedule="step", gamma=0.1, milestones=10,
        label_smoothing=0.0, ema=0.0, zero_init_residual=False, crop="resized", image_size=224, flip="random",
        random_erasing=0.0, mixup=0.0, cutmix=0.0, imagenet_statistics=True, arch="resnet34_projection", stem="imagenet",
        source="a widely copied tutorial; keeps the epoch that is best on the test images",
    ),
}  # fmt: skip


def milestones_in_epochs(milestones: tuple[float, ...] | int, epochs: int) -> tuple[float, ...]:
    """A recipe's milestones for a run of ``epochs``: 0.5 and 0.75 of 200 are 100 and 150; every 10 of 30, 10 and 20."""
    if isinstance(milestones, int):
        return tuple(float(epoch) for epoch in range(milestones, epochs, milestones))
    return tuple(fraction * epochs for fraction in milestones)


def value_in_words(recipe: Recipe, name: str) -> str:
    """What a recipe says of a field of a run's configuration, for --help."""
    if name == "warmup_epochs":
        return f"{recipe.warmup:g} of the run" if recipe.warmup else "0"
    value = getattr(recipe, name) if name != "arch" else recipe.arch or ARCH
    if name == "milestones":
        if isinstance(value, int):
            return f"every {value}"
        return "at " + " and ".join(f"{share:.0%}" for share in value) if value else "none"
    return in_words(value)


def in_words(value: Any) -> str:
    """A value of a field as people write it: yes and no, and numbers as short as they go."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
