"""Which ResNet a state_dict is, from its keys and shapes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from jresnet.errors import InputError
from jresnet.models import params, zoo
from jresnet.models.resnet import ResNetConfig
from jresnet.pytorch import keymap


def find_dialect(
    arch: str, keys: Collection[str], asked: str | None, chosen: Mapping[str, Any]
) -> tuple[str, ResNetConfig]:
    """The dialect in which the fewest keys are missing or unexpected, and the network's configuration in it."""
    own = zoo.configure(arch, **chosen)
    if asked is not None and asked not in keymap.DIALECTS:
        raise InputError(f"unknown dialect {asked!r}: there are {', '.join(keymap.DIALECTS)}")
    best: tuple[int, str, ResNetConfig] | None = None
    for name in [asked] if asked else keymap.DIALECTS:
        dialect = keymap.DIALECTS[name]
        shared = {field: value for field, value in dialect.config.items() if chosen.get(field) is None}
        foreign = [field for field in shared if field not in zoo.FREE and getattr(own, field) != shared[field]]
        if foreign or (shared.get("shortcut", own.shortcut) == "pad" and own.block != "basic"):
            continue  # this dialect has no such network
        config = dataclasses.replace(own, **shared)
        if dialect.num_classes and chosen.get("num_classes") is None:
            config = dataclasses.replace(config, num_classes=dialect.num_classes)
        expected = {keymap.torch_key(path, name) for path in params.shapes(config)}
        found = {key for key in keys if key.rpartition(".")[2] != keymap.COUNTER}
        aliases = {keymap.alias(key, name) for key in expected}
        distance = len(expected ^ (found - aliases))
        if best is None or distance < best[0]:
            best = distance, name, config
    if best is None:
        raise InputError(f"{asked} has no {arch}: leave the dialect out, or choose another architecture")
    return best[1:]


def sized(config: ResNetConfig, tensors: Mapping[str, Any], chosen: Mapping[str, Any], own_sizes: bool) -> ResNetConfig:
    """``config`` with the number of classes and channels of the file where others were asked for: both can be adapted.

    With ``own_sizes`` also where none was asked for.
    """
    head, kernel = (tuple(tensors[path].shape) if path in tensors else () for path in ("fc.kernel", "conv1.kernel"))
    asked = {name: chosen.get(name) is not None for name in ("num_classes", "in_channels")}
    if (asked["num_classes"] or own_sizes) and len(head) == 2 and head[0] > 0:
        config = dataclasses.replace(config, num_classes=head[0])
    if len(kernel) == 4 and (kernel[1] == 3 if asked["in_channels"] else own_sizes and kernel[1] > 0):
        config = dataclasses.replace(config, in_channels=kernel[1])
    return config


def architectures(arch: str, tensors: Mapping[str, Any]) -> list[str]:
    """The other architectures of which the file has every tensor; stem and head may be of any size."""
    got = {k: tuple(v.shape) for k, v in tensors.items() if k.rpartition(".")[2] != keymap.COUNTER}
    size = sum(math.prod(shape) for shape in got.values())
    found = []
    for name, row in zoo.ZOO.items():
        # Building a network takes a tenth of a second and more. Second names may double the size, a large head may too.
        if name == arch or not 0.75 * row.parameters < size < 2.5 * row.parameters:
            continue
        dialect, config = find_dialect(name, got.keys(), None, {})
        shapes = {keymap.torch_key(path, dialect): keymap.torch_shape(s) for path, s in params.shapes(config).items()}
        aliases = {keymap.alias(key, dialect) for key in shapes}
        same = sum(got.get(key) == shape for key, shape in shapes.items())
        if shapes.keys() == got.keys() - aliases and same >= len(shapes) - 3:  # the head has two tensors, the stem one
            found.append(name)
    return found


def advice(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, Any], paths: Mapping[str, str]) -> str:
    """The choices that would make stem and head fit, where the file tells."""
    hints = []
    for key, path in paths.items():
        shape, want = tuple(getattr(got.get(key), "shape", ())), expected[key]
        if path == "conv1.kernel" and len(shape) == 4 and shape != want:
            if shape[2] != want[2]:
                hints.append("stem='cifar'" if shape[2] == 3 else "stem='imagenet'")
            if shape[1] != want[1]:
                hints.append(f"in_channels={shape[1]}")
        if path == "fc.kernel" and len(shape) == 2 and shape[0] != want[0]:
            hints.append(f"num_classes={shape[0]}")
    return f". It may be meant for {', '.join(hints)}" if hints else ""
