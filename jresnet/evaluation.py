"""How well weights classify labelled images: every image once, by the weights' own preprocessing.

:mod:`jresnet.commands.evaluate` is the command line.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8
from tqdm import tqdm

from jresnet import cache, sources
from jresnet.data import images
from jresnet.data.cifar10 import load_cifar10
from jresnet.errors import DataError, InputError, WeightsError
from jresnet.kernels.compiler import compiler_options
from jresnet.models import params
from jresnet.models.resnet import ResNet
from jresnet.weights.preprocessing import STATISTICS, Preprocessing, normalise


@dataclass(frozen=True, eq=False)
class Resolved:
    """Weights as a model, with what they say about themselves."""

    arch: str | None  # None: no row of the zoo
    model: ResNet
    preprocessing: Preprocessing | None  # None: they do not say
    categories: tuple[str, ...] | None  # names of the logits; None: they do not say


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images to evaluate on, in order."""

    sources: Sequence[Path] | UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"]  # positions among the logits
    description: str  # one line for people
    notes: tuple[str, ...]  # more of them


@dataclass(frozen=True)
class Scores:
    """What evaluation found."""

    images: int  # evaluated, without the bad ones
    top1: int  # images whose label has the largest logit
    topk: int  # images whose label is among the k largest
    k: int  # 5, or all where there are fewer classes
    loss: float  # mean cross-entropy, in nats
    seconds: float  # from the first file to the last score, decoding included, compilation not
    compile_seconds: float
    bad: tuple[tuple[str, str], ...]  # (file, reason) of the images that were skipped


def resolve(weights: str, dtype: DTypeLike | None = None) -> Resolved:
    """A model from a native file or published weights; ``weights`` and errors as :func:`jresnet.sources.load`."""
    found = sources.load(weights)
    model = params.fill(found.config, found.values, dtype)
    return Resolved(found.arch or "ResNet", model, found.preprocessing, found.categories)


def choose_preprocessing(
    resolved: Resolved,
    *,
    cifar10: bool,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> tuple[Preprocessing, str]:
    """The weights' own preprocessing, or where they do not say a usual one, and which of the two it is.

    The usual one is, for CIFAR-10, the image as it is with that dataset's statistics. For a folder it depends on the
    stem: shorter side 256, crop 224 and ImageNet's statistics, or for the CIFAR stem 32, 32 and CIFAR-10's.

    Args:
        resolved: of :func:`resolve`.
        cifar10: the images are CIFAR-10's, not a folder's.
        mean, std: these instead, by channel, of pixels in [0, 1].

    Raises:
        InputError: values out of range, or of another number of channels than the network takes.
    """
    chosen, origin = resolved.preprocessing, "as the weights say"
    if chosen is None:
        origin = "a guess: the weights do not say"
        if cifar10:
            chosen = Preprocessing(None, 32, *STATISTICS["cifar10"])
        elif resolved.model.config.stem in ("cifar", "cifar_pool"):
            chosen = Preprocessing(32, 32, *STATISTICS["cifar10"])
        else:
            chosen = Preprocessing(256, 224)
    if mean or std:
        chosen = dataclasses.replace(chosen, mean=mean or chosen.mean, std=std or chosen.std)
        chosen.check()
        origin += f", but for {'mean and std' if mean and std else 'mean' if mean else 'std'}"
    channels = resolved.model.config.in_channels
    if channels not in (1, 3):
        raise InputError(f"the network takes images of {channels} channels; only RGB and grey ones can be evaluated")
    if len(chosen.mean) != channels:
        raise InputError(
            f"the network takes images of {channels} channel{'s'[: channels - 1]}, but there are {len(chosen.mean)} values "
            f"of mean and std ({origin}): give {channels} as `mean` and `std`"
        )
    return chosen, origin


def cifar10(resolved: Resolved, data_dir: Path | None, limit: int | None) -> Labelled:
    """The first ``limit`` of CIFAR-10's test images, in the official order.

    Raises:
        DataError: as :func:`jresnet.data.cifar10.load_cifar10`, or the network is not one for ten classes.
    """
    if resolved.model.config.num_classes != 10:
        raise DataError(f"CIFAR-10 has 10 classes, but the network {resolved.model.config.num_classes:,}")
    data = load_cifar10(data_dir)
    pixels, labels = data.test.images[:limit], data.test.labels[:limit]
    official = data.verified["test_batch.bin"]
    description = (
        f"cifar10: {_portion(len(labels), len(data.test.labels))} {'official ' if official else ''}test images, "
        f"from {data.source}"
    )
    return Labelled(pixels, labels, description, () if official else data.notes)


def folder(resolved: Resolved, found: images.Folder, limit: int | None) -> Labelled:
    """The images of a folder with the position of their label among the logits.

    Where every folder's name is one of the weights' categories, that category is the label; some may be absent.
    Otherwise there must be as many folders as logits, in the same order once sorted, as in torchvision's ``ImageFolder``.

    Args:
        resolved: of :func:`resolve`.
        found: of :func:`jresnet.data.images.list_folder`.
        limit: only so many images: the first of every class, then the second of every class, and so on.

    Raises:
        DataError: the folders' names or number do not fit the network.
    """
    classes, categories = found.classes, resolved.categories or ()
    logits = resolved.model.config.num_classes
    named = set(classes) <= set(categories)
    if not named and len(classes) != logits:
        names = f"their names must be of the weights' categories ({_some(categories)})"
        raise DataError(
            f"{found.root} has {len(classes):,} class folders ({_some(classes)}), but the network {logits:,} classes: there "
            f"must be one folder for each, or {names if categories else 'a weights file that names its categories'}"
        )
    position = {name: categories.index(name) if named else i for i, name in enumerate(classes)}
    labels = np.array([position[classes[label]] for label in found.labels], np.int32)
    order = images.in_turn(found.labels)[:limit]
    spread = ", evenly from all classes" if len(order) < len(labels) else ""
    description = (
        f"{found.root}: {_portion(len(order), len(labels))} images in {len(classes):,} class folders{spread}, "
        f"{'matched to the categories by name' if named else 'class = position in the sorted list'}"
    )
    notes = [f"{found.ignored:,} other files were ignored"] if found.ignored else []
    if empty := len(classes) - len(set(found.labels)):
        notes.append(f"{empty:,} of the class folders hold no image")
    return Labelled([found.paths[i] for i in order], labels[order], description.replace("\n", "\\n"), tuple(notes))


def _portion(count: int, total: int) -> str:
    return f"{total:,}" if count == total else f"{count:,} of {total:,}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def score(model: ResNet, preprocessing: Preprocessing, data: Labelled, batch_size: int) -> Scores:
    """Evaluates a model on every image exactly once; a bar on stderr where that is a terminal.

    Float32 is computed as such, also where the device would take TF32. Of equal logits the first counts as larger.

    Args:
        model: its ``dtype`` decides what convolutions compute in.
        preprocessing: of as many channels as the model takes.
        data: the images and their labels.
        batch_size: images at a time; the last batch is filled up with black images that are not counted.

    Raises:
        DataError: not one image could be decoded.
        WeightsError: logits are not finite.
    """
    graph, state = nnx.split(model)
    mean, std = preprocessing.mean, preprocessing.std

    def forward(state: nnx.State, pixels: UInt8[Array, "b s s c"], labels: Int[Array, " b"]):
        logits = nnx.merge(graph, state)(normalise(pixels.astype(jnp.float32), mean, std), train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels), rank(logits, labels)

    shape = (batch_size, preprocessing.crop, preprocessing.crop, len(mean))
    began = time.perf_counter()
    with jax.default_matmul_precision("highest"):
        function = jax.jit(forward, compiler_options=compiler_options())
        compiled = cache.compiled(function, state, np.zeros(shape, np.uint8), np.zeros(batch_size, np.int32))
    compile_seconds = time.perf_counter() - began

    losses, ranks = [np.zeros(0)], [np.zeros(0, int)]
    bad: list[tuple[str, str]] = []
    waiting: list[tuple[Any, int]] = []  # on the device

    def fetch() -> None:
        (loss, place), count = waiting.pop(0)
        losses.append(np.asarray(loss, np.float64)[:count])
        ranks.append(np.asarray(place)[:count])

    began = time.perf_counter()
    with tqdm(total=len(data.labels), unit="image", leave=False, dynamic_ncols=True, disable=None) as bar:
        for batch in images.batches(data.sources, preprocessing, batch_size):
            bad += [(str(data.sources[position]), reason) for position, reason in batch.bad]
            labels = np.zeros(batch_size, np.int32)
            labels[: len(batch.positions)] = data.labels[batch.positions]
            waiting.append((compiled(state, batch.images, labels), len(batch.positions)))
            if len(waiting) > 1:  # the device computes one batch while the next is decoded
                fetch()
            bar.update(len(batch.positions) + len(batch.bad))
        while waiting:
            fetch()
    seconds = time.perf_counter() - began

    loss, place = np.concatenate(losses), np.concatenate(ranks)
    if len(loss) == 0:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in bad[:5])
        raise DataError(f"none of the {len(bad):,} images can be used{', among them' if len(bad) > 5 else ''}:{lines}")
    if broken := int((~np.isfinite(loss)).sum()):
        raise WeightsError(
            f"the logits of {broken:,} of {len(loss):,} images are NaN or infinite: the weights are unfit, or mean and "
            "std are not those of their training"
        )
    k = min(5, model.config.num_classes)
    top1, topk = int((place < 1).sum()), int((place < k).sum())
    return Scores(len(loss), top1, topk, k, float(loss.mean()), seconds, compile_seconds, tuple(bad))


def rank(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Int[Array, " b"]:
    """How many logits come before the label's: larger ones, and equal ones further left, as argmax has it."""
    own = jnp.take_along_axis(logits, labels[:, None], 1)
    left = jnp.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & left)).sum(1)
