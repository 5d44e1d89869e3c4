"""A PyTorch ``state_dict`` into a configuration and arrays, :func:`match`, and back, :func:`state_dict`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jresnet.errors import InputError, WeightsError
from jresnet.files import few, printable
from jresnet.models import params, zoo
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

    arch: str | None  # a name of the zoo; None: the network is none of its rows
    config: ResNetConfig  # of the file's network; 0 classes where it has no head
    values: dict[
        str, np.ndarray
    ]  # by dotted path, float32, in jresnet's layout; without fc.* where the file has no head
    dialect: str  # a name of keymap.DIALECTS
    counters: dict[str, int]  # num_batches_tracked by torchvision's key, which Flax's BatchNorm has no use for
    notes: tuple[str, ...]  # what was passed over on the way, a sentence each
    assumed: tuple[str, ...]  # what neither keys nor shapes tell, a phrase each

    @property
    def headless(self) -> bool:
        """Whether the file has no last layer: :func:`jresnet.models.params.adapt` draws one where it is wanted."""
        return "fc.kernel" not in self.values

    def torchvision(self) -> dict[str, np.ndarray]:
        """The tensors by torchvision's keys, in PyTorch's layout."""
        return {keymap.torch_key(path): keymap.to_torch(value) for path, value in self.values.items()}

    def metadata(self) -> dict[str, str]:
        """What a native file keeps of it: the counters, and the dialect where it can write such a network."""
        kept = {} if _differences(self.config, self.dialect) else {"dialect": self.dialect}
        if self.counters:
            counts = set(self.counters.values())
            alike = len(counts) == 1 and len(self.counters) == sum(path.endswith(".var") for path in self.values)
            kept["num_batches_tracked"] = json.dumps(counts.pop() if alike else self.counters)
        return kept


def match(
    state_dict: Any,
    arch: str | None = None,
    *,
    dialect: str | None = None,
    prefix: str | None = None,
    key: str | None = None,
    source: str = "the state_dict",
    **chosen: Any,
) -> Conversion:
    """The network in a ``state_dict``, of the size that the state_dict has.

    Where another number of classes or channels is wanted, :func:`jresnet.models.params.adapt` makes it of this one.

    Args:
        state_dict: PyTorch's keys to numpy arrays or torch tensors, of any floating-point dtype, or a checkpoint with such
            a dict inside. Most of a network's keys lie under one prefix: what lies beside them is passed over.
        arch: a name of :func:`jresnet.list_models` that the network must be; ``None``: whatever ResNet it is.
        dialect: a name of :data:`jresnet.pytorch.keymap.DIALECTS`; ``None``: the one that the keys fit best.
        prefix: of the network's keys, such as ``backbone``; ``None``: that of the largest network.
        key: of the dict of tensors in a checkpoint, such as ``state_dict_ema`` or ``model.teacher``; ``None``: the one with
            the largest network.
        source: names the weights in errors.
        chosen: those of num_classes, in_channels, stem and shortcut that are asked for: a stem or shortcut must be the
            file's, a number of classes is that of the configuration where the file has no head.

    Raises:
        InputError: for an unknown architecture or dialect.
        WeightsError: for another network than asked for, or unless every parameter and statistic is filled exactly once;
            one message lists what is missing, unexpected and misshapen.
    """
    if arch is not None:
        zoo.find(arch)
    if keymap.OTHER_FUNCTIONS.match(stated := _stated(state_dict)):
        raise WeightsError(
            f"{source} says that its network is a {stated}: it has a ResNet's tensors and computes another function, which "
            "jresnet does not have; look for weights of a plain ResNet"
        )
    tensors, found, notes = _network(state_dict, dialect, prefix, key, source)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if found is None:
        where = f" under {prefix!r}" if prefix else ""
        naming = f" in {dialect} naming" if dialect else ""
        raise WeightsError(
            f"{source} holds no ResNet{naming}{where}: expected tensors such as conv1.weight, bn1.weight and "
            f"layer1.0.conv1.weight, found {few(shapes)}"
        )
    try:
        config = infer.configure(found, shapes, **chosen)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None

    wanted = params.shapes(config)
    paths = {found.keys.get(path) or _key(path, found): path for path in wanted}
    expected = {name: keymap.torch_shape(wanted[path]) for name, path in paths.items()}
    counters = {_counter(path, found): keymap.counter_key(path) for path in wanted if path.endswith(".var")}
    tensors, problems = _without_aliases(tensors, found, paths, counters)
    got = {name: shapes[name] for name in tensors if name not in counters}
    if found.head is None:
        expected = {name: shape for name, shape in expected.items() if not paths[name].startswith("fc.")}
        notes.append("the last layer is missing or a projection head")
    elif f"{found.head}.bias" not in got:
        del expected[f"{found.head}.bias"]
        notes.append(f"{found.head} has no bias: zeros are taken")
    beside = _beside(got.keys() - expected.keys(), found)
    problems += params.differences(expected, {name: shape for name, shape in got.items() if name not in beside})
    if beside:
        notes.append(f"passed over beside the network: {few([name for name in got if name in beside])}")

    values, counts, odd = {}, {}, []
    for name, value in tensors.items():
        try:
            if name in expected:
                values[paths[name]] = keymap.to_flax(_float32(value))
            elif name in counters:
                count = _count(value)
                if count is None:
                    odd.append(name)
                else:
                    counts[counters[name]] = count
        except TypeError as error:
            problems.append(f"{name} {error}")
    if odd:
        notes.append(f"not a number of batches, and not needed: {few(odd)}")
    row = infer.row(config)
    if stated and stated not in (arch, row):
        notes.append(f"the file calls its network {stated!r}")
    if problems:
        what = f"a whole {arch or row or 'ResNet'}"
        raise WeightsError(f"{source} does not hold {what} ({found.dialect} naming): {'; '.join(problems)}")
    if "fc.kernel" in values and "fc.bias" not in values:
        values["fc.bias"] = np.zeros(config.num_classes, np.float32)
    _check_asked(source, config, row, arch, chosen)
    if found.head is None:
        config = dataclasses.replace(config, num_classes=0)
    arch = arch or row
    return Conversion(arch, config, values, found.dialect, counts, tuple(notes), infer.assumed(config))


def _check_asked(
    source: str, config: ResNetConfig, row: str | None, arch: str | None, chosen: Mapping[str, Any]
) -> None:
    """Raises :class:`WeightsError` where the file's network is not what was asked for."""
    if arch is not None and not infer.is_like(config, arch):
        if row:
            raise WeightsError(f"{source} holds a {row}, not a {arch}: name that architecture")
        raise WeightsError(
            f"{source} holds a ResNet that has no name here, not a {arch}: {infer.describe(config)}; leave the "
            "architecture out"
        )
    for field in ("stem", "shortcut"):
        if chosen.get(field) not in (None, getattr(config, field)):
            raise WeightsError(
                f"{source} holds a network whose {field} is {getattr(config, field)!r}, not {chosen[field]!r}: "
                f"leave the {field} out"
            )


def _key(path: str, found: infer.Found) -> str:
    """The file's key of a tensor by jresnet's path."""
    if path.startswith("fc."):
        return f"{found.head}.{keymap.LEAVES[path[3:]]}"
    return found.prefix + keymap.torch_key(path, found.dialect).removeprefix(keymap.DIALECTS[found.dialect].root)


def _counter(path: str, found: infer.Found) -> str:
    """The file's key of the counter beside a running variance."""
    return f"{_key(path, found).rpartition('.')[0]}.{keymap.COUNTER}"


def _network(
    saved: Any, dialect: str | None, prefix: str | None, key: str | None, source: str
) -> tuple[dict[str, Any], infer.Found | None, list[str]]:
    """The dict of tensors in a checkpoint that holds the largest network, that network, and what was passed over."""
    boxes = _boxes(saved)
    if key is not None:
        if key not in boxes:
            raise WeightsError(f"{source} has no dict of tensors {key!r}: there are {few(map(repr, boxes)) or 'none'}")
        boxes = {key: boxes[key]}
    if not boxes:
        what = type(saved).__name__
        if isinstance(saved, Mapping) and saved:
            what = f"entries that are no tensors: {few(map(str, saved))}"
        raise WeightsError(f"{source} should hold a state_dict, names to tensors, but holds {what}")
    networks = {}
    for name, tensors in boxes.items():
        if found := infer.find({k: tuple(v.shape) for k, v in tensors.items()}, dialect, prefix):
            networks[name] = found
    if not networks:
        return max(boxes.values(), key=len), None, []
    most = max(found.score for found in networks.values())
    rivals = [name for name, found in networks.items() if found.score >= infer.RIVAL * most]
    rivals.sort(key=lambda name: (infer.preference(name), infer.preference(networks[name].prefix)))
    name, found, notes = rivals[0], networks[rivals[0]], []
    if rivals[1:]:
        notes.append(f"taken from {name!r}, not from {few(map(repr, rivals[1:]))} beside it")
    if found.rivals:
        notes.append(f"taken from {found.prefix!r}, not from {few(map(repr, found.rivals))} beside it")
    tensors = {k: v for k, v in boxes[name].items() if k.rpartition(".")[2] not in keymap.IGNORED}
    return tensors, found, notes


def _stated(saved: Any) -> str:
    """What a checkpoint calls its network, as timm's and torchvision's training scripts do; empty where it does not."""
    if not isinstance(saved, Mapping):
        return ""
    arguments = saved.get("args")
    names = (saved.get("arch"), arguments.get("model") if isinstance(arguments, Mapping) else None)
    return next((printable(name) for name in names if isinstance(name, str)), "")


def _boxes(saved: Any) -> dict[str, dict[str, Any]]:
    """Every dict with tensors in a checkpoint, by the keys that lead there, ``""`` for the checkpoint itself."""
    boxes: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    waiting = deque([("", saved)] if isinstance(saved, Mapping) else [])
    while waiting and len(seen) < 10_000:
        name, node = waiting.popleft()
        if id(node) in seen or name.count(".") > 8:  # deeper than any script nests them
            continue
        seen.add(id(node))
        if tensors := {k: v for k, v in node.items() if isinstance(k, str) and hasattr(v, "shape")}:
            own = {keymap.BETWEEN.sub("", k): v for k, v in tensors.items()}
            boxes[name] = own if len(own) == len(tensors) else tensors
        inside = [(k, v) for k, v in node.items() if isinstance(k, str) and len(k) <= 200 and isinstance(v, Mapping)]
        waiting += [(f"{name}.{k}" if name else k, v) for k, v in inside]
    return boxes


def _beside(names: Collection[str], found: infer.Found) -> set[str]:
    """Those of ``names`` that are no part of the network's modules: a loss's weights, a queue, another head."""
    own = {key[len(found.prefix) :].partition(".")[0] for key in found.keys.values()}

    def is_part(name: str) -> bool:
        module = name[len(found.prefix) :].partition(".")[0]
        return name.startswith(found.prefix) and (module in own or re.fullmatch(r"layer\d+", module) is not None)

    return {name for name in names if not is_part(name)}


def _without_aliases(
    tensors: Mapping[str, Any], found: infer.Found, paths: Collection[str], counters: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """The tensors without second names; what is wrong where a second name's tensor is not that of the first."""
    tensors, differ = dict(tensors), []
    start = len(found.prefix)
    for name in (*paths, *counters):
        second = keymap.alias(name[start:], found.dialect) if name.startswith(found.prefix) else None
        if second is None or (second := found.prefix + second) not in tensors:
            continue
        twin = tensors.pop(second)
        if name in tensors and not np.array_equal(_numpy(tensors[name]), _numpy(twin), equal_nan=True):
            differ.append(f"{second} is not {name}")
        tensors.setdefault(name, twin)
    return tensors, [f"{len(differ)} different under two names: {few(differ)}"] if differ else []


def _numpy(value: Any) -> np.ndarray:
    """float32 for a torch tensor, known by its method, since torch is not imported here and numpy knows no bfloat16."""
    return value.detach().float().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _float32(value: Any) -> np.ndarray:
    dtype = getattr(value, "dtype", type(value).__name__)
    if not (str(dtype).removeprefix("torch.").startswith(("float", "bfloat"))):
        raise TypeError(f"is {dtype}, not a floating-point tensor")
    return np.ascontiguousarray(_numpy(value), dtype=np.float32)


def _count(value: Any) -> int | None:
    """A counter of any dtype: averaged weights count half batches, halved ones infinitely many."""
    if int(np.prod(tuple(value.shape))) != 1:
        return None
    if "int" in str(value.dtype):
        return int(value.reshape(()))
    number = float(_numpy(value).astype(np.float64).reshape(()))
    return round(number) if 0 <= number < 2**62 else None


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
