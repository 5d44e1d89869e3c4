"""Pretrained weights with their metadata: preprocessing, class names and scores."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jresnet import sources
from jresnet.errors import InputError, WeightsError
from jresnet.models import zoo
from jresnet.weights import native, published
from jresnet.weights.preprocessing import normalise

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = Any  # Pillow is an optional dependency

Images = (
    UInt8[np.ndarray, "n h w c"] | UInt8[np.ndarray, "h w c"] | Image | Sequence[Image | UInt8[np.ndarray, "h w c"]]
)


class PretrainedWeights(sources.Weights):
    """Weights with their metadata, returned by :func:`get_weights`; ``jresnet.create(weights=...)`` builds the model.

    Further attributes are ``arch``, ``config``, ``categories`` (class names in the order of the logits) and
    ``preprocessing``. The last two are None if the weights do not specify them.
    """

    @property
    def scores(self) -> dict[str, Any] | None:
        """The accuracies that the weights state, in per cent, such as ``{"top1": 80.858, "top5": 95.434, "of": ...}``.

        Raises:
            WeightsError: the entry is not a JSON object.
        """
        if "scores" not in self.metadata:
            return None
        try:
            found = json.loads(self.metadata["scores"])
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise WeightsError(f"the scores that {self.spec} states are not a JSON object")
        return found

    @property
    def source(self) -> str:
        """The original source of the weights: a URL, a file name, or ``hf:...@COMMIT``."""
        return self.metadata.get("source", self.spec)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 in hex over the arrays with their names, dtypes and shapes; it does not depend on the file format."""
        return native.digest(self.values)

    def preprocess(self, images: Images) -> Float[Array, "n s s c"]:
        """Prepares images for the network, as torchvision's transforms for these weights do (equal to within a grey level).

        The shorter side is resized with antialiasing, the centre is cropped, and pixels are normalised per channel. The EXIF
        orientation of a Pillow image is ignored, as by torchvision; ``PIL.ImageOps.exif_transpose`` applies it.

        Args:
            images: uint8 pixels ``[H, W, C]`` or ``[N, H, W, C]`` with 3 (RGB) or 1 (grey) channels; a Pillow image (needs
                the extra ``train``) of any mode; or a sequence of these, which may differ in size.

        Returns:
            float32 ``[N, crop, crop, 3]``, or with 1 channel if the network takes grey images.

        Raises:
            WeightsError: the weights do not specify their preprocessing.
            InputError: ``images`` is none of the above.
        """
        if (how := self.preprocessing) is None:
            raise WeightsError(
                f"{self.spec} does not specify its preprocessing: normalise the images yourself, or save the weights with "
                "preprocessing=jresnet.Preprocessing(...)"
            )
        from jresnet.data.images import preprocess  # needs Pillow

        pixels = [preprocess(image, how) for image in _pictures(images)]
        if not pixels:
            raise InputError("expected at least one image, got an empty sequence")
        return normalise(jnp.asarray(np.stack(pixels), jnp.float32), how.mean, how.std)


def _pictures(images: Any) -> list[Image]:
    """Converts the argument of :meth:`PretrainedWeights.preprocess` to RGB Pillow images."""
    from PIL import Image

    if isinstance(images, Image.Image):
        from jresnet.data.images import as_rgb

        return [as_rgb(images)]
    if isinstance(images, list | tuple):
        return [picture for image in images for picture in _pictures(image)]
    if isinstance(images, str | os.PathLike):
        raise InputError(f"expected images, got a file name: open it with PIL.Image.open({os.fspath(images)!r:.80})")
    pixels = np.asarray(images)  # accepts JAX arrays as well
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        raise InputError(
            "expected uint8 pixels [H, W, 3] or [N, H, W, 3], the same with 1 channel, or Pillow images, got "
            f"{pixels.dtype} {list(pixels.shape)}"
        )
    if pixels.ndim == 4:
        return [picture for image in pixels for picture in _pictures(image)]
    return [Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]).convert("RGB")]


def get_weights(arch: str | os.PathLike[str], name: str | None = None, *, progress: bool = True) -> PretrainedWeights:
    """Returns weights with their metadata. Published weights are downloaded into torch's cache folder.

    >>> weights = jresnet.get_weights("resnet50", "IMAGENET1K_V2")                              # doctest: +SKIP
    >>> logits = jresnet.create(weights=weights)(weights.preprocess(picture))                   # doctest: +SKIP

    Args:
        arch: a name from :func:`jresnet.list_models`. Without ``name`` it may also be a path,
            ``"resnet50:IMAGENET1K_V1"`` or ``"hf:ORG/REPO[@REVISION]"``.
        name: a name from :func:`list_weights`, such as ``"IMAGENET1K_V2"``, or anything else that
            :func:`jresnet.sources.load` accepts, such as the path of a PyTorch file. ``None``: the default weights of
            ``arch``.
        progress: show downloads on stderr.

    Raises:
        InputError: unknown architecture or name of weights.
        WeightsError: the file is damaged, contains another network, or does not say which one.
        DownloadError: the weights are not in the cache and cannot be downloaded.
    """
    for value in (arch, name):
        if not isinstance(value, str | os.PathLike | None):
            raise InputError(f"weights must be given as a string or a path, got {value!r}")
    found = sources.load(arch, progress=progress) if name is None else sources.load(name, arch, progress=progress)  # type: ignore[arg-type]
    return PretrainedWeights(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)})


def list_weights(arch: str | None = None) -> list[str]:
    """Lists the names of published weights, oldest first, as :func:`get_weights` accepts them.

    Args:
        arch: an architecture. ``None``: all architectures, with names such as ``"resnet50:IMAGENET1K_V2"``.

    Returns:
        Names such as ``"IMAGENET1K_V2"``; empty if none are published for ``arch``.

    Raises:
        InputError: unknown architecture.
    """
    if arch is not None:
        return list(published.names(zoo.find(arch).name))
    return [f"{arch}:{name}" for arch in zoo.ZOO for name in published.names(arch)]
