"""Fine-tunes pretrained weights on other images: chooses a recipe, and provides two programs for the trainer.

    embeddings, computed once -> Probe: trains only the head -> Finetune: trains all layers, earlier ones at lower rates

The two stages are linear probing and then fine-tuning (Kumar et al. 2022, arXiv:2202.10054): a randomly initialised head
would send large gradients through layers that are already good. Both are runs of
:class:`jresnet.training.trainer.Trainer`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jresnet import sources
from jresnet.data.dataset import Dataset, Split
from jresnet.errors import InputError, WeightsError
from jresnet.kernels.compiler import compiler_options
from jresnet.models import params, paths, zoo
from jresnet.models.config import ResNetConfig
from jresnet.models.layers import Linear
from jresnet.models.resnet import ResNet
from jresnet.training import loop, optim
from jresnet.training import step as train
from jresnet.training.augment import Pipeline
from jresnet.training.config import FilesConfig
from jresnet.training.devices import Devices
from jresnet.training.fields import option, problems
from jresnet.training.program import Program, check_batch
from jresnet.training.recipes import MAX_EPOCHS
from jresnet.weights import native
from jresnet.weights.preprocessing import STATISTICS, Preprocessing

LISTED = 1000  # largest number of skipped images that summary.json lists
SMALL = 64  # architectures for images of up to so many pixels are treated like those for CIFAR


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(FilesConfig):
    """All settings that determine the result of a fine-tuning run; the initial weights are identified by their digest."""

    recipe: str = option("the stage", "", choices=("finetune", "probe", "scratch"))
    weights: str | None = option("the initial weights, as the user gave them", "", None, none="random weights")
    share: float = option(
        "fraction of each class's images for validation, if the data set has no validation images", "data", 0.2, above=0,
        below=1,
    )  # fmt: skip
    split_seed: int = option(
        "seed of the choice of validation images, and of the images of PER_CLASS", "data", 0, metavar="N", least=0,
        most=2**32 - 1,
    )  # fmt: skip
    per_class: int | None = option(
        "only N training images of each class", "data", None, metavar="N", none="all", least=1
    )
    data_digest: str = option("SHA-256 of the images and their labels", "", "")
    weights_digest: str = option("SHA-256 of the initial arrays; empty: random ones", "", "")
    min_area: float = option(
        "smallest fraction of a photo's area that a random crop covers (torchvision's for ImageNet: 0.08)", "recipe", 0.25,
        above=0, most=1,
    )  # fmt: skip
    layer_decay: float = option(
        "ratio of a stage's learning rate to that of the next stage; 1: the same for all",
        "recipe",
        0.65,
        above=0,
        most=1,
    )
    freeze: str = option(
        "comma-separated parts that are not trained: backbone, stem, layer1, or a pattern such as layer*.bn*", "network",
        "", metavar="PARTS",
    )  # fmt: skip
    freeze_bn: str = option(
        "freeze the running statistics of every BatchNorm, also scale and bias, or nothing", "network",
        "statistics", choices=("statistics", "all", "none"),
    )  # fmt: skip
    resize: int | None = option("pixels of the shorter side before the centre crop", "", None, least=1, most=4096)
    interpolation: str = option("interpolation for resizing", "", "bilinear", choices=("bilinear", "bicubic"))
    mean: tuple[float, ...] = option("mean per channel, for pixels in 0 to 1", "", (), least=0, most=1)
    std: tuple[float, ...] = option("standard deviation per channel, for pixels in 0 to 1", "", (), above=0, most=1)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The parts that are not trained."""
        return listed(self.freeze) + (("norms",) if self.freeze_bn == "all" else ())

    @property
    def details(self) -> tuple[str, ...]:
        """Phrases that describe the layers' learning rates and what is frozen, to print."""
        if self.recipe == "probe":
            return ()
        norms = {"statistics": "BatchNorm's statistics frozen", "all": "BatchNorm frozen", "none": ""}[self.freeze_bn]
        rates = (
            f"learning rate x{self.layer_decay:g} from each stage to the one before it" if self.layer_decay < 1 else ""
        )
        parts = f"frozen: {', '.join(listed(self.freeze))}" if self.freeze else ""
        return tuple(phrase for phrase in (rates, norms, parts) if phrase)

    def pipeline(self) -> Pipeline:
        """The augmentation and normalisation of images."""
        return Pipeline(
            self.crop, self.image_size, self.flip, self.mean, self.std, self.random_erasing, self.mixup, self.cutmix,
            self.min_area, self.augment, self.magnitude,
        )  # fmt: skip

    def preprocessing(self) -> Preprocessing:
        """The preprocessing for evaluation."""
        return Preprocessing(self.resize, self.image_size, self.mean, self.std, self.interpolation)

    def check(self) -> None:
        """Raises :class:`InputError` that lists all invalid values. Names of parts are not checked here."""
        self._check_fields()
        self.preprocessing().check()

    def _contradictions(self) -> list[str]:
        found = super()._contradictions()
        if self.flip == "alternate" and self.crop == "resized":
            found.append("`flip` alternate is for images in memory; use random for photos on disk")
        if self.schedule == "step" and not self.milestones:
            found.append("`schedule` step needs `milestones`")
        return found


@dataclass(frozen=True, eq=False)
class Start:
    """The start of a run: a network, and its arrays unless they are random."""

    spec: str  # name of the weights, to print
    arch: str | None
    config: ResNetConfig
    values: Mapping[str, np.ndarray] | None  # None: random ones
    preprocessing: Preprocessing
    origin: str  # where the preprocessing comes from, to print
    dialect: str | None = None  # dialect of the PyTorch file
    categories: tuple[str, ...] | None = None  # names of the weights' classes

    @property
    def digest(self) -> str:
        """SHA-256 of the arrays; empty if they are random."""
        return native.digest(self.values) if self.values is not None else ""


def resolve(spec: str | None, arch: str | None = None, image_size: int | None = None) -> Start:
    """Loads the initial weights, or chooses an architecture with random weights.

    Args:
        spec: weights, as for :func:`jresnet.sources.load`; ``None``: random parameters of ``arch``.
        arch: name of an architecture.
        image_size: size of the images in pixels, instead of the weights'.

    Raises:
        InputError: neither ``spec`` nor ``arch`` is given; or as :func:`jresnet.sources.load`.
        WeightsError, DownloadError: as :func:`jresnet.sources.load`.
    """
    if spec is None:
        if arch is None:
            raise InputError("`arch` is needed without weights: give a name such as resnet18")
        row = zoo.find(arch)
        config, values, known, label, dialect = row.config, None, None, "random weights", None
        categories = None
        small = row.image_size <= SMALL
    else:
        found = sources.load(spec, arch)
        config, known, label, arch = found.config, found.preprocessing, found.spec, found.arch
        dialect, categories = found.metadata.get("dialect"), found.categories
        values = {path: np.asarray(value, np.float32) for path, value in found.values.items()}
        small = config.stem == "cifar"
    origin = "as the weights say" if spec is not None else "usual for the architecture"
    if known is None:
        origin = "a guess: the weights do not say" if spec is not None else origin
        known = Preprocessing(32, 32, *STATISTICS["cifar10"]) if small else Preprocessing(256, 224)
    if known.resize is None:  # the user's images may have any size
        known = dataclasses.replace(known, resize=known.crop)
    if image_size is not None and image_size != known.crop:
        ratio = known.resize / known.crop  # type: ignore[operator]
        known = dataclasses.replace(known, crop=image_size, resize=round(image_size * ratio))
    channels = config.in_channels
    if len(known.mean) != channels:
        if channels not in (1, 3):
            raise InputError(
                f"the network takes images of {channels} channels, but photos have 3, or 1 if they are grey"
            )
        grey = [(sum(values_) / len(values_),) * channels for values_ in (known.mean, known.std)]
        known = dataclasses.replace(known, mean=grey[0], std=grey[1])
    return Start(label, arch, config, values, known, origin, dialect, categories)


def check_given(given: Mapping[str, Any]) -> None:
    """Raises :class:`InputError` for values that are invalid in any run, before anything is downloaded or read."""
    whole: dict[str, Any] = {
        "epochs": 1, "batch_size": 1, "optimizer": "sgd", "lr": 1.0, "momentum": 0.9, "nesterov": False,
        "weight_decay": 0.0, "decay_norms": False, "decoupled_decay": False, "clip_norm": 0.0, "schedule": "cosine",
        "gamma": 0.1, "label_smoothing": 0.0, "ema": 0.0, "zero_init_residual": False, "crop": "pad", "image_size": 32,
        "flip": "random", "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "imagenet_statistics": False, "arch": "",
        "dataset": "", "recipe": "finetune", "warmup_epochs": 0.0, "milestones": (), "stem": "cifar",
        "precision": "float32",
    }  # fmt: skip
    found = problems(config := FinetuneConfig(**whole | dict(given)))
    most = given.get("epochs", MAX_EPOCHS)
    if not found and config.warmup_epochs > most:
        found = [f"`warmup_epochs` must be at most the run's {most:,}, got {config.warmup_epochs:g}"]
    if found:
        raise InputError("; ".join(found))


def choose(
    start: Start, data: Dataset, *, probe: bool, devices: int = 1, **given: Any
) -> tuple[FinetuneConfig, list[str]]:
    """Chooses the configuration of a run for these images.

    Args:
        start: the result of :func:`resolve`.
        data: the images.
        probe: train only the head, on embeddings.
        devices: number of devices, among which a batch is divided.
        given: fields of :class:`FinetuneConfig` that the user chose; None: not chosen.

    Returns:
        The configuration, and one line per main number that gives the reason for it.

    Raises:
        InputError: values are out of range, or a batch is larger than the data set or cannot be divided.
    """
    given = {name: value for name, value in given.items() if value is not None}
    n, how = len(data.train.labels), start.preprocessing
    scratch = start.values is None
    seen, least, most = (400_000, 30, 200) if scratch else (20_000, 5, 60)
    if probe:
        seen, least, most = 20_000, 10, 20
    # A power of two that gives at least eight steps per epoch, if there are enough images.
    largest = 256 if probe else 128 if scratch else 64
    batch = given.get("batch_size", min(largest, max(4, 2 ** int(math.log2(max(n / 8, 1))))))
    power, note = batch, ""
    if "batch_size" not in given:
        batch = max(min(-(-batch // devices), n // devices), 1) * devices
        note = f", rounded to a multiple of {devices} devices" if batch not in (power, n) else ""
    check_batch(batch, n, devices)
    epochs = given.get("epochs", min(most, max(least, round(seen / n))))
    optimizer = given.get("optimizer", "adamw" if probe else "sgd")
    rates = {"sgd": (0.01, 64) if not scratch else (0.1, 128), "adamw": (1e-4, 64) if not scratch else (1e-3, 128),
             "lamb": (3e-4, 128)}  # fmt: skip
    base, of = rates[optimizer]
    lr = (0.1 if optimizer == "sgd" else 1e-2) if probe else base * batch / of
    stored = data.train.images.shape[1] if isinstance(data.train.images, np.ndarray) else None
    if stored is not None and how.crop < stored * 7 // 8:
        raise InputError(
            f"`image_size` must be at least {stored * 7 // 8} for images of {stored} pixels, got {how.crop}"
        )
    values: dict[str, Any] = {
        "epochs": epochs, "batch_size": batch, "optimizer": optimizer, "lr": lr, "momentum": 0.9,
        "nesterov": optimizer == "sgd" and given.get("momentum") != 0,
        "weight_decay": {"sgd": 1e-4 if not scratch else 5e-4, "adamw": 1e-2, "lamb": 0.02}[optimizer],
        "decay_norms": False, "decoupled_decay": False, "clip_norm": 0.0, "schedule": "cosine", "gamma": 0.1,
        "label_smoothing": 0.0 if probe else 0.1, "ema": 0.0, "zero_init_residual": False,
        "crop": "pad" if stored == how.crop else "resized", "image_size": how.crop, "flip": "random", "random_erasing": 0.0,
        "mixup": 0.0, "cutmix": 0.0, "imagenet_statistics": False, "arch": start.arch or "ResNet", "dataset": data.name,
        "recipe": "probe" if probe else "scratch" if scratch else "finetune", "milestones": (),
        "warmup_epochs": 0.0 if probe else round(min(5.0, 0.1 * epochs), 3), "stem": start.config.stem,
        "weights_digest": start.digest, "data_digest": data.digest,
        "resize": how.resize, "interpolation": how.interpolation, "mean": how.mean,
        "std": how.std, "layer_decay": 1.0 if scratch or probe else 0.65,
        "freeze_bn": "none" if scratch else "statistics",
    }  # fmt: skip
    if data.name == "digits":
        values["flip"] = "none"  # a mirrored digit is another digit, or not a digit
    values |= given
    if values.get("precision") in (None, "auto"):
        values["precision"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = FinetuneConfig(**values)
    config.check()

    def why(name: str, reason: str) -> str:
        return f"{name} {getattr(config, name):g}: {'as given' if name in given else reason}"

    steps = n // config.batch_size
    reasons = [
        why(
            "batch_size", f"a power of two up to {largest} that gives about eight steps per epoch of {n:,} images{note}"
        ),
        why("epochs", f"about {seen:,} images in total, {least} to {most} epochs; {steps * config.epochs:,} steps"),
        why(
            "lr",
            "for standardised embeddings of any number"
            if probe
            else f"{optimizer}'s {base:g} for a batch of {of}, in proportion to the batch",
        ),
    ]
    return config, reasons


def check_parts(freeze: str, begin: Start) -> None:
    """Raises :class:`InputError` if the network lacks a part to freeze, or nothing is left to train."""
    known = [path for path in params.shapes(begin.config) if not path.endswith((".mean", ".var"))]
    held: set[str] = set()
    for name in listed(freeze):
        held |= paths.select(name, known)
    if len(held) == len(known):
        raise InputError(f"`freeze` {freeze} leaves nothing to train: freeze fewer parts")


def listed(parts: str) -> tuple[str, ...]:
    """Splits a comma-separated list: ``"stem, layer1"`` -> ``("stem", "layer1")``."""
    return tuple(part.strip() for part in parts.split(",") if part.strip())


class Finetune(Program):
    """Trains all layers of a network from given weights; images are in memory or streamed from disk.

    Args:
        config: configuration of the run.
        data: the images.
        begin: the result of :func:`resolve`.
        head: initial ``fc.kernel`` and ``fc.bias``; ``None``: those of the weights if they have the same classes, else
            random ones.
        where: the devices.
        workers: number of decoding processes; 0: threads.

    Raises:
        InputError: as :class:`Program`; or the network lacks a part to freeze, or nothing is left to train.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        data: Dataset,
        begin: Start,
        head: Mapping[str, np.ndarray] | None = None,
        where: Devices | None = None,
        workers: int = 0,
    ):
        self.begin, self.head = begin, head
        self.network_config = dataclasses.replace(begin.config, num_classes=len(data.classes))
        if config.weights_digest != begin.digest:
            raise InputError("the run was started from other weights: give the same `weights`")
        check_parts(config.freeze, begin)
        super().__init__(config, data, where, workers=workers)

    def pretrained(self, seed: int) -> tuple[train.TrainState, list[str]]:
        """The state before the first step, with the initial weights."""
        return self.state(seed), []

    def provenance(self) -> dict[str, str]:
        """Metadata about the initial weights."""
        return _provenance(self.begin, self.data)

    def more(self, labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
        """Precision and recall of every class, and the skipped images."""
        return _more(self, labels, predictions)

    def rates(self) -> dict[str, float] | None:
        """Layer-wise decay of the learning rate."""
        decay = self.config.layer_decay  # type: ignore[attr-defined]
        return None if decay == 1 else optim.layer_rates(self.model(None), decay)

    def model(self, seed: int | None) -> ResNet:
        """The initial network; with ``seed=None``, only the shapes of its parameters."""
        config = self.config
        dtype = jnp.bfloat16 if config.precision == "bfloat16" else None
        if seed is None or self.begin.values is None:
            model = ResNet(
                self.network_config, zero_init_residual=config.zero_init_residual and seed is not None, dtype=dtype,
                remat=config.remat, rngs=None if seed is None else nnx.Rngs(seed),
            )  # fmt: skip
        else:
            values, found = dict(self.begin.values), self.begin.config
            if self.begin.categories != self.data.classes:  # the number of classes may be equal nevertheless
                values = params.body(values)
                found = dataclasses.replace(found, num_classes=0)
            values, _ = params.adapt(values, found, self.network_config, nnx.Rngs(seed))
            model = params.fill(self.network_config, values | dict(self.head or {}), dtype, config.remat)
        if config.freeze_bn != "none":  # type: ignore[attr-defined]
            model.freeze_statistics()
        return model


class Head(nnx.Module):
    """A linear layer on embeddings ``[N, 1, 1, D]``."""

    def __init__(self, features: int, classes: int, draws: bool):
        self.fc = Linear(features, classes, rngs=None)
        if draws:  # the problem is convex, so that zeros are as good as random values
            for leaf in (self.fc.kernel, self.fc.bias):
                leaf.set_value(jnp.zeros(leaf.get_value().shape, jnp.float32))

    def __call__(self, x: jax.Array, train: bool | None = None) -> jax.Array:
        return self.fc(x.reshape(len(x), -1))


class Probe(Program):
    """Trains only the head, on standardised embeddings of the images, which are computed once.

    Args:
        config: the result of :func:`choose` with ``probe``.
        data: the images.
        begin: the result of :func:`resolve`, with weights.
        embeddings: by split, the result of :func:`embed`.
        where: the devices.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        data: Dataset,
        begin: Start,
        embeddings: Mapping[str, np.ndarray],
        where: Devices | None = None,
    ):
        if config.weights_digest != begin.digest:
            raise InputError("the run was started from other weights: give the same `weights`")
        self.begin, self.pictures = begin, {"train": data.train, "test": data.test}
        self.center = embeddings["train"].mean(0)
        self.spread = embeddings["train"].std(0) + 1e-6
        vectors = {name: ((value - self.center) / self.spread)[:, None, None] for name, value in embeddings.items()}
        train_split, test = (Split(vectors[name], self.pictures[name].labels) for name in ("train", "test"))
        super().__init__(config, dataclasses.replace(data, train=train_split, test=test), where)

    def pretrained(self, seed: int) -> tuple[train.TrainState, list[str]]:
        """The state before the first step, with a head of zeros."""
        return self.state(seed), []

    def model(self, seed: int | None) -> Any:
        """The head; with ``seed=None``, only the shapes of its parameters."""
        return Head(self.begin.config.num_features, len(self.data.classes), seed is not None)

    def views(self) -> Pipeline:
        """A pipeline that does not change the embeddings."""
        return Pipeline("features", 1, "none", (0.0,), (1.0,))

    def network(self, model: Any) -> ResNet:
        """The whole network with this head; the standardisation of embeddings is folded into it."""
        kernel, bias = (np.asarray(leaf[...]) for leaf in (model.fc.kernel, model.fc.bias))
        kernel = kernel / self.spread[:, None]
        head = {"fc.kernel": kernel, "fc.bias": bias - self.center @ kernel}
        assert self.begin.values is not None
        config = dataclasses.replace(self.begin.config, num_classes=len(self.data.classes))
        return params.fill(config, params.body(self.begin.values) | head)

    def shown(self, name: str) -> Any:
        """The images of a split, for figures."""
        return self.pictures[name].images

    def provenance(self) -> dict[str, str]:
        """Metadata about the initial weights."""
        return _provenance(self.begin, self.data)

    def more(self, labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
        """Precision and recall of every class, and the skipped images."""
        return _more(self, labels, predictions)


def _more(program: Program, labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
    skipped = program.data.skipped
    return {
        "test_by_class": by_class(labels, predictions, program.data.classes),
        "skipped_images": len(skipped),
        "skipped": [{"file": file, "reason": reason} for file, reason in skipped[:LISTED]],
    }


def by_class(labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """For each class the number of ``images``, ``precision`` and ``recall``.

    Args:
        labels: int ``[n]``.
        predictions: int ``[n]``; -1 means no prediction and affects only the recall.
        classes: names of the classes, all different.

    Returns:
        Figures by name of the class; precision and recall are None if they are undefined.
    """
    found = {}
    for number, name in enumerate(classes):
        own, taken = labels == number, predictions == number
        right = int((own & taken).sum())
        found[name] = {
            "images": int(own.sum()),
            "precision": right / int(taken.sum()) if taken.any() else None,
            "recall": right / int(own.sum()) if own.any() else None,
        }
    return found


def _provenance(begin: Start, data: Dataset) -> dict[str, str]:
    dialect = {"dialect": begin.dialect} if begin.dialect else {}
    known = not Path(begin.spec).exists()  # of a path only the name is stored, since folders are private
    held = f"{len(data.test.labels):,} {'validation images of a' if data.name == 'folder' else 'test images of'} {data.name}"
    said = {"begun_from": begin.spec if known else Path(begin.spec).name, "begun_from_digest": begin.digest}
    return {**said, "judged_on": held, **dialect}


def head_of(path: Path) -> dict[str, np.ndarray]:
    """The parameters of the last layer in a native file."""
    _, _, values, _ = native.read(path)
    return {name: np.asarray(values[name], np.float32) for name in ("fc.kernel", "fc.bias")}


def embed(begin: Start, data: Dataset, devices: Devices, precision: str, batch_size: int = 64) -> dict[str, np.ndarray]:
    """Computes the embeddings of all images from their evaluation views: float32 ``[n, features]`` by split.

    Raises:
        WeightsError: an embedding is not finite.
    """
    assert begin.values is not None
    dtype = jnp.bfloat16 if precision == "bfloat16" else None
    model = params.fill(dataclasses.replace(begin.config, num_classes=0), params.body(begin.values), dtype)
    graph, state = nnx.split(model)
    how = begin.preprocessing
    pipeline = Pipeline("done", how.crop, "none", how.mean, how.std)

    def features(state: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graph, state).embed(pipeline.evaluate(images), train=False)

    batch_size = -(-batch_size // devices.count) * devices.count
    compute = jax.jit(features, out_shardings=devices.whole, compiler_options=compiler_options())
    state, found = devices.replicate(state), {}
    for name, split in (("train", data.train), ("test", data.test)):
        rows = []
        for batch, count in loop.batches(split, batch_size, devices):
            rows.append(np.asarray(compute(state, batch.images))[:count])
        found[name] = np.concatenate(rows).astype(np.float32)
        if not np.isfinite(found[name]).all():
            raise WeightsError(f"{begin.spec}: the embedding of an image is NaN or infinite: use other weights")
    return found
