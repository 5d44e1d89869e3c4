"""Converts a model to a flat dict of arrays, keyed by dotted path, and back."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jresnet.errors import WeightsError
from jresnet.files import few
from jresnet.models.config import ResNetConfig
from jresnet.models.layers import Linear
from jresnet.models.resnet import ResNet

_STATE = (nnx.Param, nnx.BatchStat)


def arrays(model: ResNet) -> dict[str, Any]:
    """All parameters and running statistics of a model, sorted by dotted path, such as ``layer1.0.bn2.mean``."""
    flat = nnx.to_flat_state(nnx.state(model, _STATE))
    return dict(sorted((".".join(map(str, path)), variable.get_value()) for path, variable in flat))


def config_of(model: ResNet) -> ResNetConfig:
    """The current configuration of ``model``: a head that was replaced determines the number of classes."""
    if model.fc is None:
        return dataclasses.replace(model.config, num_classes=0)
    if type(model.fc) in (Linear, nnx.Linear):
        return dataclasses.replace(model.config, num_classes=model.fc.kernel.shape[-1])
    return model.config


@functools.lru_cache(64)
def shapes(config: ResNetConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter and running statistic, by dotted path."""
    return MappingProxyType({path: leaf.shape for path, leaf in arrays(ResNet(config, rngs=None)).items()})


def fill(
    config: ResNetConfig, values: Mapping[str, np.ndarray], dtype: DTypeLike | None = None, remat: bool = False
) -> ResNet:
    """Builds a model whose leaves are ``values``, by dotted path; ``dtype`` and ``remat`` as in :class:`ResNet`.

    Warns:
        UserWarning: some values are float64, which JAX converts to float32 unless its x64 mode is on.
    """
    narrow = jax.dtypes.canonicalize_dtype(np.float64) != np.float64
    if narrow and any(value.dtype == np.float64 for value in values.values()):
        warnings.warn("float64 weights are converted to float32: jax.enable_x64(True) keeps float64", stacklevel=3)
    graph, state = nnx.split(ResNet(config, dtype=dtype, remat=remat, rngs=None), _STATE)
    flat = {
        path: variable.replace(jax.numpy.asarray(values[".".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat))


def body(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values without those of the head, by dotted path."""
    return {path: value for path, value in values.items() if not path.startswith("fc.")}


def adapt(
    values: Mapping[str, np.ndarray], found: ResNetConfig, wanted: ResNetConfig, rngs: nnx.Rngs | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Adapts weights to another number of classes or input channels, as timm does.

    A head for another number of classes is newly initialised, as PyTorch's ``nn.Linear``; for a network without a head it is
    dropped. A stem kernel for three channels is summed over them for one channel. For any other number C of channels they
    are repeated cyclically and scaled by 3 / C, so that activations keep their magnitude. A different output stride needs
    no change of the weights.

    Args:
        values: parameters and statistics of ``found``, by dotted path.
        found: configuration of the weights.
        wanted: configuration of the network to build.
        rngs: random numbers for a new head; ``None``: ``nnx.Rngs(0)``.

    Returns:
        The adapted values by dotted path, and one sentence for each part that is no longer as it was trained.

    Raises:
        WeightsError: the networks differ in anything else, or the weights' stem does not have three channels and would have
            to be adapted.
    """
    values, notes = dict(values), []
    problems = [
        f"its {field.name} is {getattr(found, field.name)!r}, not {getattr(wanted, field.name)!r}"
        for field in dataclasses.fields(ResNetConfig)
        if field.name not in ("num_classes", "in_channels", "output_stride")
        and getattr(found, field.name) != getattr(wanted, field.name)
    ]
    if found.in_channels != wanted.in_channels:
        if found.in_channels == 3:
            kernel, channels = np.asarray(values["conv1.kernel"]), wanted.in_channels
            if channels == 1:
                values["conv1.kernel"], how = kernel.sum(2, keepdims=True), "summed over the channels"
            else:
                repeated = np.take(kernel, np.arange(channels) % 3, axis=2)
                values["conv1.kernel"] = repeated * np.asarray(3 / channels, kernel.dtype)
                how = f"its channels repeated in turn and scaled by 3/{channels}"
            notes.append(f"stem for {channels} input channel{'s' * (channels > 1)}: the kernel for 3, {how}")
        else:
            problems.append(
                f"its in_channels is {found.in_channels}, not {wanted.in_channels}: only a stem for 3 can be adapted"
            )
    if problems:
        raise WeightsError(f"the weights are of another network: {'; '.join(problems)}")
    if found.num_classes != wanted.num_classes and wanted.num_classes == 0:
        values = body(values)
    elif found.num_classes != wanted.num_classes:
        dtype = values["conv1.kernel"].dtype
        head = Linear(wanted.num_features, wanted.num_classes, rngs=rngs or nnx.Rngs(0))
        values |= {f"fc.{name}": np.asarray(getattr(head, name)[...], dtype) for name in ("kernel", "bias")}
        own = f"a head for {found.num_classes}" if found.num_classes else "no head"
        notes.append(f"new head for {wanted.num_classes} classes, to be trained: the weights have {own}")
    return values, notes


def differences(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Compares two tables of shapes by name: one line per kind of difference, with a few names; empty if they are equal."""
    missing, unexpected = expected.keys() - got.keys(), got.keys() - expected.keys()
    misshapen = [
        f"{k} is {list(got[k])}, not {list(expected[k])}"
        for k in sorted(expected.keys() & got.keys())
        if tuple(got[k]) != tuple(expected[k])
    ]
    lines = []
    for title, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected)), ("misshapen", misshapen)):
        if names:
            lines.append(f"{len(names)} {title}: {few(names)}")
    return lines
