"""Builds models by name: :func:`create`, :func:`list_models` and one function per architecture."""

from __future__ import annotations

import fnmatch
import os
import warnings
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jresnet import sources
from jresnet.errors import InputError, WeightsError
from jresnet.models import params, zoo
from jresnet.models.config import Shortcut, Stem, StrideIn
from jresnet.models.layers import as_dtype
from jresnet.models.resnet import ResNet


def list_models(pattern: str = "*") -> list[str]:
    """Lists the architecture names that :func:`create` accepts.

    Args:
        pattern: a shell-style wildcard pattern, such as ``"*_cifar"``.
    """
    return fnmatch.filter(zoo.ZOO, pattern)


def create(
    arch: str | None = None,
    *,
    weights: str | os.PathLike[str] | sources.Weights | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    stem: Stem | None = None,
    shortcut: Shortcut | None = None,
    stride_in: StrideIn | None = None,
    output_stride: int | None = None,
    zero_init_residual: bool = False,
    dtype: DTypeLike | None = None,
    remat: bool = False,
    seed: int | None = None,
    rngs: nnx.Rngs | None = None,
) -> ResNet:
    """Builds a ResNet.

    >>> import jax.numpy as jnp, jresnet
    >>> model = jresnet.create("resnet18", num_classes=10, stem="cifar")
    >>> model(jnp.zeros((2, 32, 32, 3))).shape
    (2, 10)

    Args:
        arch: a name from :func:`list_models`; ``None``: the architecture of ``weights``, which need not be in that list.
        weights: the weights to load; ``None``: random parameters, initialised as in PyTorch. One of

            * the result of :func:`jresnet.get_weights`;
            * the path of a native file or of a PyTorch file (``.pth``, ``.pt``, ``.th``, ``.safetensors``), which is
              converted without torch;
            * the name of published weights, such as ``"IMAGENET1K_V2"`` or ``"DEFAULT"``, which are downloaded;
            * ``"hf:ORG/REPO[@REVISION]"`` for weights on the Hugging Face Hub (needs the extra ``hub``).

            :func:`jresnet.sources.load` has the details.
        num_classes: number of logits. ``None``: that of the weights, else the architecture's default (1,000, or 10 for the
            CIFAR family). If it differs from the weights' number, the head is newly initialised, as in timm. 0: no head;
            the model returns the pooled features of :meth:`ResNet.embed`.
        in_channels: channels of the images. ``None``: those of the weights, else the architecture's default (3; 1 for
            resnet18_d2l). A stem for 3 channels is adapted to another number, as in timm
            (:func:`jresnet.models.params.adapt`).
        stem: ``"imagenet"`` (7x7 at stride 2, max-pool), ``"cifar"`` (3x3 at stride 1, no max-pool), or one of two variants
            found in PyTorch files: ``"cifar_pool"`` (3x3 at stride 1, max-pool) and ``"imagenet_no_pool"``. ``None``: that
            of the weights, else the architecture's default.
        shortcut: ``"pad"``, ``"projection"``, ``"projection_first"`` or ``"conv"``, explained in
            ``jresnet/models/config.py``. ``None``: that of the weights, else the architecture's default.
        stride_in: which convolution of a Bottleneck has the stride: ``"3x3"`` (torchvision), or ``"1x1"``, the first one
            (the paper; weights of Caffe and detectron2). The tensors of a PyTorch file do not reveal it: if the weights do
            not state it, it is ``"3x3"``.
        output_stride: ratio of the image's height and width to the last stage's, such as 8 or 16 instead of 32. Strides are
            replaced by dilation (torchvision's ``replace_stride_with_dilation``, timm's ``output_stride``), for
            segmentation and detection. The parameters stay the same, so that any weights of the architecture can be
            loaded. ``None``: that of the weights, else no dilation.
        zero_init_residual: initialise each block's last BN scale to 0; ignored if ``weights`` are given.
        dtype: floating-point compute dtype, or its name (``"bfloat16"``, ``"bf16"``); parameters, statistics and logits
            stay float32.
        remat: rematerialisation: in training, store only each block's input for the backward pass and recompute the rest,
            which saves memory and costs a third more arithmetic. On the CPU it needs
            ``jresnet.compiler_options(remat=True)``.
        seed: seed of the random parameters, or of a new head; ``None``: 0.
        rngs: random number streams to use instead of ``seed``, such as ``nnx.Rngs(0)``.

    Warns:
        UserWarning: the head was newly initialised and has to be trained, or the stem was adapted.

    Raises:
        InputError: unknown architecture, unknown name of weights, or a value out of range.
        WeightsError: a file is damaged, or contains another network than requested.
        DownloadError: published weights are not in the cache and cannot be downloaded.
    """
    chosen: dict[str, Any] = {
        "num_classes": num_classes, "in_channels": in_channels, "stem": stem, "shortcut": shortcut,
        "stride_in": stride_in,
        "output_stride": output_stride,
    }  # fmt: skip
    rngs = _rngs(seed, rngs)
    dtype = as_dtype(dtype)  # arguments are checked before anything is downloaded
    if weights is None:
        if arch is None:
            raise InputError(
                "expected the name of an architecture or weights, got neither: call jresnet.create('resnet50'), for example"
            )
        config = zoo.configure(arch, **chosen)
        return ResNet(config, zero_init_residual=zero_init_residual, dtype=dtype, remat=remat, rngs=rngs)
    if arch is not None:
        zoo.configure(arch, **chosen)
    found = _found(weights, arch, chosen)
    config = zoo.replaced(found.config, **chosen)
    values, adapted = params.adapt(found.values, found.config, config, rngs)
    for note in adapted:
        warnings.warn(f"{found.spec}: {note}", stacklevel=2)
    return params.fill(config, values, dtype, remat)


def _found(weights: Any, arch: str | None, chosen: dict[str, Any]) -> sources.Weights:
    if isinstance(weights, sources.Weights):
        if arch not in (None, weights.arch):
            raise WeightsError(f"the weights {weights.spec} belong to {weights.arch}, not to {arch}")
        return weights
    if not isinstance(weights, str | os.PathLike):
        raise InputError(
            "weights must be a path, a name such as 'IMAGENET1K_V2', 'hf:ORG/REPO', or what jresnet.get_weights returns, "
            f"got {weights!r}"
        )
    return sources.load(weights, arch, **chosen)


def _rngs(seed: Any, rngs: Any) -> nnx.Rngs:
    if rngs is None:
        if seed is not None and (not isinstance(seed, int | np.integer) or isinstance(seed, bool)):
            raise InputError(f"seed must be a whole number, got {seed!r}: a key goes into rngs=nnx.Rngs(key)")
        return nnx.Rngs(int(seed or 0))
    if seed is not None:
        raise InputError(f"seed and rngs are both given: leave out seed={seed!r}, or rngs")
    if not isinstance(rngs, nnx.Rngs):
        raise InputError(f"rngs must be flax.nnx.Rngs, such as nnx.Rngs(0), got {rngs!r}")
    return rngs


def load(path: str | os.PathLike[str], dtype: DTypeLike | None = None) -> ResNet:
    """Loads the network in a native file or a PyTorch file, whichever ResNet it is.

    Class names, preprocessing and scores are not part of a model: :func:`jresnet.get_weights` returns them. Pass them to
    :func:`jresnet.save` to keep them (``categories=weights.categories``).

    Args:
        path: the file.
        dtype: compute dtype, as in :func:`create`.

    Raises:
        The errors of :func:`create`.
    """
    return create(weights=Path(path), dtype=dtype)


class Options(TypedDict, total=False):
    """The arguments of :func:`create` except ``arch``."""

    weights: str | os.PathLike[str] | sources.Weights | None
    num_classes: int | None
    in_channels: int | None
    stem: Stem | None
    shortcut: Shortcut | None
    stride_in: StrideIn | None
    output_stride: int | None
    zero_init_residual: bool
    dtype: DTypeLike | None
    remat: bool
    seed: int | None
    rngs: nnx.Rngs | None


# One function per architecture, written out so that editors and type checkers see it. Arguments and errors: see `create`.


def resnet18(**options: Unpack[Options]) -> ResNet:
    """11,689,512 parameters, 1.81 GMACs at 224 pixels (He et al. 2016, arXiv:1512.03385, table 1; torchvision)."""
    return create("resnet18", **options)


def resnet34(**options: Unpack[Options]) -> ResNet:
    """21,797,672 parameters, 3.66 GMACs at 224 pixels (He et al. 2016, arXiv:1512.03385, table 1; torchvision)."""
    return create("resnet34", **options)


def resnet50(**options: Unpack[Options]) -> ResNet:
    """25,557,032 parameters, 4.09 GMACs at 224 pixels (He et al. 2016, arXiv:1512.03385, table 1; torchvision)."""
    return create("resnet50", **options)


def resnet101(**options: Unpack[Options]) -> ResNet:
    """44,549,160 parameters, 7.8 GMACs at 224 pixels (He et al. 2016, arXiv:1512.03385, table 1; torchvision)."""
    return create("resnet101", **options)


def resnet152(**options: Unpack[Options]) -> ResNet:
    """60,192,808 parameters, 11.51 GMACs at 224 pixels (He et al. 2016, arXiv:1512.03385, table 1; torchvision)."""
    return create("resnet152", **options)


def resnext50_32x4d(**options: Unpack[Options]) -> ResNet:
    """25,028,904 parameters, 4.23 GMACs at 224 pixels (Xie et al. 2017, arXiv:1611.05431; torchvision)."""
    return create("resnext50_32x4d", **options)


def resnext101_32x8d(**options: Unpack[Options]) -> ResNet:
    """88,791,336 parameters, 16.41 GMACs at 224 pixels (Xie et al. 2017, arXiv:1611.05431; torchvision)."""
    return create("resnext101_32x8d", **options)


def resnext101_64x4d(**options: Unpack[Options]) -> ResNet:
    """83,455,272 parameters, 15.46 GMACs at 224 pixels (Xie et al. 2017, arXiv:1611.05431; torchvision)."""
    return create("resnext101_64x4d", **options)


def wide_resnet50_2(**options: Unpack[Options]) -> ResNet:
    """68,883,240 parameters, 11.4 GMACs at 224 pixels (Zagoruyko & Komodakis 2016, arXiv:1605.07146; torchvision)."""
    return create("wide_resnet50_2", **options)


def wide_resnet101_2(**options: Unpack[Options]) -> ResNet:
    """126,886,696 parameters, 22.75 GMACs at 224 pixels (Zagoruyko & Komodakis 2016, arXiv:1605.07146; torchvision)."""
    return create("wide_resnet101_2", **options)


def resnet8_cifar(**options: Unpack[Options]) -> ResNet:
    """75,290 parameters, 0.0122 GMACs at 32 pixels
    (He et al. 2016, arXiv:1512.03385, section 4.2; akamaster/pytorch_resnet_cifar10).
    """
    return create("resnet8_cifar", **options)


def resnet20_cifar(**options: Unpack[Options]) -> ResNet:
    """269,722 parameters, 0.0406 GMACs at 32 pixels
    (He et al. 2016, arXiv:1512.03385, section 4.2; akamaster/pytorch_resnet_cifar10).
    """
    return create("resnet20_cifar", **options)


def resnet32_cifar(**options: Unpack[Options]) -> ResNet:
    """464,154 parameters, 0.0689 GMACs at 32 pixels
    (He et al. 2016, arXiv:1512.03385, section 4.2; akamaster/pytorch_resnet_cifar10).
    """
    return create("resnet32_cifar", **options)


def resnet44_cifar(**options: Unpack[Options]) -> ResNet:
    """658,586 parameters, 0.0972 GMACs at 32 pixels
    (He et al. 2016, arXiv:1512.03385, section 4.2; akamaster/pytorch_resnet_cifar10).
    """
    return create("resnet44_cifar", **options)


def resnet56_cifar(**options: Unpack[Options]) -> ResNet:
    """853,018 parameters, 0.1255 GMACs at 32 pixels
    (He et al. 2016, arXiv:1512.03385, section 4.2; akamaster/pytorch_resnet_cifar10).
    """
    return create("resnet56_cifar", **options)


def resnet110_cifar(**options: Unpack[Options]) -> ResNet:
    """1,727,962 parameters, 0.2529 GMACs at 32 pixels
    (He et al. 2016, arXiv:1512.03385, section 4.2; akamaster/pytorch_resnet_cifar10).
    """
    return create("resnet110_cifar", **options)


def resnet1202_cifar(**options: Unpack[Options]) -> ResNet:
    """19,421,274 parameters, 2.8292 GMACs at 32 pixels
    (He et al. 2016, arXiv:1512.03385, section 4.2; akamaster/pytorch_resnet_cifar10).
    """
    return create("resnet1202_cifar", **options)


def resnet34_projection(**options: Unpack[Options]) -> ResNet:
    """21,801,896 parameters, 3.68 GMACs at 224 pixels (resnet34, taught with a projection in every stage)."""
    return create("resnet34_projection", **options)


def resnet18_d2l(**options: Unpack[Options]) -> ResNet:
    """11,178,378 parameters, 0.3187 GMACs at 96 pixels (Dive into Deep Learning, section 8.6)."""
    return create("resnet18_d2l", **options)
