"""Models by name: :func:`create`, :func:`list_models` and one function an architecture."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jresnet.errors import InputError, WeightsError
from jresnet.models import zoo
from jresnet.models.resnet import ResNet, Shortcut, Stem
from jresnet.weights import hub, native
from jresnet.weights import published as pretrained

_log = logging.getLogger(__name__)


def list_models() -> list[str]:
    """The names that :func:`create` takes."""
    return list(zoo.ZOO)


def create(
    arch: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    stem: Stem | None = None,
    shortcut: Shortcut | None = None,
    zero_init_residual: bool = False,
    dtype: DTypeLike | None = None,
    remat: bool = False,
    seed: int = 0,
) -> ResNet:
    """Builds a ResNet.

    >>> import jax.numpy as jnp, jresnet
    >>> model = jresnet.create("resnet18", num_classes=10, stem="cifar")
    >>> model(jnp.zeros((2, 32, 32, 3))).shape
    (2, 10)

    Args:
        arch: a name of :func:`list_models`.
        weights: a native file's path; or the name of published weights such as ``"IMAGENET1K_V2"`` or ``"DEFAULT"``, or
            ``"hf:ORG/REPO[@REVISION]"`` on the Hugging Face Hub (with the extra ``hub``), which are downloaded and
            converted. ``None``: random parameters, initialised as PyTorch's.
        num_classes: logits. ``None``: those of the weights, else the architecture's own (1,000, or 10 for the CIFAR
            family). Another number than the weights' asks for a fresh head, as in timm.
        in_channels: channels of the images. ``None``: those of the weights, else the architecture's own (3; 1 for
            resnet18_d2l). A stem for 3 is adapted to another number, as in timm (:func:`jresnet.weights.native.adapt`).
        stem: ``"imagenet"`` (7x7 at stride 2, max-pool) or ``"cifar"`` (3x3 at stride 1, no max-pool).
            ``None``: that of the weights, else the architecture's own.
        shortcut: ``"pad"``, ``"projection"``, ``"projection_first"`` or ``"conv"`` (:mod:`jresnet.models.resnet` has what they
            mean). ``None``: that of the weights, else the architecture's own.
        zero_init_residual: start each block's last BN scale at 0; without effect where ``weights`` are given.
        dtype: a floating-point dtype to compute in; parameters, statistics and logits stay float32.
        remat: in training, keep only each block's input for the backward pass and compute the rest again: less memory for
            a third more arithmetic. On the CPU it needs ``jresnet.compiler_options(remat=True)``.
        seed: of the random parameters, or of a fresh head.

    Raises:
        InputError: for an unknown architecture or weights' name, or a value out of range.
        WeightsError: for a file that is damaged, or holds another network than asked for.
        DownloadError: where published weights are neither in the cache nor to be had.
    """
    chosen: dict[str, Any] = {
        "num_classes": num_classes, "in_channels": in_channels, "stem": stem, "shortcut": shortcut,
    }  # fmt: skip
    config = native.configure(arch, **chosen)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dtype must be a floating-point dtype such as bfloat16, got {dtype!r}")
    if weights is None:
        return ResNet(config, zero_init_residual=zero_init_residual, dtype=dtype, remat=remat, rngs=nnx.Rngs(seed))
    if hub.is_spec(weights):
        own, values = hub.read(hub.fetch(str(weights)), arch)
    elif is_path(weights):
        found, own, values, _ = native.read(os.fspath(weights))
        if found != arch:
            raise WeightsError(f"the weights {weights} are of another network: its architecture is {found}, not {arch}")
    else:
        own, values = pretrained.read(pretrained.find(arch, str(weights)))
    config = dataclasses.replace(own, **{name: value for name, value in chosen.items() if value is not None})
    values, adapted = native.adapt(values, own, config, seed)
    for note in adapted:
        _log.info("%s: %s", weights, note)
    return native.fill(config, values, dtype, remat)


def is_path(source: str | os.PathLike[str]) -> bool:
    """Whether ``weights`` names a file and not published weights: it exists, or looks like a path."""
    text = os.fspath(source)
    return not isinstance(source, str) or os.path.exists(text) or Path(text).suffix != "" or os.sep in text


def _named(arch: str) -> Callable[..., ResNet]:
    row = zoo.find(arch)

    def build(**options: Any) -> ResNet:
        return create(arch, **options)

    build.__name__ = build.__qualname__ = arch
    build.__doc__ = (
        f"{arch}: {row.parameters:,} parameters, {row.gmacs} GMACs at {row.image_size} pixels ({row.source}).\n\n"
        "Arguments and errors as :func:`jresnet.create`."
    )
    signature = inspect.signature(create)
    build.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p for p in signature.parameters.values() if p.name != "arch"]
    )
    return build


resnet18 = _named("resnet18")
resnet34 = _named("resnet34")
resnet50 = _named("resnet50")
resnet101 = _named("resnet101")
resnet152 = _named("resnet152")
resnext50_32x4d = _named("resnext50_32x4d")
resnext101_32x8d = _named("resnext101_32x8d")
resnext101_64x4d = _named("resnext101_64x4d")
wide_resnet50_2 = _named("wide_resnet50_2")
wide_resnet101_2 = _named("wide_resnet101_2")
resnet20_cifar = _named("resnet20_cifar")
resnet32_cifar = _named("resnet32_cifar")
resnet44_cifar = _named("resnet44_cifar")
resnet56_cifar = _named("resnet56_cifar")
resnet110_cifar = _named("resnet110_cifar")
resnet1202_cifar = _named("resnet1202_cifar")
resnet34_projection = _named("resnet34_projection")
resnet18_d2l = _named("resnet18_d2l")
