"""Evaluates weights on labelled images: every image once, with the preprocessing that the weights specify.

:mod:`jresnet.commands.evaluate` is the command line.
"""

from __future__ import annotations

import dataclasses
import re
import time
import unicodedata
from collections.abc import Callable, Sequence
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

import jresnet.data
from jresnet import cache, sources
from jresnet.data import images
from jresnet.errors import DataError, InputError, WeightsError
from jresnet.files import few, printable, read_ordinary
from jresnet.kernels.compiler import compiler_options
from jresnet.models import params
from jresnet.models.resnet import ResNet
from jresnet.weights import published
from jresnet.weights.preprocessing import STATISTICS, Preprocessing, normalise

MAX_NAMES = 2**20  # largest file of class names, in bytes; ImageNet's names take about 20,000


@dataclass(frozen=True, eq=False)
class Resolved:
    """A model with the metadata of its weights."""

    arch: str | None  # None: the network is not in the zoo
    model: ResNet
    preprocessing: Preprocessing | None  # None: the weights do not specify it
    categories: tuple[str, ...] | None  # class names in the order of the logits; None: the weights do not specify them


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images to evaluate on, in order."""

    sources: Sequence[Path] | UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"]  # indices into the logits
    description: str  # one line to print
    notes: tuple[str, ...]  # further lines to print


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation."""

    images: int  # number of images evaluated, not counting the skipped ones
    top1: int  # images whose label has the largest logit
    topk: int  # images whose label is among the k largest logits
    k: int  # 5, or the number of classes if that is smaller
    loss: float  # mean cross-entropy, in nats
    seconds: float  # from the first file to the last score; includes decoding, excludes compilation
    compile_seconds: float
    bad: tuple[tuple[str, str], ...]  # (file, reason) of each skipped image


def resolve(weights: str, dtype: DTypeLike | None = None) -> Resolved:
    """Loads weights as a model with its metadata.

    Args:
        weights: a path, a name or an ``hf:`` address, as for :func:`jresnet.sources.load`.
        dtype: compute dtype of the model's convolutions.

    Raises:
        The errors of :func:`jresnet.sources.load`.
    """
    found = sources.load(weights)
    model = params.fill(found.config, found.values, dtype)
    return Resolved(found.arch or "ResNet", model, found.preprocessing, found.categories)


def choose_preprocessing(
    resolved: Resolved,
    *,
    dataset: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> tuple[Preprocessing, str]:
    """Chooses the preprocessing of an evaluation: the weights' own, or a default if the weights do not specify one.

    The default for a data set is no resizing and that data set's statistics. For a folder it depends on the stem: shorter
    side 256, crop 224 and ImageNet's statistics; for the CIFAR stem 32, 32 and CIFAR-10's statistics.

    Args:
        resolved: the result of :func:`resolve`.
        dataset: name of the data set that the images come from; ``None``: they come from a folder.
        mean, std: override these statistics, one value per channel, for pixels in [0, 1].

    Returns:
        The preprocessing, and a phrase that says where it comes from.

    Raises:
        InputError: a value is out of range, or the number of channels is not the network's.
    """
    chosen, origin = resolved.preprocessing, "as the weights say"
    if chosen is None:
        origin = "a guess: the weights do not say"
        if dataset:
            chosen = Preprocessing(None, 32, *STATISTICS[dataset])
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


def dataset(
    resolved: Resolved, name: str, data_dir: Path | None, limit: int | None, class_names: Sequence[str] | None = None
) -> Labelled:
    """The first ``limit`` test images of a data set of :mod:`jresnet.data`; CIFAR's are in the official order.

    Args:
        resolved: the result of :func:`resolve`.
        name: name of the data set.
        data_dir: as for :func:`jresnet.data.load`.
        limit: number of images; ``None``: all.
        class_names: names of the classes, in the order of the logits; ``None``: the weights' own.

    Raises:
        DataError: the network does not have these classes; or as :func:`jresnet.data.load`.
    """
    classes = jresnet.data.CLASSES[name]  # checked before anything is downloaded
    logits, names = resolved.model.config.num_classes, class_names or resolved.categories
    _check_names(class_names, logits)
    if logits != len(classes):
        raise DataError(f"{name} has {len(classes)} classes, but the network has {logits:,}")
    if names and set(names) != set(classes):
        raise DataError(
            f"the network's classes are {few(names)}, but those of {name} are {few(classes)}: evaluate weights that were "
            f"trained on {name}; if the classes are the same under other names, {_HOW_TO_NAME}"
        )
    found = jresnet.data.load(name, data_dir)
    position = np.array([names.index(label) if names else i for i, label in enumerate(classes)], np.int32)
    pixels, labels = found.test.images[:limit], position[found.test.labels[:limit]]
    official = any(same for batch, same in found.verified.items() if batch.startswith("test"))
    description = (
        f"{name}: {_portion(len(labels), len(found.test.labels))} {'official ' if official else ''}test images, "
        f"from {found.source}"
    )
    return Labelled(pixels, labels, description, () if official else found.notes)


_HOW_TO_NAME = "give `class_names`, a file with one name per line in the order of the logits"


def read_names(path: str | Path) -> tuple[str, ...]:
    """Reads class names from a UTF-8 text file: one per line, in the order of the logits. An empty line means no name.

    Raises:
        DataError: the file cannot be read, is not text, or is empty.
    """
    try:
        text = read_ordinary(path, MAX_NAMES).decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"cannot read the class names in {path}: {reason}") from error
    if not text.strip():
        raise DataError(f"cannot read the class names in {path}: the file is empty")
    return tuple(line.strip() for line in text.rstrip().split("\n"))


def _check_names(class_names: Sequence[str] | None, logits: int) -> None:
    if class_names is not None and len(class_names) != logits:
        raise DataError(
            f"`class_names` has {len(class_names):,} names, but the network has {logits:,} classes: write one line a class "
            "in the order of the logits, and an empty line for a class without a folder"
        )


def folder(
    resolved: Resolved, found: images.Folder, limit: int | None, class_names: Sequence[str] | None = None
) -> Labelled:
    """The images of a folder of class folders, with the index of each image's class among the logits.

    The name of a class folder identifies its class. It is one of:

    * a name in ``class_names``, or else in the weights' categories; classes may lack a folder;
    * a WordNet id of one of ImageNet's 1,000 classes, if the weights' categories are ImageNet's, or contain the classes of
      all folders, or are not given and the network has 1,000 classes;
    * a number, as in ``7`` or ``class_7``: the index itself.

    If the weights name no categories and there are as many folders as logits, the folders may have any names. They are
    then matched in sorted order, as in torchvision's ``ImageFolder``.

    Args:
        resolved: the result of :func:`resolve`.
        found: the result of :func:`jresnet.data.images.list_folder`.
        limit: number of images: the first of every class, then the second of every class, and so on; ``None``: all.
        class_names: names of the class folders, in the order of the logits.

    Raises:
        DataError: the names or the number of the class folders do not match the network.
    """
    classes = found.classes
    _check_names(class_names, resolved.model.config.num_classes)
    try:
        position, how, note = _positions(classes, resolved.model.config.num_classes, resolved.categories, class_names)
    except DataError as error:
        raise DataError(f"{printable(str(found.root))} {error}") from None
    labels = np.array([position[label] for label in found.labels], np.int32)
    order = images.in_turn(found.labels)[:limit]
    spread = ", evenly from all classes" if len(order) < len(labels) else ""
    description = (
        f"{found.root}: {_portion(len(order), len(labels))} images in {len(classes):,} class folders{spread}, {how}"
    )
    notes = [note] if note else []
    notes += [f"{found.ignored:,} other files were ignored"] if found.ignored else []
    if empty := len(classes) - len(set(found.labels)):
        notes.append(f"class folders that contain no images: {empty:,}")
    return Labelled([found.paths[i] for i in order], labels[order], description.replace("\n", "\\n"), tuple(notes))


def _positions(
    classes: Sequence[str], logits: int, categories: Sequence[str] | None, class_names: Sequence[str] | None
) -> tuple[list[int], str, str | None]:
    """Each folder's index among the logits, how it was found, and a note on any assumption made."""
    # macOS stores ö in file names as two characters: o and a combining diaeresis.
    classes = [unicodedata.normalize("NFC", name) for name in classes]
    class_names, categories = (
        said and [unicodedata.normalize("NFC", name) for name in said] for said in (class_names, categories)
    )
    names = class_names or categories
    if names and set(classes) <= set(names):
        twice = [name for name in classes if names.count(name) > 1]
        if twice:
            raise DataError(
                f"has folders whose names several classes share ({few(twice)}): {_HOW_TO_NAME}, all different"
            )
        how = "by the names given" if class_names else "to the categories by name"
        return [names.index(name) for name in classes], f"matched {how}", None
    if class_names:
        raise _unmatched(classes, class_names, "names given")
    if found := _by_wordnet(classes, logits, categories):
        return found, "matched to ImageNet's classes by WordNet id", None
    if found := _by_number(classes, logits, bool(categories)):
        note = None
        if found != list(range(len(classes))):  # the sorted order would give other classes
            note = "the numbers in the folders' names are used as class indices, not the sorted order of the names"
        if not categories and min(_numbers(classes)) == 1 and max(_numbers(classes)) == logits:
            note = "the folders are numbered from 1: folder 1 is the first class"
        return found, "class = the number in the folder's name", note
    if categories:
        raise _unmatched(classes, categories, "categories that the weights name")
    if len(classes) != logits:
        raise DataError(
            f"has {len(classes):,} class folders ({few(classes)}), but the network has {logits:,} classes: provide one "
            f"folder per class, or {_HOW_TO_NAME}"
        )
    return list(range(logits)), "class = position in the sorted list", None


def _unmatched(classes: Sequence[str], names: Sequence[str], what: str) -> DataError:
    """The error for folders whose names are not all names of classes."""
    strange = [name for name in classes if name not in set(names)]
    absent = [name for name in names if name and name not in set(classes)]
    without = f" (without a folder: {few(absent)})" if absent else ""
    return DataError(
        f"has {len(strange):,} of {len(classes):,} class folders ({few(strange)}) whose names are not among the "
        f"{len(names):,} {what}{without}: rename them, or {_HOW_TO_NAME}"
    )


def _by_wordnet(classes: Sequence[str], logits: int, categories: Sequence[str] | None) -> list[int] | None:
    """Class indices of folders named by WordNet ids; None if the names or the network's classes are not ImageNet's."""
    english = dict(zip(published.wnids(), published.categories(), strict=True))
    if not set(classes) <= english.keys():
        return None
    if tuple(categories or published.categories()) == published.categories() and logits == len(english):
        return [published.wnids().index(name) for name in classes]
    wanted = [english[name] for name in classes]
    if categories is None or not all(categories.count(name) == 1 for name in wanted):
        return None
    return [categories.index(name) for name in wanted]


def _numbers(classes: Sequence[str]) -> list[int]:
    """The numbers at the end of names that are otherwise equal, such as ``class_7``; empty if the names differ otherwise."""
    found = [re.fullmatch(r"(.*?)([0-9]{1,9})", name, re.DOTALL) for name in classes]
    matches = [match for match in found if match]
    if len(matches) < len(classes) or len({match[1] for match in matches}) != 1:
        return []
    numbers = [int(match[2]) for match in matches]
    return numbers if len(set(numbers)) == len(numbers) else []


def _by_number(classes: Sequence[str], logits: int, named: bool) -> list[int] | None:
    """Class indices of folders named by numbers; None if they are not, or if the numbers are unlikely to be indices.

    A plain number, or one after "class", is an index, and classes may be missing. Other prefixes are ambiguous (``site1``
    is hardly class 1): they count only if the classes have no names and there is a folder for each class.
    """
    numbers = _numbers(classes)
    if not numbers:
        return None
    plain = re.fullmatch(r"(class(es)?|label)?[ _-]?[0-9]+", classes[0], re.IGNORECASE)
    if plain and max(numbers) < logits:
        return numbers
    if named or len(numbers) != logits or max(numbers) - min(numbers) >= logits or min(numbers) > 1:
        return None
    return [number - min(numbers) for number in numbers]


def _portion(count: int, total: int) -> str:
    return f"{total:,}" if count == total else f"{count:,} of {total:,}"


def score(
    model: ResNet,
    preprocessing: Preprocessing,
    data: Labelled,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
    reader: images.Reader = images.photo,
) -> Scores:
    """Evaluates a model on every image exactly once, with a progress bar on stderr if that is a terminal.

    Float32 matrix products use full precision, even on devices whose default is TF32. Ties between logits are broken in
    favour of the lower index, as in ``argmax``.

    Args:
        model: its ``dtype`` is the compute dtype of the convolutions.
        preprocessing: with as many channels as the model takes.
        data: the images and their labels.
        batch_size: images per batch; the last batch is padded with black images that are not counted.
        progress: called after each batch with the number of images processed so far.
        reader: reads image files: :func:`jresnet.data.images.photo`, as in training and prediction, or
            :func:`jresnet.data.images.read`, as torchvision's ``ImageFolder`` does.

    Raises:
        DataError: no image could be decoded.
        WeightsError: some logits are NaN or infinite.
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

    done, began = 0, time.perf_counter()
    with tqdm(total=len(data.labels), unit="image", leave=False, dynamic_ncols=True, disable=None) as bar:
        for batch in images.batches(data.sources, preprocessing, batch_size, reader):
            bad += [(str(data.sources[position]), reason) for position, reason in batch.bad]
            labels = np.zeros(batch_size, np.int32)
            labels[: len(batch.positions)] = data.labels[batch.positions]
            waiting.append((compiled(state, batch.images, labels), len(batch.positions)))
            if len(waiting) > 1:  # the device computes one batch while the next is decoded
                fetch()
            bar.update(len(batch.positions) + len(batch.bad))
            done += len(batch.positions) + len(batch.bad)
            progress(done)
        while waiting:
            fetch()
    seconds = time.perf_counter() - began

    loss, place = np.concatenate(losses), np.concatenate(ranks)
    if len(loss) == 0:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in bad[:5])
        raise DataError(f"none of the {len(bad):,} images can be used{', among them' if len(bad) > 5 else ''}:{lines}")
    if broken := int((~np.isfinite(loss)).sum()):
        raise WeightsError(
            f"the logits of {broken:,} of {len(loss):,} images are NaN or infinite: the weights are unusable, or `mean` and "
            "`std` are not those of the training"
        )
    k = min(5, model.config.num_classes)
    top1, topk = int((place < 1).sum()), int((place < k).sum())
    return Scores(len(loss), top1, topk, k, float(loss.mean()), seconds, compile_seconds, tuple(bad))


def rank(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Int[Array, " b"]:
    """The number of logits that rank above the label's: larger ones, and equal ones of a lower index, as in ``argmax``."""
    own = jnp.take_along_axis(logits, labels[:, None], 1)
    left = jnp.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & left)).sum(1)
