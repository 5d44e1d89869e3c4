"""The preprocessing of images, as weights specify it, and the statistics of common data sets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jresnet.errors import InputError, WeightsError

RGB = tuple[float, float, float]

# Mean and standard deviation, by channel, of the training images' pixels in [0, 1].
STATISTICS: Mapping[str, tuple[RGB, RGB]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "digits": ((0.3055, 0.3055, 0.3055), (0.3240, 0.3240, 0.3240)),
    # CIFAR-10 in kuangliu/pytorch-cifar, main.py, and many later repositories: the std is the mean of the images' stds
    "kuangliu": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    # weiaicunzai/pytorch-cifar100, conf/global_settings.py, rounded
    "cifar100": ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
}


def normalise(
    images: Float[Array, "n h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "n h w c"]:
    """Normalises JAX or numpy images with values from 0 to 255: ``(x / 255 - mean) / std`` per channel."""
    return (images / 255 - np.array(mean, images.dtype)) / np.array(std, images.dtype)


@dataclass(frozen=True)
class Preprocessing:
    """The steps from an image to the network's input, in this order; resizing is antialiased."""

    resize: int | None  # the shorter side is resized to this number of pixels; None: no resizing
    crop: int  # height and width of the centre crop, in pixels
    mean: tuple[float, ...] = STATISTICS["imagenet"][0]  # three values (RGB) or one (grey), for pixels in [0, 1]
    std: tuple[float, ...] = STATISTICS["imagenet"][1]
    interpolation: str = "bilinear"  # or "bicubic"

    def __str__(self) -> str:
        size = "as they are" if self.resize is None else f"shorter side {self.resize} pixels ({self.interpolation})"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{size}, centre {self.crop} x {self.crop}, mean {mean}, std {std}"

    def check(self) -> None:
        """Raises :class:`InputError` that lists all fields of a wrong type or out of range."""

        def pixels(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 4096

        def numbers(values: object) -> bool:
            return (
                isinstance(values, tuple)
                and len(values) in (1, 3)
                and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
            )

        problems = []
        if self.resize is not None and not pixels(self.resize):
            problems.append(f"resize must be null or 1 to 4096 pixels, got {_short(self.resize)}")
        if not pixels(self.crop):
            problems.append(f"crop must be 1 to 4096 pixels, got {_short(self.crop)}")
        if not numbers(self.mean) or not all(0 <= value <= 1 for value in self.mean):
            problems.append(f"mean must be one or three numbers from 0 to 1, got {_short(self.mean)}")
        if not numbers(self.std) or not all(0 < value <= 1 for value in self.std):
            problems.append(f"std must be one or three numbers above 0 and at most 1, got {_short(self.std)}")
        if not problems and len(self.mean) != len(self.std):
            problems.append(f"mean has {len(self.mean)} values and std {len(self.std)}")
        if self.interpolation not in ("bilinear", "bicubic"):
            problems.append(f"interpolation must be bilinear or bicubic, got {_short(self.interpolation)}")
        if problems:
            raise InputError("; ".join(problems))

    def to_json(self) -> str:
        """Converts to the string that a native file stores in the metadata entry ``preprocessing``."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """Reads the string of :meth:`to_json`, which may come from an untrusted file.

        Raises:
            WeightsError: the string is invalid; one message lists all problems.
        """
        try:
            found = json.loads(text)
            if not isinstance(found, dict):
                raise InputError(f"expected an object, got {_short(found)}")
            fields = {field.name for field in dataclasses.fields(cls)}
            problems = [f"{_short(name)} is unknown" for name in sorted(found.keys() - fields)]
            if "resize" not in found:  # the only field that may be null, so `check` cannot tell that it is missing
                problems.append("resize is missing")
            known: dict[str, Any] = {name: tuple(v) if isinstance(v := found.get(name), list) else v for name in fields}
            try:
                cls(**known).check()
            except InputError as error:
                problems.append(str(error))
            if problems:
                raise InputError("; ".join(problems))
        except (ValueError, RecursionError) as error:  # from json, and those above
            raise WeightsError(f"the preprocessing that the weights file states is invalid: {error}") from error
        return cls(**known)


def _short(value: object) -> str:
    """A value shortened for a message; values from untrusted files may be very long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
