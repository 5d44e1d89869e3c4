"""The initial weights of a run: from a file or published ones, adapted to the classes of the run's data."""

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

    spec: str  # name of the weights, as the user gave it
    arch: str
    config: ResNetConfig
    values: Mapping[str, np.ndarray]  # float32, by dotted path
    categories: tuple[str, ...] | None  # names of the classes; None: the weights do not specify them
    image_size: int | None  # size of the training images in pixels; None: the weights do not specify it

    def fit(self, wanted: ResNetConfig, classes: Sequence[str], seed: int) -> tuple[dict[str, np.ndarray], list[str]]:
        """The values for a network with other classes, whose head is newly initialised from ``seed``.

        Returns:
            The values, and notes on what differs from the weights or is unknown.

        Raises:
            WeightsError: the weights belong to another network.
        """
        found, values, count = self.config, self.values, wanted.num_classes
        others = self.categories is not None and self.categories != tuple(classes)
        if others and found.num_classes == count:  # other classes of the same number
            found = dataclasses.replace(found, num_classes=0)
            values = params.body(values)
        fitted, notes = params.adapt(values, found, wanted, nnx.Rngs(seed))
        if others and self.config.num_classes == count:
            notes = [
                f"new head for {count} classes, to be trained: the weights have a head for {few(self.categories or ())}"
            ]
        elif self.categories is None and found.num_classes == count:
            notes = [f"the head for {count} classes is that of the weights, but the weights do not name their classes"]
        return fitted, notes


def load(spec: str, arch: str | None = None) -> Initial:
    """Loads weights; arguments and errors as in :func:`jresnet.sources.load`.

    Raises:
        WeightsError: the network is not an architecture of the zoo, or does not take three channels.
    """
    found = sources.load(spec, arch)
    config, preprocessing = found.config, found.preprocessing
    known = {"num_classes": config.num_classes, "in_channels": config.in_channels, "stem": config.stem}
    if found.arch is None or zoo.configure(found.arch, **known) != config:
        raise WeightsError(
            f"the weights {spec} belong to {found.arch or 'a network without a name'} with {config}: expected an unmodified "
            "architecture of jresnet.list_models()"
        )
    if config.in_channels != 3:
        raise WeightsError(
            f"the weights {spec} take images of {config.in_channels} channels, but training images have 3"
        )
    values = {path: np.asarray(value, np.float32) for path, value in found.values.items()}
    size = preprocessing.crop if preprocessing else None
    return Initial(spec, found.arch, config, values, found.categories, size)
