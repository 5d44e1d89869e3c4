"""Reads what a checkpoint states about its network besides the tensors, and converts it to fields of the configuration.

Networks with the same tensors may compute different functions: the stride may be in another convolution, a stage may be
dilated, there may be an additional pool or another activation. Training scripts store their arguments, and a module that was
saved as a whole stores each layer's settings. These statements are used if jresnet supports them; otherwise the checkpoint
is refused with a message that names the statement.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jresnet.files import printable
from jresnet.models import zoo
from jresnet.models.config import STEMS, ResNetConfig
from jresnet.pytorch import keymap

# Names under which scripts store their arguments: argparse's args, Lightning's hyper_parameters, timm's model_args, ...
_BOXES = (
    "args", "arguments", "hyper_parameters", "hparams", "hparams_initial", "config", "cfg", "conf", "opt", "opts", "options",
    "params", "model_args", "model_kwargs", "model_config", "model_cfg", "kwargs", "meta", "model", "backbone", "encoder",
)  # fmt: skip

# Names of the argument that names the network, the most reliable first.
_NAMES = (
    "arch", "architecture", "model_name", "model_arch", "net_type", "network", "backbone_name", "encoder_name", "base_model",
    "backbone", "encoder", "model", "net", "type",
)  # fmt: skip

# Names of networks whose function jresnet does not support, even if the tensors match.
_OTHER = (
    (r"resne(x)?t(aa|blur)", "averages or blurs before its strides"),
    (r"pre_?act|resnet_?v2", "normalises before it convolves (pre-activation)"),
    (r"(^|[_\W])(se|sk|eca|gc|cbam|bam)_?resne|^senet", "has attention in its blocks"),
    (r"resnest|res2ne", "has other blocks"),
    (r"resnet_?v1[cde]", "has a deep stem or averages in its shortcuts"),
    (r"resne(x)?t\d+\w*[_-](gn|ibn)", "has other normalisation than BatchNorm"),
)

DILATIONS = {
    (1, 1, 1, 2): 1,
    (1, 1, 2, 4): 2,
    (1, 2, 4, 8): 3,
}  # dilations of mmlab's stages -> number of dilated stages at the end

_POOLS = {"BlurPool2d": "blur", "AvgPool2d": "average"}  # timm's modules for anti-aliasing

_ACTIVATIONS = re.compile(
    r"(gelu\w*|silu|(hard_?)?swish|mish|leaky_?relu|prelu|rrelu|elu|selu|celu|relu6|softplus|tanh)", re.IGNORECASE
)


@dataclass
class Statement:
    """The statements of a checkpoint: a name, fields of ResNetConfig, and properties that jresnet does not support."""

    name: str = ""  # name of the network; empty if there is none
    # stride_in, output_stride, antialias and norm as in ResNetConfig; "pool": whether the stem has one; "dilated": how many
    # stages at the end are dilated
    chosen: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)  # one phrase per chosen field that says where it was stated
    refused: list[str] = field(default_factory=list)  # phrases that continue the sentence "its network ..."

    def choose(self, name: str, value: Any, why: str) -> None:
        if name not in self.chosen:
            self.chosen[name] = value
            self.said.append(why)


def read(saved: Any) -> Statement:
    """Reads the statements in the plain entries of a checkpoint, which is untrusted."""
    found = Statement()
    for arguments in _arguments(saved):
        for name in _NAMES:
            value = arguments.get(name)
            if not isinstance(value, str) or not 0 < len(value) <= 200:
                continue
            if name in _NAMES[:4] or re.search("resne|senet|preact", value, re.I):  # others may name a method or a loss
                _read_name(printable(value), found)
        for name, value in arguments.items():
            if isinstance(name, str):
                _read_setting(name, value, arguments, found)
    return found


def _arguments(saved: Any) -> Iterator[Mapping[Any, Any]]:
    """Yields the mappings in a checkpoint that may contain arguments, the checkpoint itself first."""
    if not isinstance(saved, Mapping):
        return
    level: list[Mapping[Any, Any]] = [saved]
    for _ in range(4):
        inside: list[Mapping[Any, Any]] = []
        for node in level:
            if not any(hasattr(value, "shape") for value in node.values()):
                yield node
            for name in _BOXES:
                value = node.get(name)
                if isinstance(value, Mapping):
                    inside.append(value)
                elif isinstance(value, str) and "backbone" in value:  # mmlab stores its configuration as Python text
                    inside.append(_of_text(value))
        level = inside


def _of_text(text: str) -> dict[str, Any]:
    """Parses the arguments in ``backbone=dict(type='ResNet', depth=50, style='caffe', ...)``."""
    begin = re.search(r"backbone\s*=\s*dict\(", text[: 1 << 20])
    if not begin:
        return {}
    level, at = 1, begin.end()
    while at < len(text) and level and at < begin.end() + 4000:
        level += (text[at] == "(") - (text[at] == ")")
        at += 1
    found: dict[str, Any] = {}
    for name, value in re.findall(
        r"(\w+)\s*=\s*('[^']*'|\"[^\"]*\"|\([\d, ]*\)|True|False|\d+)", text[begin.end() : at]
    ):
        if value[0] in "'\"":
            found.setdefault(name, value[1:-1])
        elif value[0] == "(":
            found.setdefault(name, tuple(int(number) for number in re.findall(r"\d{1,9}", value)))
        else:
            found.setdefault(name, {"True": True, "False": False}.get(value, value))
    return found


def _read_name(name: str, found: Statement) -> None:
    for pattern, what in _OTHER if name not in zoo.ZOO else ():
        if re.search(pattern, name, re.I):
            phrase = f"is a {name}, which {what}"
            found.refused += [phrase] if phrase not in found.refused else []
    if row := zoo.ZOO.get(name):
        for part in ("antialias", "norm"):
            if (value := getattr(row.config, part)) is not None:
                found.choose(part, value, f"{part} {value!r}, as it is a {name}")
    if "caffe" in name.lower():
        found.choose("stride_in", "1x1", f"stride on the 1x1 convolution, as it is a {name}")
    if name.lower() not in ("resnet", "resnext"):  # the names of mmpretrain's and others' classes
        found.name = found.name or name


def _read_setting(name: str, value: Any, arguments: Mapping[Any, Any], found: Statement) -> None:
    text = f"{name}={value!r:.60}"
    match name:
        case "style" if value in ("caffe", "pytorch"):
            found.choose("stride_in", "1x1" if value == "caffe" else "3x3", f"{text}")
        case "stride_in_1x1" | "STRIDE_IN_1X1" | "downsample_in_bottleneck" if isinstance(value, bool):
            found.choose("stride_in", "1x1" if value else "3x3", text)
        case "replace_stride_with_dilation" if isinstance(value, list | tuple) and any(value):
            dilated = [bool(one) for one in value]
            if dilated == sorted(dilated):  # the last ones
                found.choose("dilated", sum(dilated), text)
            else:
                found.refused.append(f"is dilated before a stage that is not ({text})")
        case "output_stride" if type(value) is int and 0 < value <= 1024:
            found.choose("output_stride", value, text)
        case "dilations" if _are_numbers(value) and set(value) != {1}:
            # In mmlab all blocks of a stage are dilated. In torchvision the first block has the dilation of the previous
            # stage, which mmlab calls contract_dilation.
            stages = DILATIONS.get(tuple(value))
            if stages and arguments.get("contract_dilation") is True:
                found.choose("dilated", stages, text)
            else:
                found.refused.append(f"is dilated in another way than torchvision's ({text})")
        case "strides" if (
            _are_numbers(value) and 1 in value[1:] and arguments.get("dilations") in (None, (1,) * len(value))
        ):
            found.refused.append(f"has a stage at stride 1 ({text})")
        case "last_stride" if value == 1:
            found.refused.append(f"has its last stage at stride 1 ({text})")
        case "preact" | "pre_act" | "preactivation" | "pre_activation" if value is True:
            found.refused.append(f"normalises before it convolves ({text})")
        case "deep_stem" | "avg_down" | "use_se" | "se" | "use_cbam" | "antialias" | "anti_alias" if value is True:
            found.refused.append(f"has {name.replace('_', ' ')} ({text})")
        case "stem_type" | "aa_layer" | "attn_layer" if isinstance(value, str) and value:
            found.refused.append(f"has another stem, anti-aliasing or attention ({text})")
        case "act_layer" | "activation" | "hidden_act" | "act" if isinstance(value, str) and _ACTIVATIONS.fullmatch(
            value
        ):
            found.refused.append(f"has another activation than ReLU ({text})")
        case "no_max_pool" | "no_maxpool" | "remove_maxpool" if isinstance(value, bool):
            found.choose("pool", not value, text)
        case "max_pool" | "maxpool" | "use_maxpool" | "first_pool" if isinstance(value, bool):
            found.choose("pool", value, text)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and 0 < len(value) <= 16 and all(type(one) is int for one in value)


# --- A module that was saved as a whole


def layers(
    settings: Mapping[str, Mapping[str, Any]], keys: Mapping[str, str], prefix: str
) -> dict[str, dict[str, Any]]:
    """The settings of each layer by jresnet's path: ``layer2.0.conv1`` -> ``{"stride": (2, 2), ...}``.

    Args:
        settings: the settings of a :class:`jresnet.pytorch.torchfile.Module`.
        keys: maps jresnet's paths to the file's keys, for the body.
        prefix: prefix of the network in the file; the max-pool is found there under its usual names.

    Returns:
        Settings by path; those of modules without a path in jresnet by ``(name)``.
    """
    plain = {keymap.BETWEEN.sub("", f"{name}.").removesuffix("."): value for name, value in settings.items()}
    found = {}
    for path, key in keys.items():
        if (said := plain.get(key.rpartition(".")[0])) is not None:
            found[path.rpartition(".")[0]] = dict(said)
    for name in ("maxpool", "pool", "max_pool"):
        if (said := plain.get(prefix + name)) is not None:
            found["maxpool"] = dict(said)
    for name, said in plain.items():
        if name.startswith(prefix) and not name.startswith("__"):
            found.setdefault(f"({name})", dict(said))
    return found


def of_layers(said: Mapping[str, Mapping[str, Any]], config: ResNetConfig) -> Statement:
    """Reads strides, dilation and pool from a module's layers, although its unknown forward method may differ."""
    found, stages = Statement(), len(config.depths)
    if "bottleneck" in config.blocks:
        strides = [
            [_pair(said.get(f"layer{i}.0.conv{j}", {}).get("stride")) for j in (1, 2)] for i in range(2, stages + 1)
        ]
        if [(2, 2), (1, 1)] in strides:
            found.choose("stride_in", "1x1", "stride on the 1x1 convolution")
        elif [(1, 1), (2, 2)] in strides:
            found.choose("stride_in", "3x3", "stride on the 3x3 convolution")
    if pool := said.get("maxpool"):
        has = not str(pool.get("class")).endswith("Identity")
        found.choose("pool", has, "a max-pool behind the stem" if has else "no max-pool behind the stem")
    for path, layer in said.items():
        kind = str(layer.get("class")).rpartition(".")[2]
        if path.endswith(".aa)") and kind in _POOLS:
            found.choose("antialias", _POOLS[kind], f"strides by {kind}")
        elif path.rpartition(".")[2].startswith("bn") and kind == "GroupNorm":
            found.choose("norm", "group", "GroupNorm")
    dilated = [_pair(said.get(f"layer{i}.0.downsample.0", {}).get("stride")) for i in range(2, stages + 1)]
    if (count := dilated.count((1, 1))) and dilated[-count:] == [(1, 1)] * count:
        found.choose(
            "dilated", count, f"dilation in the last {count} stages" if count > 1 else "dilation in the last stage"
        )
    return found


def contradictions(said: Mapping[str, Mapping[str, Any]], config: ResNetConfig) -> list[str]:
    """The differences between a module's layers and ``config``; the first one of each kind."""
    problems: dict[str, str] = {}
    for path, layer in said.items():
        if path.startswith("("):
            name, kind = path[1:-1] or "it", str(layer.get("class"))
            if _ACTIVATIONS.fullmatch(kind.rpartition(".")[2]) and ".activation." in kind:
                problems.setdefault("activation", f"{name} is a {kind.rpartition('.')[2]}")
            if re.search(r"pre_?act", kind, re.I):
                problems.setdefault("class", f"{name} is a {kind}, pre-activation")
            continue
        usual = dict(zip(("stride", "dilation"), _stride(path, config) or (None, None), strict=True))
        for name, value in (usual | {"eps": 1e-5, "padding_mode": "zeros"}).items():
            own = _pair(layer.get(name)) if name in usual else layer.get(name)
            if value is not None and own is not None and own != value:
                problems.setdefault(name, f"{path} has {name} {own}, not {value}")
    return list(problems.values())


def _pair(value: Any) -> tuple[int, ...] | None:
    if type(value) is int:
        return (value, value)
    return value if isinstance(value, tuple) and len(value) == 2 else None


def _stride(path: str, config: ResNetConfig) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Stride and dilation of a convolution of ``config``; None for other layers."""
    parts = path.split(".")
    if parts == ["conv1"]:
        return (STEMS[config.stem].stride,) * 2, (1, 1)
    if not parts[0].startswith("layer") or "bn" in parts[2]:
        return None
    if parts[2] == "downsample" and parts[3] != ("1" if config.shortcut == "average" else "0"):
        return None
    stage, first = int(parts[0][5:]) - 1, parts[1] == "0"
    stride, dilation = config.strides[stage]
    basic = config.blocks[stage] == "basic"
    carries = "conv1" if basic or config.stride_in == "1x1" else "conv2"
    carries = "aa" if config.antialias else carries
    strided = first and parts[2] in (carries, "downsample") and parts[2:] != ["downsample", "1"]
    wide = parts[2] == "conv2" or (parts[2] == "conv1" and basic)
    begins = first and parts[2] == ("conv1" if basic else "conv2")
    if wide and begins:  # the first 3x3 of a stage has the dilation of the previous stage
        dilation = config.strides[stage - 1][1] if stage else 1
    return (stride if strided else 1,) * 2, (dilation if wide else 1,) * 2


def fields(chosen: Mapping[str, Any], config: ResNetConfig) -> dict[str, Any]:
    """Converts the choices of a :class:`Statement` to fields of a configuration like ``config``."""
    found = {
        name: value for name, value in chosen.items() if name in ("stride_in", "output_stride", "antialias", "norm")
    }
    if "bottleneck" not in config.blocks:
        found.pop("stride_in", None)  # scripts state the option for all networks
    if (pool := chosen.get("pool")) is not None:
        stem = STEMS[config.stem]
        if bool(stem.pool) != pool:  # deep stems always have a pool, so that none is found here
            wanted = (stem.kernel, stem.stride, "max" if pool else None, stem.inner)
            found["stem"] = next((name for name, kind in STEMS.items() if kind == wanted), config.stem)
            config = dataclasses.replace(config, stem=found["stem"])
    if stages := chosen.get("dilated"):
        found.setdefault("output_stride", config.full_stride >> stages)
    return found
