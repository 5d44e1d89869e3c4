"""Which ResNet a state_dict holds, from its keys and shapes: :func:`find` where it lies, :func:`configure` what it is.

Nothing is looked up by an architecture's name, so that networks without a row of the zoo are found too. What neither keys
nor shapes tell is said by :func:`assumed`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jresnet.errors import InputError, WeightsError
from jresnet.models import zoo
from jresnet.models.config import STEMS, ResNetConfig
from jresnet.pytorch import keymap

Shape = tuple[int, ...]

_CONV, _NORM = ("kernel", "bias"), ("scale", "bias", "mean", "var")
_LEAVES = {"conv1": _CONV, "bn1": _NORM, "conv2": _CONV, "bn2": _NORM, "conv3": _CONV, "bn3": _NORM}
_LEAVES |= {"downsample.0": _CONV, "downsample.1": _NORM}

# A prefix is looked at where at least one of the stem's and one of the first block's names stands behind it, or two.
_ANCHORS = ("conv1.kernel", "bn1.scale", "layer1.0.conv1.kernel", "layer1.0.bn1.scale")

GAP = 3  # blocks that may be missing in a row: the error lists them; behind more of them a stage has ended
MANY, DEEP = 64, 8  # networks in a file, modules around a network: a stranger's file may have any number
RIVAL = 0.9  # of the tensors of the largest network: others with so many are told apart by their names


@dataclass(frozen=True)
class Found:
    """Where a network lies among tensors."""

    dialect: str  # a name of keymap.DIALECTS
    prefix: str  # before every name of the body, the dialect's root included
    keys: Mapping[str, str]  # of the body: jresnet's path -> the file's key
    head: str | None  # the file's module that holds the last layer, such as "module.fc"
    rivals: tuple[str, ...] = ()  # prefixes of other networks as large

    @property
    def score(self) -> int:
        """Tensors of the network that are there, its head among them where it is called as in the dialect."""
        return len(self.keys) + 2 * (self.head is not None)


def find(shapes: Mapping[str, Shape], dialect: str | None = None, prefix: str | None = None) -> Found | None:
    """The network most of whose tensors are there, under whatever prefix and in whatever dialect; None without one.

    Args:
        shapes: the shape of every tensor by its key.
        dialect: a name of :data:`jresnet.pytorch.keymap.DIALECTS` that is the only one to look for.
        prefix: the only one to look under, such as ``backbone``.

    Raises:
        InputError: for an unknown dialect.
    """
    if dialect is not None and dialect not in keymap.DIALECTS:
        raise InputError(f"unknown dialect {dialect!r}: there are {', '.join(keymap.DIALECTS)}")
    if prefix:
        prefix = prefix.rstrip(".") + "."
    best: dict[str, list[Found]] = {}  # by prefix: those of the highest score, in the order of the dialects
    for name in [dialect] if dialect else keymap.DIALECTS:
        for at in _prefixes(shapes, name):
            if prefix is not None and at not in (prefix, prefix + keymap.DIALECTS[name].root):
                continue
            found = _at(shapes, name, at)
            others = best.setdefault(at, [found])
            if found.score > others[0].score:
                best[at] = [found]
            elif found.score == others[0].score and found is not others[0]:
                others.append(found)
    if not best:
        return None
    networks = [_told_apart(found, shapes) for found in best.values()]
    most = max(found.score for found in networks)
    rivals = sorted(
        (found for found in networks if found.score >= RIVAL * most), key=lambda found: preference(found.prefix)
    )
    found = rivals[0]
    head = found.head or _other_head(shapes, found)
    return dataclasses.replace(found, head=head, rivals=tuple(found.prefix for found in rivals[1:]))


def preference(name: str) -> int:
    """Smaller for what is rather taken of two networks in one file, by the name under which it lies."""
    return 0 if keymap.FIRST.search(name) else 2 if keymap.LAST.search(name) else 1


def _prefixes(shapes: Mapping[str, Shape], dialect: str) -> list[str]:
    """Where a network of ``dialect`` may begin, in the order of the file."""
    root = len(keymap.DIALECTS[dialect].root)
    keys = [keymap.torch_key(path, dialect) for path in _ANCHORS]
    blocks = {second for key in keys if (second := keymap.alias(key, dialect))} | {key[root:] for key in keys[2:]}
    names = {key[root:] for key in keys} | blocks
    seen: dict[str, set[str]] = {}
    for key in shapes:
        for name in names:
            if key == name or key.endswith("." + name):
                seen.setdefault(key[: len(key) - len(name)], set()).add(name)
    return [prefix for prefix, there in seen.items() if len(there) > 1 and there & blocks][:MANY]


def _at(shapes: Mapping[str, Shape], dialect: str, prefix: str) -> Found:
    """The network of ``dialect`` under ``prefix``."""
    root = keymap.DIALECTS[dialect].root
    keys: dict[str, str] = {}
    taken: set[str] = set()

    def look(module: str, leaves: Iterable[str]) -> bool:
        there = False
        for leaf in leaves:
            name = keymap.torch_key(f"{module}.{leaf}", dialect)
            for key in (name, keymap.alias(name, dialect)):
                if key is None or (key := prefix + key[len(root) :]) not in shapes or key in taken:
                    continue
                keys[f"{module}.{leaf}"] = key
                taken.add(key)
                there = True
                break
        return there

    look("conv1", _CONV)
    look("bn1", _NORM)
    # conv3 alone tells nothing: resnet18_d2l's projections are called so.
    norm3 = [keymap.torch_key(f"layer1.{j}.bn3.{leaf}", dialect) for j in range(GAP) for leaf in _NORM]
    bottleneck = any(prefix + key[len(root) :] in shapes for key in norm3)
    modules = {name: leaves for name, leaves in _LEAVES.items() if bottleneck or not name.endswith("3")}
    stage, blocks = 1, 1
    while blocks:
        blocks = block = missing = 0
        while missing < GAP:
            there = [look(f"layer{stage}.{block}.{name}", leaves) for name, leaves in modules.items()]
            missing = 0 if any(there) else missing + 1
            blocks += any(there)
            block += 1
        stage += 1
    head = _own_head(dialect, prefix)
    return Found(dialect, prefix, keys, head if len(shapes.get(f"{head}.weight", ())) == 2 else None)


def _own_head(dialect: str, prefix: str) -> str:
    """The module of the last layer, where the dialect has it."""
    base = prefix.removesuffix(keymap.DIALECTS[dialect].root)
    return base + keymap.torch_key("fc.kernel", dialect).removesuffix(".weight")


def _other_head(shapes: Mapping[str, Shape], found: Found) -> str | None:
    """The only Linear below a name of keymap.HEADS, beside the body or beside what it lies in.

    Two and more in a row are a projection head of self-supervised training, which tells no classes.
    """
    base = found.prefix.removesuffix(keymap.DIALECTS[found.dialect].root)
    body = set(found.keys.values())
    for _ in range(DEEP):
        heads = []
        for name in keymap.HEADS:
            group = {key for key in shapes if key.startswith(f"{base}{name}.") and key not in body}
            weights = [key for key in group if key.endswith(".weight") and len(shapes[key]) == 2]
            if len(weights) == 1 and group <= {weights[0], weights[0].removesuffix("weight") + "bias"}:
                heads.append(weights[0].removesuffix(".weight"))
        if heads:
            return heads[0] if len(heads) == 1 else None
        if not base:
            break
        base = base[: base.rstrip(".").rfind(".") + 1]
    return None


def _told_apart(networks: list[Found], shapes: Mapping[str, Shape]) -> Found:
    """Of dialects that share their names, the one whose networks are like this; else the first."""
    if len(networks) == 1:
        return networks[0]

    def fits(found: Found) -> int:
        dialect = keymap.DIALECTS[found.dialect]
        config = configure(found, shapes)
        same = all(getattr(config, name) == value for name, value in dialect.config.items())
        return 2 if same and dialect.stages == len(config.depths) else 1 if same and dialect.stages is None else 0

    return max(networks, key=fits)


def configure(found: Found, shapes: Mapping[str, Shape], num_classes: int | None = None, **chosen: Any) -> ResNetConfig:
    """The configuration of a network that :func:`find` found.

    A tensor that is missing or of a wrong shape is outvoted by the others, so that it is this tensor that an error names.

    Args:
        found: where it lies.
        shapes: the shape of every tensor by its key.
        num_classes: of a network without a head.
        chosen: stem, shortcut, stride_in or output_stride, where the tensors do not tell it.

    Raises:
        WeightsError: for what no ResNet of jresnet is.
    """
    # Memory is reserved for what is found here, so that only tensors with elements, which a file must hold, are asked.
    shape = {path: shapes[key] if math.prod(shapes[key]) else () for path, key in found.keys.items()}
    like = keymap.DIALECTS[found.dialect].config
    paths = [path.split(".") for path in shape if path.startswith("layer")]
    stages = [f"layer{i + 1}" for i in range(max(int(path[0][5:]) for path in paths))]
    depths = tuple(1 + max((int(path[1]) for path in paths if path[0] == stage), default=0) for stage in stages)
    bottleneck = any(path[2] == "bn3" for path in paths)
    outer = ("conv3", "bn3") if bottleneck else ("conv1", "bn1", "conv2", "bn2")
    channels = [_vote(shape[".".join(p)] for p in paths if p[0] == stage and p[2] in outer) for stage in stages]
    widths = tuple(count // (4 if bottleneck else 1) for count in channels)
    groups, width_per_group = 1, 64
    if bottleneck:
        kernels = [shape[path] for path in shape if path.endswith(".conv2.kernel") and len(shape[path]) == 4]
        votes = Counter(kernel[0] // kernel[1] for kernel in kernels if kernel[1]).most_common(1)
        groups = votes[0][0] if votes else 1
        inner = [_vote(shape[".".join(p)] for p in paths if p[0] == s and p[2] in ("conv2", "bn2")) for s in stages]
        width_per_group = _width_per_group(widths, [count // max(groups, 1) for count in inner])
    shortcut: Any = _shortcut(shape, stages, bottleneck)
    if shortcut is None or (bottleneck and shortcut == "projection" and chosen.get("shortcut") == "projection_first"):
        shortcut = chosen.get("shortcut") or like.get("shortcut", "projection")  # for bottlenecks the two are the same
    kernel = shape.get("conv1.kernel", ())
    stem = chosen.get("stem") or like.get("stem", "imagenet")
    if len(kernel) == 4:
        fitting = [name for name, (size, *_) in STEMS.items() if size == kernel[2]]
        stem = next((name for name in (stem, like.get("stem"), *fitting) if name in fitting), stem)
    function = {name: chosen[name] for name in ("output_stride",) if chosen.get(name) is not None}
    if bottleneck:
        function["stride_in"] = chosen.get("stride_in") or like.get("stride_in", "3x3")
    head = shapes.get(f"{found.head}.weight", ())
    head = head if math.prod(head) else ()
    try:
        return ResNetConfig(
            block="bottleneck" if bottleneck else "basic",
            depths=depths,
            widths=widths,
            num_classes=head[0] if len(head) == 2 else num_classes or 1,
            in_channels=kernel[1] if len(kernel) == 4 else 3,
            stem=stem,
            shortcut=shortcut,
            groups=groups,
            width_per_group=width_per_group,
            conv_bias=sum(path[2].startswith("conv") and path[3] == "bias" for path in paths) > len(paths) / 20,
            **function,
        )  # fmt: skip
    except InputError as error:
        raise WeightsError(f"its tensors are of no ResNet that jresnet has: {error}") from error


def _vote(shapes: Iterable[Shape]) -> int:
    """The most frequent first size."""
    votes = Counter(shape[0] for shape in shapes if shape)
    return votes.most_common(1)[0][0] if votes else 1


def _width_per_group(widths: tuple[int, ...], inner: list[int]) -> int:
    """What makes ``width * width_per_group // 64`` the channels of a group in every stage, 64 where it does."""
    if all(count == width for count, width in zip(inner, widths, strict=True)):
        return 64
    return max(-(-count * 64 // max(width, 1)) for count, width in zip(inner, widths, strict=True)) or 1


def _shortcut(shape: Mapping[str, Shape], stages: list[str], bottleneck: bool) -> str | None:
    """The kind of shortcut; None where no block needs one."""
    kernels = {path.split(".")[0] for path in shape if ".0.downsample.0." in path}
    norms = {path.split(".")[0] for path in shape if ".0.downsample.1." in path}
    if not kernels | norms:
        return "pad" if len(stages) > 1 and not bottleneck else None
    if not norms:
        return "conv"
    return "projection_first" if not bottleneck and stages[0] in kernels | norms else "projection"


def row(config: ResNetConfig) -> str | None:
    """The architecture of the zoo that ``config`` is, apart from what may be chosen; the nearest, where several are."""

    return max(
        (name for name in zoo.ZOO if is_like(config, name)),
        key=lambda name: sum(getattr(zoo.ZOO[name].config, field) == getattr(config, field) for field in zoo.FREE),
        default=None,
    )


def is_like(config: ResNetConfig, arch: str) -> bool:
    """Whether ``config`` is ``arch``, apart from what may be chosen."""
    own = zoo.find(arch).config
    return all(
        getattr(own, field.name) == getattr(config, field.name)
        for field in dataclasses.fields(ResNetConfig)
        if field.name not in zoo.FREE
    )


def describe(config: ResNetConfig) -> str:
    """The configuration in a line."""
    (kernel, _, _), channels = STEMS[config.stem], config.in_channels
    parts = [
        f"{config.block} blocks {'-'.join(map(str, config.depths))}",
        f"widths {'-'.join(map(str, config.widths))}",
        f"{kernel}x{kernel} stem for {channels} channel{'s' * (channels > 1)}",
        f"{config.shortcut} shortcuts",
    ]
    if (config.groups, config.width_per_group) != (1, 64):
        parts.append(f"{config.groups} group{'s' * (config.groups > 1)} of {config.width_per_group} channels")
    if config.conv_bias:
        parts.append("biased convolutions")
    if config.stem not in ("imagenet", "cifar"):
        parts.append(f"{'a' if STEMS[config.stem][2] else 'no'} max-pool")
    if config.stride_in != "3x3":
        parts.append(f"stride on the {config.stride_in} convolution")
    if config.output_stride:
        parts.append(f"dilated to output stride {config.output_stride}")
    return ", ".join([*parts, f"{config.num_classes:,} classes" if config.num_classes else "no head"])


def assumed(config: ResNetConfig, known: Collection[str] = ()) -> tuple[str, ...]:
    """What neither keys nor shapes tell, and is taken as it usually is; a phrase each.

    Args:
        config: of the network.
        known: fields that the user chose or the checkpoint stated.
    """
    found = []
    _, stride, pool = STEMS[config.stem]
    if stride == 1 and "stem" not in known:
        found.append(f"stem at stride 1 with{'' if pool else 'out'} max-pool")
    if config.block == "bottleneck" and "stride_in" not in known:
        found.append(f"stride on the {config.stride_in} convolution")
    if "output_stride" not in known:
        found.append("no dilation")
    return (*found, "ReLU behind each block's sum")


def normalises_first(found: Found, shapes: Mapping[str, Shape]) -> bool:
    """Whether most blocks that change the width normalise their input and not what their first convolution gives."""
    votes = Counter()  # type: Counter[bool]
    for path, key in found.keys.items():
        norm = shapes.get(found.keys.get(path.removesuffix("conv1.kernel") + "bn1.scale", ""), ())
        if path.startswith("layer") and path.endswith(".conv1.kernel") and len(shapes[key]) == 4 and len(norm) == 1:
            outputs, inputs = shapes[key][:2]
            if inputs != outputs and norm[0] in (inputs, outputs):
                votes[norm[0] == inputs] += 1
    return votes[True] > votes[False]
