"""A PyTorch ``state_dict`` into a configuration and arrays, :func:`match`, and back, :func:`state_dict`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jresnet.errors import InputError, WeightsError
from jresnet.files import printable
from jresnet.models import params
from jresnet.models.resnet import ResNet, ResNetConfig
from jresnet.pytorch import infer, keymap

# In the order in which torchvision registers them, which is that of PyTorch's own state_dicts.
_ORDER = (
    "conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample", "layer1", "layer2", "layer3", "layer4", "fc",
    "kernel", "scale", "bias", "mean", "var",
)  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """A file's network, as the file has it, and how it was read."""

    arch: str
    config: ResNetConfig  # of the file's network
    values: dict[str, np.ndarray]  # by dotted path, float32, in jresnet's layout
    dialect: str  # a name of keymap.DIALECTS
    counters: dict[str, int]  # num_batches_tracked by torchvision's key, which Flax's BatchNorm has no use for
    notes: tuple[str, ...]  # what was passed over on the way, a sentence each

    def torchvision(self) -> dict[str, np.ndarray]:
        """The tensors by torchvision's keys, in PyTorch's layout."""
        return {keymap.torch_key(path): keymap.to_torch(value) for path, value in self.values.items()}

    def metadata(self) -> dict[str, str]:
        """What a native file keeps of it: the dialect and the counters."""
        kept = {"dialect": self.dialect}
        if self.counters:
            counts = set(self.counters.values())
            alike = len(counts) == 1 and len(self.counters) == sum(path.endswith(".var") for path in self.values)
            kept["num_batches_tracked"] = json.dumps(counts.pop() if alike else self.counters)
        return kept


def match(
    state_dict: Any,
    arch: str,
    *,
    dialect: str | None = None,
    source: str = "the state_dict",
    own_sizes: bool = False,
    **chosen: Any,
) -> Conversion:
    """The network of ``arch`` in a ``state_dict``.

    Where the head or the stem is of another size than asked for, this is the state_dict's own;
    :func:`jresnet.models.params.adapt` makes it the one that was asked for.

    Args:
        state_dict: PyTorch's keys to numpy arrays or torch tensors, of any floating-point dtype; wrappers' prefixes
            (``module.``, ``_orig_mod.``, ``model.``) and an enclosing ``{"state_dict": ...}`` are peeled off.
        arch: a name of :func:`jresnet.list_models`.
        dialect: a name of :data:`jresnet.pytorch.keymap.DIALECTS`; ``None``: the one that the keys fit best.
        source: names the weights in errors.
        own_sizes: a number of classes or channels that is not chosen is the state_dict's own, instead of that of the
            dialect or the architecture.
        chosen: those of num_classes, in_channels, stem and shortcut that are not the architecture's own.

    Raises:
        InputError: for an unknown architecture or dialect.
        WeightsError: unless every parameter and statistic is filled exactly once; one message lists all missing,
            unexpected and misshapen keys.
    """
    tensors, notes = _peel(state_dict, source)
    dialect, config = infer.find_dialect(arch, tensors.keys(), dialect, chosen)
    paths = {keymap.torch_key(path, dialect): path for path in params.shapes(config)}
    counters = {
        keymap.counter_key(path, dialect): keymap.counter_key(path) for path in paths.values() if path.endswith(".var")
    }
    config = infer.sized(
        config, {paths[key]: value for key, value in tensors.items() if key in paths}, chosen, own_sizes
    )
    shapes = {key: keymap.torch_shape(params.shapes(config)[path]) for key, path in paths.items()}
    tensors, problems = _without_aliases(tensors, dialect, {**paths, **counters})
    kept = {key: value for key, value in tensors.items() if key not in counters}
    different = params.differences(shapes, {key: tuple(value.shape) for key, value in kept.items()})
    problems += different
    values, counts = {}, {}
    for key, value in tensors.items():
        try:
            if key in paths:
                values[paths[key]] = keymap.to_flax(_float32(value))
            elif key in counters:
                counts[counters[key]] = _count(value)
        except TypeError as error:
            problems.append(f"{key} {error}")
    if problems:
        if different and (others := infer.architectures(arch, kept)):
            raise WeightsError(f"{source} holds a {' or a '.join(others)}, not a {arch}: name that architecture")
        advice = infer.advice(shapes, kept, paths)
        raise WeightsError(f"{source} does not hold a {arch} ({dialect} naming): {'; '.join(problems)}{advice}")
    return Conversion(arch, config, values, dialect, counts, tuple(notes))


def _peel(found: Any, source: str) -> tuple[dict[str, Any], list[str]]:
    """The state_dict inside a checkpoint, without wrappers' prefixes, and what was passed over."""
    notes = []
    for _ in range(8):  # deeper than any script nests them, and an end for one that holds itself
        inner = [
            name for name in keymap.CONTAINERS if isinstance(found, Mapping) and isinstance(found.get(name), Mapping)
        ]
        if not inner:
            break
        if len(inner) > 1:
            notes.append(f"taken from {inner[0]!r}, not from {', '.join(map(repr, inner[1:]))} beside it")
        found = found[inner[0]]
    tensors = dict(found) if isinstance(found, Mapping) else {}
    odd = [
        printable(str(key)) for key, value in tensors.items() if not (isinstance(key, str) and hasattr(value, "shape"))
    ]
    if odd or not tensors:
        what = f"entries that are no tensors: {', '.join(odd[:5])}" if odd else f"{type(found).__name__}"
        raise WeightsError(f"{source} should hold a state_dict, names to tensors, but holds {what}")
    tensors = {key: value for key, value in tensors.items() if key not in keymap.IGNORED}
    prefix = len(keymap.strip_wrappers(tensors.keys()))
    return {key[prefix:]: value for key, value in tensors.items()}, notes


def _without_aliases(
    tensors: Mapping[str, Any], dialect: str, known: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """The tensors without second names; what is wrong where a second name's tensor is not that of the first."""
    tensors, differ = dict(tensors), []
    for key in known:
        second = keymap.alias(key, dialect)
        if second in tensors:
            twin = tensors.pop(second)
            if key in tensors and not np.array_equal(_numpy(tensors[key]), _numpy(twin), equal_nan=True):
                differ.append(f"{second} is not {key}")
    return tensors, [f"{len(differ)} different under two names: {', '.join(differ)}"] if differ else []


def _numpy(value: Any) -> np.ndarray:
    """float32 for a torch tensor, known by its method, since torch is not imported here and numpy knows no bfloat16."""
    return value.detach().float().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _float32(value: Any) -> np.ndarray:
    dtype = getattr(value, "dtype", type(value).__name__)
    if not (str(dtype).removeprefix("torch.").startswith(("float", "bfloat"))):
        raise TypeError(f"is {dtype}, not a floating-point tensor")
    return np.ascontiguousarray(_numpy(value), dtype=np.float32)


def _count(value: Any) -> int:
    if tuple(value.shape) not in ((), (1,)) or "int" not in str(value.dtype):
        raise TypeError(f"should be one whole number, not {value.dtype} {list(value.shape)}")
    return int(value.reshape(()))


def state_dict(
    model: ResNet, dialect: str = "torchvision", counters: int | Mapping[str, int] = 0
) -> dict[str, np.ndarray]:
    """The weights of ``model`` as PyTorch's ``load_state_dict(strict=True)`` takes them, after ``torch.from_numpy``.

    ``{key: torch.from_numpy(value) for key, value in state_dict(model).items()}`` is a state_dict of torch's;
    :func:`jresnet.pytorch.torchsave.write` makes a ``.pth`` of it without torch.

    Args:
        model: its parameters and running statistics are taken as they are, bit by bit.
        dialect: whose names, of :data:`jresnet.pytorch.keymap.DIALECTS`.
        counters: what each BN's ``num_batches_tracked`` is to be: one number, or numbers by torchvision's key, 0 where
            it has none. Only ``BatchNorm2d(momentum=None)`` reads it.

    Returns:
        The dialect's keys to new arrays in PyTorch's layout (OIHW, OI), in PyTorch's order; a tensor that the dialect
        registers twice is one array under two names.

    Raises:
        InputError: for an unknown dialect, or one that has no network like ``model``.
    """
    check_dialect(model.config, dialect)
    values = params.arrays(model)
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(values, key=_rank):
        tensors[keymap.torch_key(path, dialect)] = keymap.to_torch(np.array(values[path]))
        if path.endswith(".var"):
            count = counters if isinstance(counters, int) else counters.get(keymap.counter_key(path), 0)
            tensors[keymap.counter_key(path, dialect)] = np.array(count, np.int64)
    aliases = {second: tensors[key] for key in tensors if (second := keymap.alias(key, dialect)) is not None}
    return tensors | aliases


def check_dialect(config: ResNetConfig, dialect: str) -> None:
    """Raises :class:`InputError` for an unknown dialect, or one whose networks differ from ``config``."""
    if dialect not in keymap.DIALECTS:
        raise InputError(f"unknown dialect {dialect!r}: there are {', '.join(keymap.DIALECTS)}")
    if different := _differences(config, dialect):
        fitting = [name for name in keymap.DIALECTS if not _differences(config, name)]
        raise InputError(
            f"{dialect} has no such network: {'; '.join(different)}. The names that fit are those of {', '.join(fitting)}"
        )


def _differences(config: ResNetConfig, dialect: str) -> list[str]:
    """In what the networks of ``dialect`` are not like ``config``."""
    return [
        f"{field} is {value!r} there, {getattr(config, field)!r} here"
        for field, value in keymap.DIALECTS[dialect].config.items()
        if getattr(config, field) != value
    ]


def _rank(path: str) -> list[int]:
    return [int(part) if part.isdigit() else _ORDER.index(part) for part in path.split(".")]
