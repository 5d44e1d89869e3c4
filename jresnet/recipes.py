"""Training recipes, as data. A flag of the training script overrides a field; ``config.json`` shows the outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Mean and standard deviation, by channel, of the training images' pixels in [0, 1]; ImageNet's are torchvision's.
STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "digits": ((0.3055, 0.3055, 0.3055), (0.3240, 0.3240, 0.3240)),
}


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum and step decay on a dataset, and what happens to the images."""

    epochs: int  # passes over the training images
    batch_size: int  # images
    lr: float  # learning rate of the first steps
    momentum: float  # of PyTorch's SGD: buf = momentum * buf + g
    nesterov: bool
    weight_decay: float  # 1 per step and learning rate, on every parameter, BN's and biases too, as PyTorch's default
    gamma: float  # factor of the learning rate at a milestone
    milestones: tuple[float, ...] | int  # fractions of the run, or every so many epochs
    crop: str  # of augment.Pipeline
    image_size: int  # pixels, height and width of what the network sees
    flip: bool  # mirror half of the training images
    imagenet_statistics: bool  # normalise by ImageNet's mean and std instead of the dataset's own
    arch: str | None  # the architecture that belongs to the recipe
    stem: str  # for ImageNet-type architectures
    source: str


RECIPES = {
    "step": Recipe(
        epochs=200, batch_size=128, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, gamma=0.1,
        milestones=(0.5, 0.75), crop="pad", image_size=32, flip=True, imagenet_statistics=False, arch=None,
        stem="cifar", source="He et al. 2016, section 4.2, with the weight decay and Nesterov momentum of arXiv:1605.07146",
    ),
    "blog": Recipe(
        epochs=100, batch_size=64, lr=1e-3, momentum=0.9, nesterov=False, weight_decay=0.0, gamma=0.1,
        milestones=10, crop="resized", image_size=224, flip=True, imagenet_statistics=True, arch="resnet34_projection",
        stem="imagenet", source="a widely copied tutorial; keeps the epoch that is best on the test images",
    ),
}  # fmt: skip

# What a dataset changes in every recipe. The 1,437 training digits are a 35th of CIFAR-10 and far easier: four epochs of
# smaller batches give 99 %. A mirrored digit is another digit or none.
DATASETS: dict[str, dict[str, Any]] = {"cifar10": {}, "digits": {"epochs": 4, "batch_size": 32, "flip": False}}


def milestones_in_epochs(milestones: tuple[float, ...] | int, epochs: int) -> tuple[float, ...]:
    """A recipe's milestones for a run of ``epochs``: 0.5 and 0.75 of 200 are 100 and 150; every 10 of 30, 10 and 20."""
    if isinstance(milestones, int):
        return tuple(float(epoch) for epoch in range(milestones, epochs, milestones))
    return tuple(fraction * epochs for fraction in milestones)
