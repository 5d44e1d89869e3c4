"""The architectures: one frozen row each, as data.

Parameter counts are published ones where there are any: torchvision's documentation for its ten, akamaster's table and
He et al.'s table 6 (both rounded) for the CIFAR family; the tests recount every row. GMACs are multiply-accumulates of
convolutions and head, for one image of the size given, counted by ``tests/test_zoo.py`` from the shapes.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

import numpy as np

from jresnet.errors import InputError
from jresnet.models.config import Block, ResNetConfig

# What may be chosen apart from an architecture's row
FREE = ("num_classes", "in_channels", "stem", "shortcut", "stride_in", "output_stride")


@dataclass(frozen=True)
class Row:
    """An architecture of the zoo."""

    name: str
    config: ResNetConfig
    parameters: int  # trainable numbers, with the row's own number of classes
    image_size: int  # pixels, height and width it was designed for
    gmacs: float  # 1e9 multiply-accumulates for one image of that size
    source: str  # where the architecture comes from


HE = "He et al. 2016, arXiv:1512.03385, table 1; torchvision"
HE_CIFAR = "He et al. 2016, arXiv:1512.03385, section 4.2; akamaster/pytorch_resnet_cifar10"
RESNEXT = "Xie et al. 2017, arXiv:1611.05431; torchvision"
WIDE = "Zagoruyko & Komodakis 2016, arXiv:1605.07146; torchvision"


def _imagenet(name: str, block: Block, depths: tuple[int, ...], parameters: int, gmacs: float, source: str, **more):
    return Row(name, ResNetConfig(block, depths, **more), parameters, 224, gmacs, source)


def _cifar(depth: int, parameters: int, gmacs: float) -> Row:
    n = (depth - 2) // 6  # 6n + 2 layers: three stages of n blocks of two, a stem and a head
    config = ResNetConfig("basic", (n, n, n), (16, 32, 64), num_classes=10, stem="cifar", shortcut="pad")
    return Row(f"resnet{depth}_cifar", config, parameters, 32, gmacs, HE_CIFAR)


_ROWS = (
    _imagenet("resnet18", "basic", (2, 2, 2, 2), 11_689_512, 1.81, HE),
    _imagenet("resnet34", "basic", (3, 4, 6, 3), 21_797_672, 3.66, HE),
    _imagenet("resnet50", "bottleneck", (3, 4, 6, 3), 25_557_032, 4.09, HE),
    _imagenet("resnet101", "bottleneck", (3, 4, 23, 3), 44_549_160, 7.80, HE),
    _imagenet("resnet152", "bottleneck", (3, 8, 36, 3), 60_192_808, 11.51, HE),
    _imagenet("resnext50_32x4d", "bottleneck", (3, 4, 6, 3), 25_028_904, 4.23, RESNEXT, groups=32, width_per_group=4),
    _imagenet(
        "resnext101_32x8d", "bottleneck", (3, 4, 23, 3), 88_791_336, 16.41, RESNEXT, groups=32, width_per_group=8
    ),
    _imagenet(
        "resnext101_64x4d", "bottleneck", (3, 4, 23, 3), 83_455_272, 15.46, RESNEXT, groups=64, width_per_group=4
    ),
    _imagenet("wide_resnet50_2", "bottleneck", (3, 4, 6, 3), 68_883_240, 11.40, WIDE, width_per_group=128),
    _imagenet("wide_resnet101_2", "bottleneck", (3, 4, 23, 3), 126_886_696, 22.75, WIDE, width_per_group=128),
    _cifar(8, 75_290, 0.0122),  # the family's least, n = 1: for tests, tutorials and distillation
    _cifar(20, 269_722, 0.0406),
    _cifar(32, 464_154, 0.0689),
    _cifar(44, 658_586, 0.0972),
    _cifar(56, 853_018, 0.1255),
    _cifar(110, 1_727_962, 0.2529),
    _cifar(1202, 19_421_274, 2.8292),
    _imagenet(
        "resnet34_projection",
        "basic",
        (3, 4, 6, 3),
        21_801_896,
        3.68,
        "resnet34, taught with a projection in every stage",
        shortcut="projection_first",
    ),
    Row(
        "resnet18_d2l",
        ResNetConfig("basic", (2, 2, 2, 2), num_classes=10, in_channels=1, shortcut="conv", conv_bias=True),
        11_178_378,
        96,
        0.3187,
        "Dive into Deep Learning, section 8.6",
    ),
)

ZOO: dict[str, Row] = {row.name: row for row in _ROWS}


def find(arch: str) -> Row:
    """The row of an architecture.

    Raises:
        InputError: for an unknown name; the message suggests the nearest ones.
    """
    if not isinstance(arch, str):
        raise InputError(f"an architecture is named by a text such as 'resnet50', got {arch!r}")
    if arch in ZOO:
        return ZOO[arch]
    beginnings = [name for name in ZOO if arch and name.startswith(arch.lower())]
    # A stranger's file may state a name of megabytes, for each of which difflib takes 130.
    near = beginnings[:3] or difflib.get_close_matches(arch[:80].lower(), ZOO, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(ZOO)}"
    raise InputError(f"unknown architecture {arch[:80]!r}: {hint}")


def name_of(config: ResNetConfig) -> str | None:
    """The row that ``config`` is of, whatever those of its fields say that may be chosen; None if of none."""

    told = [field.name for field in dataclasses.fields(ResNetConfig)]

    def row(*free: str) -> str | None:
        fields = [name for name in told if name not in free]
        alike = (row.name for row in ZOO.values() if all(getattr(row.config, f) == getattr(config, f) for f in fields))
        return next(alike, None)

    # A row is told by its shortcut where it can be: the zoo has a resnet34 of two kinds.
    return row(*(name for name in FREE if name != "shortcut")) or row(*FREE)


def configure(arch: str, **chosen: Any) -> ResNetConfig:
    """The configuration of ``arch`` with those of the chosen fields (:data:`FREE`) that are not None replaced.

    Raises:
        InputError: for an unknown architecture or a value out of range; all of them at once.
    """
    return replaced(find(arch).config, **chosen)


def replaced(config: ResNetConfig, **chosen: Any) -> ResNetConfig:
    """``config`` with those values that are not None in place of its own; numpy's whole numbers are taken as Python's."""
    # labels.max() + 1 is a likely number of classes, and a configuration is written as JSON
    plain: dict[str, Any] = {
        name: int(value) if isinstance(value, np.integer) else value for name, value in chosen.items()
    }
    return dataclasses.replace(config, **{name: value for name, value in plain.items() if value is not None})
