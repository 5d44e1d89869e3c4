"""Infers the ResNet in a state_dict from keys and shapes: :func:`find` locates it, :func:`configure` describes it.

Architecture names are not used, so that networks that are not in the zoo are recognised as well. :func:`assumed` lists the
properties that neither keys nor shapes determine.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jresnet.errors import InputError, WeightsError
from jresnet.models import zoo
from jresnet.models.config import STEMS, ResNetConfig
from jresnet.models.parts import squeezed_channels
from jresnet.pytorch import keymap

Shape = tuple[int, ...]

_CONV, _NORM = ("kernel", "bias"), ("scale", "bias", "mean", "var")
_LEAVES = {"conv1": _CONV, "bn1": _NORM, "conv2": _CONV, "bn2": _NORM, "conv3": _CONV, "bn3": _NORM}
_LEAVES |= {"se.fc1": _CONV, "se.fc2": _CONV, "se.conv": ("kernel",)}
_PROJECTION = {"downsample.0": _CONV, "downsample.1": _NORM}
_AVERAGED = {"downsample.1": _CONV, "downsample.2": _NORM}  # the first is an average
_STEM = {"conv1": _CONV, "bn1": _NORM, "maxpool.0": _CONV, "maxpool.1": _NORM}
_STEM |= {"conv1.0": _CONV, "conv1.1": _NORM, "conv1.3": _CONV, "conv1.4": _NORM, "conv1.6": _CONV}

# A prefix is a candidate if it is followed by at least two of these names, one of them in the first block.
_ANCHORS = ("conv1.kernel", "bn1.scale", "layer1.0.conv1.kernel", "layer1.0.bn1.scale")

GAP = 3  # a stage ends where so many blocks in a row are missing; fewer missing blocks are reported as an error
MANY, DEEP = 64, 8  # limits against malicious files: networks in a file, modules around a network
# networks with at least this fraction of the largest network's tensors are candidates, chosen by their names
RIVAL = 0.9


@dataclass(frozen=True)
class Found:
    """The location of a network among the tensors of a file."""

    dialect: str  # a name in keymap.DIALECTS
    prefix: str  # prefix of all keys of the body, including the dialect's root
    keys: Mapping[str, str]  # keys of the body: jresnet's path -> the file's key
    head: str | None  # the module of the last layer in the file, such as "module.fc"
    rivals: tuple[str, ...] = ()  # prefixes of other networks of similar size
    guessed: bool = False  # whether the head is the only layer beside the body, under none of the usual names

    @property
    def score(self) -> int:
        """The number of tensors found, including the head's if it has the dialect's name."""
        return len(self.keys) + 2 * (self.head is not None)


def find(shapes: Mapping[str, Shape], dialect: str | None = None, prefix: str | None = None) -> Found | None:
    """Finds the network with the most tensors, under any prefix and in any dialect; None if there is none.

    Args:
        shapes: the shape of every tensor by its key.
        dialect: the dialect to search for, a name in :data:`jresnet.pytorch.keymap.DIALECTS`; ``None``: all.
        prefix: the prefix to search under, such as ``backbone``; ``None``: all.

    Raises:
        InputError: unknown dialect.
    """
    if dialect is not None and dialect not in keymap.DIALECTS:
        raise InputError(f"unknown dialect {dialect!r}: there are {', '.join(keymap.DIALECTS)}")
    # for each prefix the networks with the highest score, in the order of the dialects
    best: dict[str, list[Found]] = {}
    for name in [dialect] if dialect else keymap.DIALECTS:
        for at in _prefixes(shapes, name, prefix):
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
    only = None if head else _only_linear(shapes, found)
    prefixes = tuple(found.prefix for found in rivals[1:])
    return dataclasses.replace(found, head=head or only, rivals=prefixes, guessed=only is not None)


def preference(name: str) -> int:
    """The rank of a network in a file by its name or prefix; the smallest is preferred (averaged weights, teachers)."""
    return 0 if keymap.FIRST.search(name) else 2 if keymap.LAST.search(name) else 1


def _prefixes(shapes: Mapping[str, Shape], dialect: str, chosen: str | None = None) -> list[str]:
    """The candidate prefixes of networks of ``dialect``, in the order of the file; only ``chosen`` if it is given."""
    wanted = None
    if chosen is not None:
        wanted = {chosen, chosen and chosen.rstrip(".") + "."}
        wanted |= {keymap.BETWEEN.sub("", prefix) for prefix in wanted}  # keys are searched without these
        wanted |= {prefix + keymap.DIALECTS[dialect].root for prefix in wanted}
    root = len(keymap.DIALECTS[dialect].root)
    keys = [keymap.torch_key(path, dialect) for path in _ANCHORS]
    blocks = {second for key in keys if (second := keymap.alias(key, dialect))} | {key[root:] for key in keys[2:]}
    names = {key[root:] for key in keys} | blocks
    seen: dict[str, set[str]] = {}
    for key in shapes:
        for name in names:
            if not key.endswith(name):
                continue
            prefix = key[: len(key) - len(name)]
            # A name begins after a dot; some scripts join names by another character.
            if prefix in wanted if wanted is not None else not prefix[-1:].isalnum():
                seen.setdefault(prefix, set()).add(name)
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

    def has(stage: int, module: str) -> bool:
        names = [keymap.torch_key(f"layer{stage}.{j}.{module}.{leaf}", dialect) for j in range(GAP) for leaf in _NORM]
        return any(prefix + key[len(root) :] in shapes for key in names)

    for name, leaves in _STEM.items():
        look(name, leaves)
    stage, blocks = 1, 1
    while blocks:
        # conv3 does not imply a bottleneck: resnet18_d2l's projections have that name.
        bottleneck = has(stage, "bn3")
        modules = {name: leaves for name, leaves in _LEAVES.items() if bottleneck or not name.endswith("3")}
        modules |= _AVERAGED if has(stage, "downsample.2") and not has(stage, "downsample.0") else _PROJECTION
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
    """The name of the last layer in the dialect."""
    base = prefix.removesuffix(keymap.DIALECTS[dialect].root)
    return base + keymap.torch_key("fc.kernel", dialect).removesuffix(".weight")


def _other_head(shapes: Mapping[str, Shape], found: Found) -> str | None:
    """The only linear layer named as in keymap.HEADS, beside the body or beside a module that contains the body.

    Several linear layers in a row are a projection head of self-supervised training, which has no classes.
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


def _only_linear(shapes: Mapping[str, Shape], found: Found) -> str | None:
    """The only layer beside the body, if it is linear, fits the body, and is not named like a projection head."""
    modules = {key.rpartition(".")[0] for key in found.keys.values()}
    beside = {
        key for key in shapes if key.rpartition(".")[0] not in modules and key.rpartition(".")[2] not in keymap.PROFILED
    }
    (weight, *more) = sorted((key for key in beside if key.endswith(".weight")), reverse=True) or [""]
    name = weight.removesuffix(".weight")
    last = max(
        (path for path in found.keys if re.fullmatch(r"layer\d+\.\d+\.bn\d\.scale", path)),
        key=lambda path: [int(number) for number in re.findall(r"\d+", path)],
        default="",
    )
    outputs = shapes.get(found.keys.get(last, ""), ())
    if more or len(shapes.get(weight, ())) != 2 or shapes[weight][1:] != outputs or keymap.PROJECTIONS.search(name):
        return None
    return name if beside <= {weight, f"{name}.bias"} else None


def _told_apart(networks: list[Found], shapes: Mapping[str, Shape]) -> Found:
    """Chooses among dialects with the same names the one whose networks match this one, else the first."""
    if len(networks) == 1:
        return networks[0]

    def fits(found: Found) -> int:
        dialect = keymap.DIALECTS[found.dialect]
        config = configure(found, shapes)
        same = all(getattr(config, name) == value for name, value in dialect.config.items())
        return 2 if same and dialect.stages == len(config.depths) else 1 if same and dialect.stages is None else 0

    return max(networks, key=fits)


def configure(found: Found, shapes: Mapping[str, Shape], num_classes: int | None = None, **chosen: Any) -> ResNetConfig:
    """Infers the configuration of a network that :func:`find` found.

    Sizes are decided by a majority vote of the tensors. So a single missing or misshapen tensor does not change the
    configuration, and the comparison with the configuration names that tensor.

    Args:
        found: location of the network.
        shapes: the shape of every tensor by its key.
        num_classes: number of classes if the network has no head.
        chosen: stem, shortcut, stride_in or output_stride, used if the tensors do not determine it.

    Raises:
        WeightsError: jresnet does not have such a ResNet.
    """
    # Memory is allocated for these sizes. Empty tensors are ignored, because a small file could claim any size with them.
    shape = {path: shapes[key] if math.prod(shapes[key]) else () for path, key in found.keys.items()}
    like = keymap.DIALECTS[found.dialect].config
    paths = [path.split(".") for path in shape if path.startswith("layer")]
    stages = [f"layer{i + 1}" for i in range(max(int(path[0][5:]) for path in paths))]
    depths = tuple(1 + max((int(path[1]) for path in paths if path[0] == stage), default=0) for stage in stages)
    bottlenecks = [any(path[0] == stage and path[2] == "bn3" for path in paths) for stage in stages]
    bottleneck = any(bottlenecks)
    head = shapes.get(f"{found.head}.weight", ())
    head = head if math.prod(head) else ()
    stem = _stem(shape, chosen.get("stem"), like.get("stem"))
    fields: dict[str, Any] = {
        "num_classes": head[0] if len(head) == 2 else num_classes or 1,
        "in_channels": next(
            (k[1] for name in ("conv1", "conv1.0") if len(k := shape.get(f"{name}.kernel", ())) == 4), 3
        ),
        "stem": stem,
        "conv_bias": sum(path[2].startswith("conv") and path[3] == "bias" for path in paths) > len(paths) / 20,
        **{name: chosen[name] for name in UNTOLD if chosen.get(name) is not None},
    }
    if bottleneck:
        fields["stride_in"] = chosen.get("stride_in") or like.get("stride_in", "3x3")
    if pruned := _pruned(shape, depths):
        return dataclasses.replace(pruned, **fields)
    channels, inner = [], []
    for stage, is_bottleneck in zip(stages, bottlenecks, strict=True):
        outer = ("conv3", "bn3") if is_bottleneck else ("conv1", "bn1", "conv2", "bn2")
        channels.append(_vote(shape[".".join(p)] for p in paths if p[0] == stage and p[2] in outer))
        if is_bottleneck:
            widths_3x3 = (shape[".".join(p)] for p in paths if p[0] == stage and p[2] in ("conv2", "bn2"))
            inner.append((channels[-1] // 4, _vote(widths_3x3)))
    widths = tuple(n // (4 if is_bottleneck else 1) for n, is_bottleneck in zip(channels, bottlenecks, strict=True))
    if bottleneck:
        # Shapes of each bottleneck's first convolution and of its 3x3 convolution.
        before = [
            (shape.get(path.replace("conv2", "conv1"), ()), shape[path]) for path in _kernels_2(shape, bottlenecks)
        ]
        groups = _most(n[0] // k[1] for n, k in before if n and k[1]) or 1
        fields["reduce_first"] = _most(k[0] // n[0] for n, k in before if n and n[0]) or 1
        if fields["reduce_first"] == 1:
            del fields["reduce_first"]
        fields["groups"] = groups
        fields["width_per_group"] = _width_per_group([(width, count // max(groups, 1)) for width, count in inner])
    stem_channels = _vote(shape[path] for path in shape if path.startswith("bn1.") or path in _LAST_OF_STEM)
    shortcut: Any = _shortcut(shape, stages, bottleneck, kept=not bottleneck and stem_channels == channels[0])
    if shortcut is None or (bottleneck and shortcut == "projection" and chosen.get("shortcut") == "projection_first"):
        shortcut = chosen.get("shortcut") or like.get("shortcut", "projection")  # the same function for bottlenecks
    kinds: list[Any] = ["bottleneck" if is_bottleneck else "basic" for is_bottleneck in bottlenecks]
    try:
        return ResNetConfig(
            block=kinds[0] if len(set(kinds)) == 1 else tuple(kinds),
            depths=depths,
            widths=widths,
            shortcut=shortcut,
            stem_channels=stem_channels if stem_channels not in (1, widths[0]) else None,
            **_attention(shape),
            **fields,
        )
    except InputError as error:
        raise WeightsError(f"jresnet does not have a ResNet with these tensors: {error}") from error


UNTOLD = ("output_stride", "antialias", "norm")  # fields that neither keys nor shapes determine
_LAST_OF_STEM = ("conv1.kernel", "conv1.bias", "conv1.6.kernel", "conv1.6.bias")


def _stem(shape: Mapping[str, Shape], asked: str | None, usual: str | None) -> Any:
    """The kind of stem. If the tensors allow several, it is ``asked``, else ``usual``, the dialect's."""
    stem = asked or usual or "imagenet"
    if any(path.startswith("conv1.6.") for path in shape):
        shares = [shape.get(f"conv1.{i}.kernel", ()) for i in (0, 3)]
        tiered = all(len(share) == 4 for share in shares) and shares[0][0] * 4 == shares[1][0] * 3
        pool = "conv" if any(path.startswith("maxpool.") for path in shape) else "max"
        fitting = [name for name, kind in STEMS.items() if kind.inner == ((3, 4) if tiered else (4, 4))]
        return next((name for name in fitting if STEMS[name].pool == pool), fitting[0])
    kernel = shape.get("conv1.kernel", ())
    if len(kernel) == 4:
        fitting = [name for name, kind in STEMS.items() if kind.kernel == kernel[2] and not kind.inner]
        return next((name for name in (stem, usual, *fitting) if name in fitting), stem)
    return stem


def _attention(shape: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields of the channel attention; empty if there is none."""
    if any(".se.conv." in path for path in shape):
        return {"attention": "eca"}
    first = [shape[path] for path in shape if path.endswith(".se.fc1.kernel") and len(shape[path]) == 4]
    if not first:
        return {}
    for reduction in (16, 4, 8, 2, 32):
        if all(squeezed_channels(kernel[1], reduction) == kernel[0] for kernel in first):
            return {"attention": "se"} | ({} if reduction == 16 else {"reduction": reduction})
    return {"attention": "se"}  # the wrong sizes are reported later


def _pruned(shape: Mapping[str, Shape], depths: tuple[int, ...]) -> ResNetConfig | None:
    """The pruned network of the zoo that matches most of the convolutions' sizes; None if there is none."""
    for name, row in zoo.ZOO.items():
        config = row.config
        if config.pruned is None or config.depths != depths:
            continue
        told = {
            f"layer{i + 1}.{j}.conv{k + 1}.kernel": count
            for i, depth in enumerate(depths)
            for j in range(depth)
            for k, count in enumerate(config.channels(i, j))
        }
        right = sum(shape.get(path, ())[:1] == (count,) for path, count in told.items())
        if right > RIVAL * len(told):
            return zoo.ZOO[name].config
    return None


def _kernels_2(shape: Mapping[str, Shape], bottlenecks: list[bool]) -> list[str]:
    """The paths of the 3x3 kernels of bottlenecks."""
    return [
        path
        for path in shape
        if path.startswith("layer")
        and path.endswith(".conv2.kernel")
        and len(shape[path]) == 4
        and bottlenecks[int(path.partition(".")[0][5:]) - 1]
    ]


def _most(numbers: Iterable[int]) -> int | None:
    votes = Counter(numbers).most_common(1)
    return votes[0][0] if votes else None


def _vote(shapes: Iterable[Shape]) -> int:
    """The most frequent size of the first dimension."""
    votes = Counter(shape[0] for shape in shapes if shape)
    return votes.most_common(1)[0][0] if votes else 1


def _width_per_group(inner: list[tuple[int, int]]) -> int:
    """The width_per_group for which ``width * width_per_group // 64`` is the number of channels per group in every stage.

    Args:
        inner: for each stage of bottlenecks, its width and its number of channels per group.
    """
    if all(count == width for width, count in inner):
        return 64
    return max(-(-count * 64 // max(width, 1)) for width, count in inner) or 1


def _shortcut(shape: Mapping[str, Shape], stages: list[str], bottleneck: bool, kept: bool) -> str | None:
    """The kind of shortcut; None if it cannot be inferred. ``kept``: the first stage keeps the shape of its input."""
    if any(".0.downsample.2." in path for path in shape):
        return "average"
    kernels = {path.split(".")[0] for path in shape if ".0.downsample.0." in path}
    norms = {path.split(".")[0] for path in shape if ".0.downsample.1." in path}
    if not kernels | norms:
        return "pad" if len(stages) > 1 and not bottleneck else None
    if not norms:
        return "conv"
    if any(path.endswith(".0.downsample.0.kernel") and shape[path][2:] == (3, 3) for path in shape):
        return "projection_3x3"
    return "projection_first" if kept and stages[0] in kernels | norms else "projection"


def row(config: ResNetConfig) -> str | None:
    """The name of the zoo's architecture of ``config``, regardless of :data:`zoo.FREE`; the closest if there are several."""
    return zoo.name_of(config)


def is_like(config: ResNetConfig, arch: str) -> bool:
    """Whether ``config`` is a configuration of ``arch``, regardless of :data:`zoo.FREE`."""
    return zoo.is_like(config, zoo.find(arch).config)


def describe(config: ResNetConfig) -> str:
    """Describes a configuration in one line."""
    stem, channels = STEMS[config.stem], config.in_channels
    kinds = f"{config.block} blocks" if isinstance(config.block, str) else f"{', '.join(config.block)} stages"
    size = f"{stem.kernel}x{stem.kernel}" if not stem.inner else config.stem.replace("_", " ")
    parts = [
        f"{kinds} {'-'.join(map(str, config.depths))}",
        f"widths {'-'.join(map(str, config.widths))}{' before pruning' if config.pruned else ''}",
        f"{size} stem for {channels} channel{'s' * (channels > 1)}",
        f"{config.shortcut} shortcuts",
    ]
    if (config.groups, config.width_per_group) != (1, 64):
        parts.append(f"{config.groups} group{'s' * (config.groups > 1)} of {config.width_per_group} channels")
    if config.reduce_first:
        parts.append(f"first convolutions of 1/{config.reduce_first} of the channels")
    if config.attention:
        parts.append(f"{config.attention.upper()} attention")
    if config.antialias:
        parts.append(f"strides by {config.antialias}")
    if config.norm:
        parts.append("GroupNorm")
    if config.conv_bias:
        parts.append("biased convolutions")
    if config.stem in ("cifar_pool", "imagenet_no_pool"):
        parts.append(f"{'a' if stem.pool else 'no'} max-pool")
    if config.stride_in != "3x3":
        parts.append(f"stride on the {config.stride_in} convolution")
    if config.output_stride:
        parts.append(f"dilated to output stride {config.output_stride}")
    return ", ".join([*parts, f"{config.num_classes:,} classes" if config.num_classes else "no head"])


def assumed(config: ResNetConfig, known: Collection[str] = ()) -> tuple[str, ...]:
    """The properties that neither keys nor shapes determine and that were assumed to be the usual ones; one phrase each.

    Args:
        config: configuration of the network.
        known: fields that the user chose or the checkpoint stated.
    """
    found = []
    stem = STEMS[config.stem]
    if stem.stride == 1 and "stem" not in known:
        found.append(f"stem at stride 1 with{'' if stem.pool else 'out'} max-pool")
    if "bottleneck" in config.blocks and "stride_in" not in known:
        found.append(f"stride on the {config.stride_in} convolution")
    if "output_stride" not in known:
        found.append("no dilation")
    if config.attention == "se":
        found.append("ReLU and sigmoid in the attention")
    return (*found, "ReLU after each block's sum")


def normalises_first(found: Found, shapes: Mapping[str, Shape]) -> bool:
    """Whether most blocks that change the width normalise their input, rather than the output of their first convolution."""
    votes = Counter()  # type: Counter[bool]
    for path, key in found.keys.items():
        norm = shapes.get(found.keys.get(path.removesuffix("conv1.kernel") + "bn1.scale", ""), ())
        if path.startswith("layer") and path.endswith(".conv1.kernel") and len(shapes[key]) == 4 and len(norm) == 1:
            outputs, inputs = shapes[key][:2]
            if inputs != outputs and norm[0] in (inputs, outputs):
                votes[norm[0] == inputs] += 1
    return votes[True] > votes[False]
