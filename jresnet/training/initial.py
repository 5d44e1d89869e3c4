"""Weights that a run starts from: a file's or published ones, made to fit the classes of the run's data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flax import nnx

from jresnet import sources
from jresnet.errors import WeightsError
from jresnet.files import few
from jresnet.models import params, zoo
from jresnet.models.config import ResNetConfig


@dataclass(frozen=True, eq=False)
class Initial:
    """A network of the zoo with its trained arrays."""

    spec: str  # as the user named them
    arch: str
    config: ResNetConfig
    values: Mapping[str, np.ndarray]  # float32, by dotted path
    categories: tuple[str, ...] | None  # names of the logits; None: the weights do not say
    image_size: int | None  # pixels of the images they were trained for; None: they do not say

    def fit(self, wanted: ResNetConfig, classes: Sequence[str], seed: int) -> tuple[dict[str, np.ndarray], list[str]]:
        """The values for a network of other classes, whose head is then drawn anew from ``seed``.

        Returns:
            The values, and a sentence on what is not as the weights had it, or cannot be known.

        Raises:
            WeightsError: the weights are of another network.
        """
        found, values, count = self.config, self.values, wanted.num_classes
        others = self.categories is not None and self.categories != tuple(classes)
        if others and found.num_classes == count:  # as many, but not the same ones
            found = dataclasses.replace(found, num_classes=0)
            values = params.body(values)
        fitted, notes = params.adapt(values, found, wanted, nnx.Rngs(seed))
        if others and self.config.num_classes == count:
            notes = [
                f"fresh head for {count} classes, to be trained: the weights' own is for {few(self.categories or ())}"
            ]
        elif self.categories is None and found.num_classes == count:
            notes = [f"the head for {count} classes is the weights' own, which do not say what these classes are"]
        return fitted, notes


def load(spec: str, arch: str | None = None) -> Initial:
    """The weights that ``spec`` names; it and errors as :func:`jresnet.sources.load`.

    Raises:
        WeightsError: also where the network is none that training makes.
    """
    found = sources.load(spec, arch)
    config, preprocessing = found.config, found.preprocessing
    known = {"num_classes": config.num_classes, "in_channels": config.in_channels, "stem": config.stem}
    if found.arch is None or zoo.configure(found.arch, **known) != config:
        raise WeightsError(
            f"the weights {spec} are of {found.arch or 'a network of no name'} with {config}: a run starts from weights of "
            "an architecture of jresnet.list_models() as it is"
        )
    if config.in_channels != 3:
        raise WeightsError(f"the weights {spec} take images of {config.in_channels} channels; a run's have 3")
    values = {path: np.asarray(value, np.float32) for path, value in found.values.items()}
    size = preprocessing.crop if preprocessing else None
    return Initial(spec, found.arch, config, values, found.categories, size)
