"""Training recipes, as data. A flag of the training script overrides a field; ``config.json`` shows the outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How to train, and what happens to the images."""

    # Length and optimizer
    epochs: int  # passes over the training images
    batch_size: int  # images
    optimizer: str  # "sgd", or "adamw" with b2 = 0.999
    lr: float  # the highest learning rate
    momentum: float  # of PyTorch's SGD: buf = momentum * buf + g; AdamW's b1
    nesterov: bool
    weight_decay: float  # a step and unit of learning rate
    decoupled_decay: bool  # outside the momentum, as AdamW always has it (arXiv:1711.05101); else in the gradient
    decay_norms: bool  # also on BN's scale and bias and on fc's bias, as PyTorch's optimizers do
    clip_norm: float  # longest gradient, over all parameters together; 0: no limit
    schedule: str  # "step", "cosine", "onecycle": see optim.schedule
    warmup: float  # share of the run in which the learning rate rises linearly to lr
    gamma: float  # of "step": factor of the learning rate at a milestone
    milestones: tuple[float, ...] | int  # of "step": shares of the run, or every so many epochs
    # Loss and weights
    label_smoothing: float  # share of the target spread over all classes (arXiv:1512.00567, section 7)
    ema: float  # decay a step of the average of weights that is evaluated and kept; 0: the weights themselves
    zero_init_residual: bool  # last BN scale of each block starts at 0 (arXiv:1706.02677, section 5.1)
    # Images
    crop: str  # of augment.Pipeline, as are the next five
    image_size: int  # pixels, height and width of what the network sees
    flip: str
    random_erasing: float
    mixup: float
    cutmix: float
    imagenet_statistics: bool  # normalise by ImageNet's mean and std instead of the dataset's own
    arch: str | None  # the architecture that belongs to the recipe
    stem: str  # for ImageNet-type architectures
    source: str


_STEP = Recipe(
    epochs=200, batch_size=128, optimizer="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4,
    decoupled_decay=False, decay_norms=True, clip_norm=0.0, schedule="step", warmup=0.0, gamma=0.1,
    milestones=(0.5, 0.75), label_smoothing=0.0, ema=0.0, zero_init_residual=False, crop="pad", image_size=32,
    flip="random", random_erasing=0.0, mixup=0.0, cutmix=0.0, imagenet_statistics=False, arch=None, stem="cifar",
    source="He et al. 2016, section 4.2, with the weight decay and Nesterov momentum of arXiv:1605.07146",
)  # fmt: skip

RECIPES = {
    "step": _STEP,
    "fast": Recipe(
        epochs=20, batch_size=512, optimizer="sgd", lr=0.4, momentum=0.9, nesterov=True, weight_decay=5e-4,
        decoupled_decay=False, decay_norms=False, clip_norm=0.0, schedule="onecycle", warmup=0.2, gamma=0.1,
        milestones=(), label_smoothing=0.1, ema=0.99, zero_init_residual=False, crop="pad", image_size=32,
        flip="alternate", random_erasing=0.0, mixup=0.0, cutmix=0.0, imagenet_statistics=False, arch=None, stem="cifar",
        source="one cycle: arXiv:1708.07120; alternating flip: arXiv:2404.00498; decay spares BN: arXiv:1812.01187",
    ),
    "blog": Recipe(
        epochs=100, batch_size=64, optimizer="sgd", lr=1e-3, momentum=0.9, nesterov=False, weight_decay=0.0,
        decoupled_decay=False, decay_norms=True, clip_norm=0.0, schedule="step", warmup=0.0, gamma=0.1,
        milestones=10, label_smoothing=0.0, ema=0.0, zero_init_residual=False, crop="resized", image_size=224,
        flip="random", random_erasing=0.0, mixup=0.0, cutmix=0.0, imagenet_statistics=True, arch="resnet34_projection",
        stem="imagenet", source="a widely copied tutorial; keeps the epoch that is best on the test images",
    ),
}  # fmt: skip

# What a dataset changes in every recipe. The 1,437 training digits are a 35th of CIFAR-10 and far easier: four epochs of
# smaller batches are enough, at a learning rate that is smaller by as much (arXiv:1706.02677, section 2.1). A mirrored digit
# is another digit or none.
DATASETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "digits": {"epochs": 4, "batch_size": 32, "flip": "none"},
}

# What another optimizer or schedule than the recipe's own changes beside itself, where no flag says otherwise.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "weight_decay": 5e-4, "nesterov": True},
    "adamw": {"lr": 1e-3, "weight_decay": 1e-2, "nesterov": False},  # PyTorch's defaults
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "step": {"milestones": _STEP.milestones},
    "cosine": {"milestones": ()},
    "onecycle": {"milestones": (), "warmup": 0.2},
}


def milestones_in_epochs(milestones: tuple[float, ...] | int, epochs: int) -> tuple[float, ...]:
    """A recipe's milestones for a run of ``epochs``: 0.5 and 0.75 of 200 are 100 and 150; every 10 of 30, 10 and 20."""
    if isinstance(milestones, int):
        return tuple(float(epoch) for epoch in range(milestones, epochs, milestones))
    return tuple(fraction * epochs for fraction in milestones)
