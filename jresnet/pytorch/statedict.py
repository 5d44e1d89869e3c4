"""Converts a PyTorch ``state_dict`` to a configuration and arrays (:func:`match`) and back (:func:`state_dict`)."""

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
from jresnet.files import few
from jresnet.models import params, zoo
from jresnet.models.resnet import ResNet, ResNetConfig
from jresnet.pytorch import infer, keymap, stated
from jresnet.pytorch.torchfile import Module

# The order in which torchvision registers modules and parameters, which is the order of PyTorch's state_dicts.
_ORDER = (
    "conv1", "bn1", "maxpool", "conv2", "bn2", "conv3", "bn3", "se", "downsample", "layer1", "layer2", "layer3", "layer4",
    "fc", "fc1", "fc2", "conv", "kernel", "scale", "bias", "mean", "var",
)  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """The network in a file, and information on how it was read."""

    arch: str | None  # a name in the zoo; None: the network is not in the zoo
    config: ResNetConfig  # configuration of the file's network; num_classes is 0 if it has no head
    values: dict[str, np.ndarray]  # by dotted path, float32, in jresnet's layout; without fc.* if the file has no head
    dialect: str  # a name in keymap.DIALECTS
    counters: dict[str, int]  # num_batches_tracked by torchvision's key, which jresnet's BatchNorm does not have
    notes: tuple[str, ...]  # one sentence for each thing that was ignored or chosen
    assumed: tuple[str, ...]  # one phrase for each property that neither keys nor shapes determine

    @property
    def headless(self) -> bool:
        """Whether the file has no last layer; :func:`jresnet.models.params.adapt` can add one."""
        return "fc.kernel" not in self.values

    def torchvision(self) -> dict[str, np.ndarray]:
        """The tensors by torchvision's keys, in PyTorch's layout."""
        return {keymap.torch_key(path): keymap.to_torch(value) for path, value in self.values.items()}

    def metadata(self) -> dict[str, str]:
        """The metadata for a native file: the counters, and the dialect if it supports such a network."""
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
    """Reads the network in a ``state_dict``, with the state_dict's numbers of classes and channels.

    :func:`jresnet.models.params.adapt` changes these numbers.

    Args:
        state_dict: maps PyTorch's keys to numpy arrays or torch tensors of any floating-point dtype, or a checkpoint that
            contains such a dict. Tensors outside the network's prefix are ignored.
        arch: the expected architecture, a name from :func:`jresnet.list_models`; ``None``: any ResNet.
        dialect: a name in :data:`jresnet.pytorch.keymap.DIALECTS`; ``None``: the one that fits the keys best.
        prefix: prefix of the network's keys, such as ``backbone``; ``None``: that of the largest network.
        key: key of the dict of tensors in a checkpoint, such as ``state_dict_ema`` or ``model.teacher``; ``"."`` is the
            checkpoint itself; ``None``: the one with the largest network.
        source: name of the weights in error messages.
        chosen: any of num_classes, in_channels, stem, shortcut, stride_in and output_stride. If the tensors determine a
            property, the chosen value must agree. If they do not (a stem's max-pool, stride_in, output_stride), the chosen
            value is used, else the checkpoint's statement, else the usual one. num_classes is used in the configuration
            if the file has no head.

    Returns:
        The network, with notes on how it was read.

    Raises:
        InputError: unknown architecture or dialect.
        WeightsError: the network is not the requested one, or its parameters and statistics are not all present exactly
            once; one message lists all missing, unexpected and misshapen tensors.
    """
    if arch is not None:
        zoo.find(arch)
    # With `key`, the user chose the tensors explicitly, so that statements elsewhere in the checkpoint are ignored.
    said = stated.read(state_dict) if key is None else stated.Statement()
    box, tensors, found, notes = _network(state_dict, dialect, prefix, key, source)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if said.refused:
        raise WeightsError(
            f"{source} says that its network {'; '.join(said.refused)}: jresnet does not have this function, even if the "
            "tensors match; use weights of a plain ResNet"
            + (f", or load the tensors as one nevertheless, by giving their key {box!r}" if box else "")
        )
    if found is None:
        where = f" under {prefix!r}" if prefix else ""
        naming = f" in {dialect} naming" if dialect else ""
        other = next(
            (what for pattern, what in keymap.OTHER_NETWORKS if any(re.search(pattern, k) for k in shapes)), None
        )
        if (prefix is not None or dialect) and (elsewhere := infer.find(shapes)):
            raise WeightsError(
                f"{source} contains no ResNet{naming}{where}: there is one "
                f"{f'under {elsewhere.prefix!r}' if elsewhere.prefix else 'without a prefix'} in {elsewhere.dialect} naming"
            )
        raise WeightsError(
            f"{source} contains no ResNet{naming}{where}{f' but {other}' if other else ''}: expected tensors such as "
            f"conv1.weight, bn1.weight and layer1.0.conv1.weight, found {few(shapes)}"
        )
    if infer.normalises_first(found, shapes):
        raise WeightsError(
            f"{source} contains a pre-activation ResNet (He et al. 2016b), whose blocks normalise before they convolve; "
            "jresnet does not have such networks: use weights of a plain ResNet"
        )
    asked = dict(chosen)
    try:
        config = infer.configure(found, shapes, **chosen)
        if arch is not None:  # properties of the architecture that the tensors do not determine
            untold = {name: getattr(zoo.find(arch).config, name) for name in ("antialias", "norm")}
            if any(path.endswith(".var") for path in found.keys):
                untold["norm"] = None
            if infer.is_like(dataclasses.replace(config, **untold), arch):
                chosen |= untold
                config = infer.configure(found, shapes, **chosen)
        layers = stated.layers(tensors.settings, found.keys, found.prefix) if isinstance(tensors, Module) else {}
        own = stated.of_layers(layers, config)
        if not layers and "bottleneck" in config.blocks and _is_segmentation(found, shapes):
            said.choose("dilated", 2, "dilation in the last 2 stages, as torchvision's segmentation networks have it")
        for statement in (own, said):
            for name, value in stated.fields(statement.chosen, config).items():
                if chosen.get(name) is None:
                    chosen[name] = value
                elif chosen[name] != value and asked.get(name) is not None:
                    notes.append(f"the file says {name} {value!r}, but the requested {chosen[name]!r} is used")
        config = infer.configure(found, shapes, **chosen)
    except (InputError, WeightsError) as error:
        raise WeightsError(f"{source}: {error}") from None
    if different := stated.contradictions(layers, config):
        raise WeightsError(
            f"{source} contains a module with a ResNet's tensors, but its layers compute another function than jresnet's or "
            f"the requested one: {'; '.join(different)}"
        )
    if said.said or own.said:
        notes.append(f"settings stated by the file: {', '.join(own.said + said.said)}")

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
        notes.append(f"{found.head} has no bias: zeros are used")
    if found.guessed:
        notes.append(f"{found.head} is taken as the last layer: it is the only other layer")
    beside = _beside(got.keys() - expected.keys(), found, expected)
    problems += params.differences(expected, {name: shape for name, shape in got.items() if name not in beside})
    # Other networks of the same size are named already.
    others = tuple(other for other in found.rivals if not found.prefix.startswith(other))
    if named := [name for name in got if name in beside and not name.startswith(others)]:
        notes.append(f"ignored, not part of the network: {few(named)}")

    values, counts, odd = {}, {}, []
    unread: dict[str, list[str]] = {}  # names by the reason why they are not read
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
            unread.setdefault(str(error), []).append(name)
    problems += [f"{len(names)} {reason}: {few(names)}" for reason, names in unread.items()]
    if odd:
        notes.append(f"ignored, not a number of batches: {few(odd)}")
    row = infer.row(config)
    if said.name and said.name not in (arch, row):
        notes.append(f"the file calls its network {said.name!r}, but its tensors are those of {_a(row)}")
    if problems:
        strange = [name for name in got if name not in expected]
        parts = [what for pattern, what in keymap.OTHER_PARTS if any(re.search(pattern, name) for name in strange)]
        if parts:
            problems.insert(0, f"it has {' and '.join(parts)}, which jresnet does not support")
        norms = [name for name, path in paths.items() if path.endswith(".var")]
        if norms and not any(name in got for name in norms):
            folded = not any(path.endswith(".scale") and name in got for name, path in paths.items())
            problems.insert(
                0,
                "it has no BatchNorm: convert the weights from before BatchNorm was folded into the convolutions"
                if folded
                else "it has no running statistics: either only the parameters were saved (save model.state_dict(), which "
                "includes the buffers), or the network has GroupNorm (name the architecture, resnet50_gn)",
            )
        what = f"a complete {arch or row or 'ResNet'}"
        raise WeightsError(f"{source} does not contain {what} ({found.dialect} naming): {'; '.join(problems)}")
    if "fc.kernel" in values and "fc.bias" not in values:
        values["fc.bias"] = np.zeros(config.num_classes, np.float32)
    _check_asked(source, config, row, arch, chosen)
    if found.head is None:
        config = dataclasses.replace(config, num_classes=0)
    arch = arch or row
    known = [name for name, value in chosen.items() if value is not None]
    known += ["stride_in", "output_stride"] if layers else []
    return Conversion(arch, config, values, found.dialect, counts, tuple(notes), infer.assumed(config, known))


def _is_segmentation(found: infer.Found, shapes: Mapping[str, Any]) -> bool:
    """Whether the network is the backbone of torchvision's FCN or DeepLab, whose last layer is a 1x1 convolution."""
    base = found.prefix.removesuffix("backbone.")
    return base != found.prefix and len(shapes.get(f"{base}classifier.4.weight", ())) == 4


def _a(row: str | None) -> str:
    return f"a {row}" if row else "a ResNet that is not in the zoo"


def _check_asked(
    source: str, config: ResNetConfig, row: str | None, arch: str | None, chosen: Mapping[str, Any]
) -> None:
    """Raises :class:`WeightsError` if the file's network is not the requested one."""
    if arch is not None and not infer.is_like(config, arch):
        if row:
            raise WeightsError(f"{source} contains a {row}, not a {arch}: name that architecture")
        raise WeightsError(
            f"{source} contains a ResNet that is not in the zoo, not a {arch}: {infer.describe(config)}; leave out the "
            "architecture"
        )
    for field in ("stem", "shortcut", "stride_in", "output_stride"):
        if chosen.get(field) not in (None, getattr(config, field)) and not (
            field == "output_stride" and chosen[field] == config.full_stride  # equivalent to None
        ):
            raise WeightsError(
                f"{source} contains a network whose {field} is {getattr(config, field)!r}, not {chosen[field]!r}: "
                f"leave out {field}"
            )


def _key(path: str, found: infer.Found) -> str:
    """The file's key of the tensor with this jresnet path."""
    if path.startswith("fc."):
        return f"{found.head}.{keymap.LEAVES[path[3:]]}"
    return found.prefix + keymap.torch_key(path, found.dialect).removeprefix(keymap.DIALECTS[found.dialect].root)


def _counter(path: str, found: infer.Found) -> str:
    """The file's key of the counter beside a running variance."""
    return f"{_key(path, found).rpartition('.')[0]}.{keymap.COUNTER}"


def _network(
    saved: Any, dialect: str | None, prefix: str | None, key: str | None, source: str
) -> tuple[str, dict[str, Any], infer.Found | None, list[str]]:
    """Finds the dict of tensors with the largest network: its key, the dict, the network, and notes on the choice."""
    boxes = _boxes(saved)
    if key is not None:
        key = "" if key == "." else key
        if key not in boxes:
            found_keys = few(repr(name or ".") for name in boxes) or "none"
            raise WeightsError(f"{source} has no dict of tensors {key!r}: found {found_keys}")
        boxes = {key: boxes[key]}
    if not boxes:
        what = type(saved).__name__
        if isinstance(saved, Mapping) and saved:
            what = f"entries that are not tensors: {few(map(str, saved))}"
        elif isinstance(saved, Mapping):
            what = "an empty dict"
        raise WeightsError(f"{source} contains no weights: expected a state_dict (names to tensors), found {what}")
    networks = {}
    for name, tensors in boxes.items():
        if found := infer.find({k: tuple(v.shape) for k, v in tensors.items()}, dialect, prefix):
            networks[name] = found
    if not networks:
        largest = max(boxes, key=lambda name: len(boxes[name]))
        return largest, boxes[largest], None, []
    most = max(found.score for found in networks.values())
    rivals = [name for name, found in networks.items() if found.score >= infer.RIVAL * most]
    rivals.sort(key=lambda name: (infer.preference(name), infer.preference(networks[name].prefix)))
    name, found, notes = rivals[0], networks[rivals[0]], []
    if rivals[1:]:
        notes.append(f"read from {name or '.'!r}; also found: {few(repr(rival or '.') for rival in rivals[1:])}")
    if found.rivals:
        notes.append(f"read from {found.prefix!r}; also found: {few(map(repr, found.rivals))}")
    tensors = boxes[name]
    for ignored in [k for k in tensors if k.rpartition(".")[2] in keymap.IGNORED]:
        del tensors[ignored]
    return name, tensors, found, notes


def _boxes(saved: Any) -> dict[str, dict[str, Any]]:
    """All dicts of tensors in a checkpoint, by their keys joined by dots; ``""`` is the checkpoint itself."""
    boxes: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque([("", saved)])
    while waiting and len(seen) < 10_000:
        name, node = waiting.popleft()
        if id(node) in seen or name.count(".") > 8:  # no script nests them deeper
            continue
        seen.add(id(node))
        if isinstance(node, list | tuple):  # such as [epoch, state_dict]
            node = {str(i): value for i, value in enumerate(node[:100])}
        elif not isinstance(node, Mapping):
            continue
        if tensors := {k: v for k, v in node.items() if isinstance(k, str) and hasattr(v, "shape")}:
            own = {keymap.BETWEEN.sub("", k): v for k, v in tensors.items()}
            boxes[name] = own if len(own) == len(tensors) else tensors
            if isinstance(node, Module):
                boxes[name] = module = Module(boxes[name])
                module.settings = node.settings
        holders = (Mapping, list, tuple)
        named = [(str(k), v) for k, v in node.items() if isinstance(k, str | int) and isinstance(v, holders)]
        inside = [(k, v) for k, v in named if len(k) <= 200]
        waiting += [(f"{name}.{k}" if name else k, v) for k, v in inside]
    return boxes


def _beside(names: Collection[str], found: infer.Found, expected: Collection[str]) -> set[str]:
    """The ``names`` that do not belong to the network's modules: a loss's weights, a queue, another head."""
    body = [key for key in expected if key.startswith(found.prefix) and not key.startswith(f"{found.head}.")]
    own = {key[len(found.prefix) :].partition(".")[0] for key in body}

    def is_part(name: str) -> bool:
        if name.rpartition(".")[2] in keymap.PROFILED:
            return False
        module = name[len(found.prefix) :].partition(".")[0]
        return name.startswith(found.prefix) and (module in own or re.fullmatch(r"layer\d+", module) is not None)

    return {name for name in names if not is_part(name)}


def _without_aliases(
    tensors: Mapping[str, Any], found: infer.Found, paths: Collection[str], counters: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """The tensors without second names, and a problem for second names whose tensor differs from the first name's."""
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
    """Converts to numpy; torch tensors (recognised by a method, since torch is not imported here) become float32."""
    return value.detach().float().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _is_empty(value: Any) -> bool:
    """Whether it is a torch tensor that has a shape but no data."""
    return str(getattr(value, "device", "")) == "meta"


def _float32(value: Any) -> np.ndarray:
    dtype = getattr(value, "dtype", type(value).__name__)
    if not (str(dtype).removeprefix("torch.").startswith(("float", "bfloat"))):
        raise TypeError(f"of type {dtype}, not floating point")
    if _is_empty(value):
        raise TypeError("without data, on torch's device meta")
    return np.ascontiguousarray(_numpy(value), dtype=np.float32)


def _count(value: Any) -> int | None:
    """A counter as an int, None if invalid. Averaging weights makes counters fractional; float16 makes them infinite."""
    if int(np.prod(tuple(value.shape))) != 1 or _is_empty(value) or "complex" in str(value.dtype):
        return None
    if "int" in str(value.dtype):
        return int(value.reshape(()))
    number = float(_numpy(value).astype(np.float64).reshape(()))
    return round(number) if 0 <= number < 2**62 else None


def state_dict(
    model: ResNet, dialect: str = "torchvision", counters: int | Mapping[str, int] = 0
) -> dict[str, np.ndarray]:
    """Converts the weights of a model to a ``state_dict`` of numpy arrays for PyTorch.

    ``{key: torch.from_numpy(value) for key, value in state_dict(model).items()}`` can be loaded with
    ``load_state_dict(strict=True)``. :func:`jresnet.pytorch.torchsave.write` writes a ``.pth`` file without torch.

    Args:
        model: the model; its parameters and running statistics are copied bit by bit.
        dialect: the naming scheme, a name in :data:`jresnet.pytorch.keymap.DIALECTS`.
        counters: the value of each BN's ``num_batches_tracked``: one number, or numbers by torchvision's key with 0 for
            missing keys. Only ``BatchNorm2d(momentum=None)`` uses it.

    Returns:
        New arrays in PyTorch's layout (OIHW, OI) by the dialect's keys, in PyTorch's order. A tensor that the dialect
        registers twice is one array under two names.

    Raises:
        InputError: unknown dialect, or a dialect without such a network; the model is fused, or has a custom head that is
            not a single linear layer.
    """
    config, values = params.config_of(model), params.arrays(model)
    check_dialect(config, dialect)
    if problems := params.differences(params.shapes(config), {path: value.shape for path, value in values.items()}):
        raise InputError(
            f"a PyTorch ResNet cannot hold this model: {'; '.join(problems)}. If the model is fused, use the model that was "
            "passed to jresnet.fuse; if model.fc is a custom head, save its parameters yourself"
        )
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(values, key=_rank):
        tensors[keymap.torch_key(path, dialect)] = keymap.to_torch(np.array(values[path]))
        if path.endswith(".var"):
            count = counters if isinstance(counters, int) else counters.get(keymap.counter_key(path), 0)
            tensors[keymap.counter_key(path, dialect)] = np.array(count, np.int64)
    aliases = {second: tensors[key] for key in tensors if (second := keymap.alias(key, dialect)) is not None}
    return tensors | aliases


def check_dialect(config: ResNetConfig, dialect: str) -> None:
    """Raises :class:`InputError` if the dialect is unknown, or its networks differ from ``config``."""
    if dialect not in keymap.DIALECTS:
        raise InputError(f"unknown dialect {dialect!r}: there are {', '.join(keymap.DIALECTS)}")
    if different := _differences(config, dialect):
        fitting = [name for name in keymap.DIALECTS if not _differences(config, name)]
        raise InputError(f"{dialect} has no such network: {'; '.join(different)}. Use one of {', '.join(fitting)}")


def _differences(config: ResNetConfig, dialect: str) -> list[str]:
    """The differences between the networks of ``dialect`` and ``config``."""
    found = [
        f"{field} is {value!r} there, {getattr(config, field)!r} here"
        for field, value in keymap.DIALECTS[dialect].config.items()
        if getattr(config, field) != value
    ]
    if config.has_parts and not keymap.DIALECTS[dialect].parts:
        found.append("it has no names for the parts of this network that He et al.'s do not have")
    return found


def _rank(path: str) -> list[int]:
    return [int(part) if part.isdigit() else _ORDER.index(part) for part in path.split(".")]
