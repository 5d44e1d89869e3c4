"""Weights with all that belongs to them: how images are prepared, what the classes are called, how good they are."""

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
    Image = Any  # Pillow is an extra

Images = (
    UInt8[np.ndarray, "n h w c"] | UInt8[np.ndarray, "h w c"] | Image | Sequence[Image | UInt8[np.ndarray, "h w c"]]
)


class PretrainedWeights(sources.Weights):
    """What :func:`get_weights` returns; ``jresnet.create(weights=...)`` makes a model of it.

    ``arch``, ``config``, ``categories`` (the classes' names in the order of the logits; None where the weights do not say)
    and ``preprocessing`` (None likewise) are attributes, besides those below.
    """

    @property
    def scores(self) -> dict[str, Any] | None:
        """What the weights say of their accuracy, such as ``{"top1": 80.858, "top5": 95.434, "of": ...}``, in per cent.

        Raises:
            WeightsError: it is no object of JSON.
        """
        if "scores" not in self.metadata:
            return None
        try:
            found = json.loads(self.metadata["scores"])
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise WeightsError(f"the scores that {self.spec} states are not an object of JSON")
        return found

    @property
    def source(self) -> str:
        """Where the weights were taken from at first: an address, a file's name, ``hf:...@COMMIT``."""
        return self.metadata.get("source", self.spec)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 in hex of the arrays, with their names, dtypes and shapes: the same wherever they are kept."""
        return native.digest(self.values)

    def preprocess(self, images: Images) -> Float[Array, "n s s c"]:
        """Images as the network takes them: as torchvision's transforms of these weights, to a grey level.

        The shorter side is resized with antialiasing, the centre is cut out, and pixels are normalised by channel.

        Args:
            images: uint8 pixels ``[H, W, C]`` or ``[N, H, W, C]``, RGB or of one grey channel; a picture of Pillow's (with
                the extra ``train``) of any mode; or a sequence of either, of any sizes.

        Returns:
            float32 ``[N, crop, crop, 3]``, or 1 channel where the network takes grey images.

        Raises:
            WeightsError: the weights do not say how images are prepared.
            InputError: for anything else than these images.
        """
        if (how := self.preprocessing) is None:
            raise WeightsError(
                f"{self.spec} does not say how images are prepared: normalise them yourself, and save the weights with "
                "preprocessing=jresnet.Preprocessing(...)"
            )
        from jresnet.data.images import preprocess  # needs Pillow

        pixels = [preprocess(image, how) for image in _pictures(images)]
        if not pixels:
            raise InputError("there is no image to prepare: the sequence is empty")
        return normalise(jnp.asarray(np.stack(pixels), jnp.float32), how.mean, how.std)


def _pictures(images: Any) -> list[Image]:
    """What :meth:`PretrainedWeights.preprocess` takes, as RGB pictures of Pillow's."""
    from PIL import Image

    if isinstance(images, Image.Image):
        from jresnet.data.images import as_rgb

        return [as_rgb(images)]
    if isinstance(images, list | tuple):
        return [picture for image in images for picture in _pictures(image)]
    if isinstance(images, str | os.PathLike):
        raise InputError(f"expected pictures, not their files' names: PIL.Image.open({os.fspath(images)!r:.80})")
    pixels = np.asarray(images)  # JAX's arrays too
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        raise InputError(
            "expected uint8 pixels [H, W, 3], [N, H, W, 3] or of 1 channel, or pictures of Pillow's, got "
            f"{pixels.dtype} {list(pixels.shape)}"
        )
    if pixels.ndim == 4:
        return [picture for image in pixels for picture in _pictures(image)]
    return [Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]).convert("RGB")]


def get_weights(arch: str | os.PathLike[str], name: str | None = None, *, progress: bool = True) -> PretrainedWeights:
    """Weights with all that belongs to them; published ones are downloaded, into torch's own cache.

    >>> weights = jresnet.get_weights("resnet50", "IMAGENET1K_V2")                              # doctest: +SKIP
    >>> logits = jresnet.create(weights=weights)(weights.preprocess(picture))                   # doctest: +SKIP

    Args:
        arch: a name of :func:`jresnet.list_models`; or where the weights are, with ``name`` left out: a path,
            ``"resnet50:IMAGENET1K_V1"`` or ``"hf:ORG/REPO[@REVISION]"``.
        name: of :func:`list_weights`, such as ``"IMAGENET1K_V2"``, or whatever else :func:`jresnet.sources.load` takes
            for weights of ``arch``, such as the path of a file from PyTorch. ``None``: the default of ``arch``.
        progress: show downloads on stderr.

    Raises:
        InputError: for an unknown architecture or name of weights.
        WeightsError: for a file that is damaged, holds another network, or does not say which one.
        DownloadError: the weights are neither in the cache nor to be had.
    """
    for value in (arch, name):
        if not isinstance(value, str | os.PathLike | None):
            raise InputError(f"weights are named by a text or a path, got {value!r}")
    found = sources.load(arch, progress=progress) if name is None else sources.load(name, arch, progress=progress)  # type: ignore[arg-type]
    return PretrainedWeights(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)})


def list_weights(arch: str | None = None) -> list[str]:
    """Published weights as :func:`get_weights` takes them: names such as ``"IMAGENET1K_V2"``, oldest first.

    Args:
        arch: of this architecture; none may be published for it. ``None``: of all, as ``"resnet50:IMAGENET1K_V2"``.

    Raises:
        InputError: for an unknown architecture.
    """
    if arch is not None:
        return list(published.names(zoo.find(arch).name))
    return [f"{arch}:{name}" for arch in zoo.ZOO for name in published.names(arch)]
