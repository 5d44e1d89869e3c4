"""The table of architectures: one row per architecture.

Parameter counts are the published ones where available: torchvision's documentation for its ten networks, akamaster's
table and He et al.'s table 6 (both rounded) for the CIFAR family, timm 1.0.31's networks for its rows. The tests recount
every row. GMACs are 1e9 multiply-accumulates of convolutions and head for one image of the given size; ``tests/test_zoo.py``
computes them from the shapes.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from jresnet.errors import InputError
from jresnet.files import few
from jresnet.models.config import STEMS, Block, ResNetConfig
from jresnet.models.pruned import PRUNED_50D, PRUNED_101D

# Fields that the user may choose independently of the architecture
FREE = ("num_classes", "in_channels", "stem", "shortcut", "stride_in", "output_stride")


@dataclass(frozen=True)
class Row:
    """An architecture of the zoo."""

    name: str
    config: ResNetConfig
    parameters: int  # number of trainable parameters, with the row's number of classes
    image_size: int  # height and width in pixels that the architecture was designed for
    gmacs: float  # 1e9 multiply-accumulates for one image of that size
    source: str  # origin of the architecture


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


_PLAIN = (
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
    _cifar(8, 75_290, 0.0122),  # the smallest of the family, n = 1: for tests, tutorials and distillation
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

# Combinations of settings that timm's other networks share, named after the letters in the networks' names
BASIC, BOTTLENECK, MIXED = "basic", "bottleneck", ("basic", "basic", "bottleneck", "basic")
C = {"stem": "deep"}
D = C | {"shortcut": "average"}
S = C | {"stem_channels": 128}
T = {"stem": "deep_tiered", "shortcut": "average"}
SE, ECA = {"attention": "se"}, {"attention": "eca"}
RS = SE | {"reduction": 4, "stem": "deep_conv", "shortcut": "average"}
AA, BLUR = {"antialias": "average"}, {"antialias": "blur"}
G32X4, G32X8, G32X16, G32X32, G64X4 = (
    {"groups": groups, "width_per_group": width} for groups, width in ((32, 4), (32, 8), (32, 16), (32, 32), (64, 4))
)
AVERAGE, P3X3 = {"shortcut": "average"}, {"shortcut": "projection_3x3"}


def _timm(
    name: str,
    block: Any,
    depths: tuple[int, ...],
    parameters: int,
    gmacs: float,
    parts: Mapping[str, Any] = {},  # never modified
    size: int = 224,
    **more: Any,
) -> Row:
    config = ResNetConfig(block, depths, **parts, **more)
    return Row(name, config, parameters, size, gmacs, _source(config))


def _source(config: ResNetConfig) -> str:
    """The papers that describe a timm network, determined from its parts."""
    papers = [
        ("Bello et al. 2021, arXiv:2103.07579", config.stem == "deep_conv"),
        ("Aflalo et al. 2020, arXiv:2002.08258", config.pruned),
        ("Wang et al. 2020, arXiv:1910.03151", config.attention == "eca"),
        ("Hu et al. 2018, arXiv:1709.01507", config.attention == "se" and config.stem != "deep_conv"),
        ("Zhang 2019, arXiv:1904.11486", config.antialias == "blur"),
        ("Wu & He 2018, arXiv:1803.08494", config.norm == "group"),
        ("Xie et al. 2017, arXiv:1611.05431", config.groups > 1),
        ("He et al. 2019, arXiv:1812.01187", config.stem == "deep" or config.shortcut == "average"),
    ]
    found = [paper for paper, is_from in papers if is_from] or ["He et al. 2016, arXiv:1512.03385"]
    return f"{'; '.join(found[:2])}; timm"


# The networks of timm's models/resnet.py besides torchvision's ten, in the order of its source
_TIMM = (
    _timm("resnet10t", BASIC, (1, 1, 1, 1), 5_435_488, 0.7, T, size=176),
    _timm("resnet14t", BOTTLENECK, (1, 1, 1, 1), 10_081_632, 1.07, T, size=176),
    _timm("resnet18d", BASIC, (2, 2, 2, 2), 11_708_744, 2.05, D),
    _timm("resnet34d", BASIC, (3, 4, 6, 3), 21_816_904, 3.9, D),
    _timm("resnet26", BOTTLENECK, (2, 2, 2, 2), 15_995_176, 2.34),
    _timm("resnet26t", BOTTLENECK, (2, 2, 2, 2), 16_011_872, 3.33, T, size=256),
    _timm("resnet26d", BOTTLENECK, (2, 2, 2, 2), 16_014_408, 2.58, D),
    _timm("resnet50c", BOTTLENECK, (3, 4, 6, 3), 25_576_264, 4.33, C),
    _timm("resnet50d", BOTTLENECK, (3, 4, 6, 3), 25_576_264, 4.33, D),
    _timm("resnet50s", BOTTLENECK, (3, 4, 6, 3), 25_680_808, 5.44, S),
    _timm("resnet50t", BOTTLENECK, (3, 4, 6, 3), 25_573_728, 4.3, T),
    _timm("resnet101c", BOTTLENECK, (3, 4, 23, 3), 44_568_392, 8.04, C),
    _timm("resnet101d", BOTTLENECK, (3, 4, 23, 3), 44_568_392, 10.5, D, size=256),
    _timm("resnet101s", BOTTLENECK, (3, 4, 23, 3), 44_672_936, 9.16, S),
    _timm("resnet152c", BOTTLENECK, (3, 8, 36, 3), 60_212_040, 11.75, C),
    _timm("resnet152d", BOTTLENECK, (3, 8, 36, 3), 60_212_040, 15.35, D, size=256),
    _timm("resnet152s", BOTTLENECK, (3, 8, 36, 3), 60_316_584, 12.87, S),
    _timm("resnet200", BOTTLENECK, (3, 24, 36, 3), 64_673_832, 15.01),
    _timm("resnet200d", BOTTLENECK, (3, 24, 36, 3), 64_693_064, 19.91, D, size=256),
    _timm("resnet50_gn", BOTTLENECK, (3, 4, 6, 3), 25_557_032, 4.09, norm="group"),
    _timm("resnext50d_32x4d", BOTTLENECK, (3, 4, 6, 3), 25_048_136, 4.47, G32X4 | D),
    _timm("resnext101_32x4d", BOTTLENECK, (3, 4, 23, 3), 44_177_704, 7.97, G32X4),
    _timm("resnext101_32x16d", BOTTLENECK, (3, 4, 23, 3), 194_026_792, 36.16, G32X16),
    _timm("resnext101_32x32d", BOTTLENECK, (3, 4, 23, 3), 468_530_472, 87.11, G32X32),
    _timm("ecaresnet26t", BOTTLENECK, (2, 2, 2, 2), 16_011_916, 3.33, ECA | T, size=256),
    _timm("ecaresnet50d", BOTTLENECK, (3, 4, 6, 3), 25_576_350, 4.33, ECA | D),
    _timm("ecaresnet50d_pruned", BOTTLENECK, (3, 4, 6, 3), 19_939_713, 2.52, ECA | D, pruned=PRUNED_50D),
    _timm("ecaresnet50t", BOTTLENECK, (3, 4, 6, 3), 25_573_814, 5.61, ECA | T, size=256),
    _timm("ecaresnetlight", BOTTLENECK, (1, 1, 11, 3), 30_162_046, 4.09, ECA | AVERAGE),
    _timm("ecaresnet101d", BOTTLENECK, (3, 4, 23, 3), 44_568_563, 8.04, ECA | D),
    _timm("ecaresnet101d_pruned", BOTTLENECK, (3, 4, 23, 3), 24_876_040, 3.46, ECA | D, pruned=PRUNED_101D),
    _timm("ecaresnet200d", BOTTLENECK, (3, 24, 36, 3), 64_693_400, 19.91, ECA | D, size=256),
    _timm("ecaresnet269d", BOTTLENECK, (3, 30, 48, 8), 102_093_077, 41.36, ECA | D, size=320),
    _timm("ecaresnext26t_32x4d", BOTTLENECK, (2, 2, 2, 2), 15_406_220, 2.68, ECA | G32X4 | T),
    _timm("ecaresnext50t_32x4d", BOTTLENECK, (3, 4, 6, 3), 25_045_686, 4.44, ECA | G32X4 | T),
    _timm("seresnet18", BASIC, (2, 2, 2, 2), 11_779_624, 1.81, SE),
    _timm("seresnet34", BASIC, (3, 4, 6, 3), 21_960_416, 3.66, SE),
    _timm("seresnet50", BOTTLENECK, (3, 4, 6, 3), 28_088_024, 4.09, SE),
    _timm("seresnet50t", BOTTLENECK, (3, 4, 6, 3), 28_104_720, 4.3, SE | T),
    _timm("seresnet101", BOTTLENECK, (3, 4, 23, 3), 49_326_872, 7.81, SE),
    _timm("seresnet152", BOTTLENECK, (3, 8, 36, 3), 66_821_848, 11.52, SE),
    _timm("seresnet152d", BOTTLENECK, (3, 8, 36, 3), 66_841_080, 15.36, SE | D, size=256),
    _timm("seresnet200d", BOTTLENECK, (3, 24, 36, 3), 71_855_096, 19.92, SE | D, size=256),
    _timm("seresnet269d", BOTTLENECK, (3, 30, 48, 8), 113_672_760, 26.49, SE | D, size=256),
    _timm("seresnext26d_32x4d", BOTTLENECK, (2, 2, 2, 2), 16_809_512, 2.71, SE | G32X4 | D),
    _timm("seresnext26t_32x4d", BOTTLENECK, (2, 2, 2, 2), 16_806_976, 2.68, SE | G32X4 | T),
    _timm("seresnext50_32x4d", BOTTLENECK, (3, 4, 6, 3), 27_559_896, 4.23, SE | G32X4),
    _timm("seresnext101_32x4d", BOTTLENECK, (3, 4, 23, 3), 48_955_416, 7.97, SE | G32X4),
    _timm("seresnext101_32x8d", BOTTLENECK, (3, 4, 23, 3), 93_569_048, 16.42, SE | G32X8),
    _timm("seresnext101d_32x8d", BOTTLENECK, (3, 4, 23, 3), 93_588_280, 16.66, SE | G32X8 | D),
    _timm("seresnext101_64x4d", BOTTLENECK, (3, 4, 23, 3), 88_232_984, 15.47, SE | G64X4),
    _timm("senet154", BOTTLENECK, (3, 8, 36, 3), 115_088_984, 20.69, SE | G64X4 | S | P3X3, reduce_first=2),
    _timm("resnetblur18", BASIC, (2, 2, 2, 2), 11_689_512, 2.33, BLUR),
    _timm("resnetblur50", BOTTLENECK, (3, 4, 6, 3), 25_557_032, 5.13, BLUR),
    _timm("resnetblur50d", BOTTLENECK, (3, 4, 6, 3), 25_576_264, 5.37, D | BLUR),
    _timm("resnetblur101d", BOTTLENECK, (3, 4, 23, 3), 44_568_392, 9.08, D | BLUR),
    _timm("resnetaa34d", BASIC, (3, 4, 6, 3), 21_816_904, 4.42, D | AA),
    _timm("resnetaa50", BOTTLENECK, (3, 4, 6, 3), 25_557_032, 5.13, AA),
    _timm("resnetaa50d", BOTTLENECK, (3, 4, 6, 3), 25_576_264, 5.37, D | AA),
    _timm("resnetaa101d", BOTTLENECK, (3, 4, 23, 3), 44_568_392, 9.08, D | AA),
    _timm("seresnetaa50d", BOTTLENECK, (3, 4, 6, 3), 28_107_256, 5.37, SE | D | AA),
    _timm("seresnextaa101d_32x8d", BOTTLENECK, (3, 4, 23, 3), 93_588_280, 28.39, SE | G32X8 | D | AA, size=288),
    _timm("seresnextaa201d_32x8d", BOTTLENECK, (3, 24, 36, 4), 149_394_904, 100.71, SE | G32X8 | D | S | AA, size=384),
    _timm("resnetrs50", BOTTLENECK, (3, 4, 6, 3), 35_691_912, 2.28, RS, size=160),
    _timm("resnetrs101", BOTTLENECK, (3, 4, 23, 3), 63_618_696, 6.01, RS, size=192),
    _timm("resnetrs152", BOTTLENECK, (3, 8, 36, 3), 86_621_576, 15.53, RS, size=256),
    _timm("resnetrs200", BOTTLENECK, (3, 24, 36, 3), 93_209_992, 20.09, RS, size=256),
    _timm("resnetrs270", BOTTLENECK, (4, 29, 53, 4), 129_861_448, 26.95, RS, size=256),
    _timm("resnetrs350", BOTTLENECK, (4, 36, 72, 4), 163_956_168, 43.49, RS, size=288),
    _timm("resnetrs420", BOTTLENECK, (4, 44, 87, 4), 191_891_656, 63.94, RS, size=320),
    _timm("test_resnet", MIXED, (1, 1, 1, 1), 469_688, 0.1025, D, size=160, widths=(32, 48, 48, 96)),
)  # fmt: skip

ZOO: dict[str, Row] = {row.name: row for row in (*_PLAIN, *_TIMM)}
IN_TIMM = frozenset(row.name for row in (*_PLAIN[:10], *_TIMM))  # networks that timm has under the same name


def find(arch: str) -> Row:
    """The row of an architecture.

    Raises:
        InputError: unknown name; the message suggests similar ones.
    """
    if not isinstance(arch, str):
        raise InputError(f"the name of an architecture must be a string such as 'resnet50', got {arch!r}")
    if arch in ZOO:
        return ZOO[arch]
    beginnings = [name for name in ZOO if arch and name.startswith(arch.lower())]
    # An untrusted file may state a name of megabytes; difflib needs 130 times as much memory.
    near = beginnings[:3] or difflib.get_close_matches(arch[:80].lower(), ZOO, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {few(ZOO)} (jresnet.list_models)"
    raise InputError(f"unknown architecture {arch[:80]!r}: {hint}")


def name_of(config: ResNetConfig) -> str | None:
    """The name of the row that ``config`` belongs to, regardless of the fields in :data:`FREE`; None if there is none."""

    # Among several matching rows, stem and shortcut decide: four rows of the zoo match a resnet50.
    return max(
        (row.name for row in ZOO.values() if is_like(config, row.config)),
        key=lambda name: [getattr(ZOO[name].config, field) == getattr(config, field) for field in _TELLING],
        default=None,
    )


_TELLING = ("shortcut", "stem", "stride_in", "in_channels", "num_classes")


def is_like(config: ResNetConfig, own: ResNetConfig) -> bool:
    """Whether ``config`` equals ``own`` except for the fields in :data:`FREE`; deep stems must be equal, too."""

    def told(config: ResNetConfig) -> dict[str, Any]:
        stem = STEMS[config.stem]
        return {
            "stem": (stem.inner, stem.inner and stem.pool, config.stem_outputs),
            "blocks": config.blocks,
            **{name: getattr(config, name) for name in _FIXED},
        }

    return told(config) == told(own)


_FIXED = tuple(
    field.name for field in dataclasses.fields(ResNetConfig) if field.name not in (*FREE, "block", "stem_channels")
)


def configure(arch: str, **chosen: Any) -> ResNetConfig:
    """The configuration of ``arch``, with the given fields (:data:`FREE`) replaced unless they are None.

    Raises:
        InputError: unknown architecture, or values out of range; one message lists all.
    """
    return replaced(find(arch).config, **chosen)


def replaced(config: ResNetConfig, **chosen: Any) -> ResNetConfig:
    """``config`` with the given fields replaced unless they are None; numpy integers are converted to Python's."""
    # num_classes is often labels.max() + 1, a numpy integer, which cannot be written as JSON
    plain: dict[str, Any] = {
        name: int(value) if isinstance(value, Integral) and type(value) is not bool else value
        for name, value in chosen.items()
    }
    return dataclasses.replace(config, **{name: value for name, value in plain.items() if value is not None})
