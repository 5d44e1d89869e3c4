"""Reads and writes ``config.json`` and ``preprocessor_config.json`` of transformers' ResNet (``microsoft/resnet-50``).

Source: ``ResNetConfig``, ``ResNetForImageClassification`` and ``ConvNextImageProcessor`` of huggingface/transformers. One
property cannot be inferred from the tensors: ``downsample_in_bottleneck`` puts the stride on the first 1x1 convolution.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from jresnet.errors import InputError, WeightsError
from jresnet.models.config import EXPANSION, ResNetConfig
from jresnet.weights.preprocessing import Preprocessing

# PIL's numbers of resampling filters, used in the entry `resample`.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}

# From this size on, ConvNextImageProcessor resizes to a square without keeping the aspect ratio, and does not crop.
_WARPED = 384


def network(config: Mapping[str, Any]) -> tuple[dict[str, Any], int | None, tuple[str, ...] | None]:
    """Reads the fields of a ResNetConfig, the number of classes and their names from a ``config.json``.

    Raises:
        WeightsError: the model is not a ResNet, or one that jresnet does not support; one message lists all problems.
    """
    if config.get("model_type") != "resnet":
        raise WeightsError(
            f"expected the configuration of a 'resnet' of the transformers library, got that of a "
            f"{reprlib.repr(config.get('model_type'))}"
        )
    problems = []

    def get(name: str, default: Any, kind: type) -> Any:
        value = config.get(name, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            problems.append(f"{name} should be a {kind.__name__}, not {reprlib.repr(value)}")
            return default
        return value

    def numbers(name: str, default: list[int]) -> list[int]:
        values = get(name, default, list)
        if not 0 < len(values) <= 100 or not all(type(value) is int and 0 < value <= 1 << 20 for value in values):
            problems.append(f"{name} should be whole numbers, not {reprlib.repr(values)}")
            return default
        return values

    block = get("layer_type", "bottleneck", str)
    if block not in EXPANSION:
        problems.append(f"layer_type should be 'basic' or 'bottleneck', not {reprlib.repr(block)}")
        block = "bottleneck"
    sizes, depths = numbers("hidden_sizes", [256, 512, 1024, 2048]), numbers("depths", [3, 4, 6, 3])
    if len(sizes) != len(depths):
        problems.append(f"there are {len(sizes)} hidden_sizes and {len(depths)} depths")
    expansion = EXPANSION[block]  # type: ignore[index]
    if any(size % expansion for size in sizes):
        problems.append(f"hidden_sizes {sizes} are not multiples of {expansion}")
    widths = tuple(size // expansion for size in sizes)
    if (embedding := get("embedding_size", 64, int)) != widths[0]:
        problems.append(f"embedding_size {embedding} is not the first stage's width, {widths[0]}")
    if (activation := config.get("hidden_act", "relu")) != "relu":
        problems.append(f"hidden_act should be 'relu', not {reprlib.repr(activation)}")
    if get("downsample_in_first_stage", False, bool):
        problems.append(
            "downsample_in_first_stage puts a stride into the first stage, which jresnet's networks do not have"
        )
    fields = {
        "block": block,
        "depths": tuple(depths),
        "widths": widths,
        "in_channels": get("num_channels", 3, int),
        "stem": "imagenet",
        "shortcut": "projection",
    }
    if get("downsample_in_bottleneck", False, bool) and block == "bottleneck":
        fields["stride_in"] = "1x1"
    elif block == "bottleneck":
        fields["stride_in"] = "3x3"
    num_classes, names = _classes(config, problems)
    if problems:
        raise WeightsError("; ".join(problems))
    return fields, num_classes, names


def _classes(config: Mapping[str, Any], problems: list[str]) -> tuple[int | None, tuple[str, ...] | None]:
    """The number of classes and their names, read as in ``PretrainedConfig``; None for a model without a head."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and "ResNetForImageClassification" not in architectures:
        return None, None
    labels = config.get("id2label")
    if labels is None:
        count = config.get("num_labels")
        return (count, None) if type(count) is int and count > 0 else (None, None)
    if not isinstance(labels, dict) or labels.keys() != {str(i) for i in range(len(labels))} or not labels:
        problems.append(f"id2label should name the classes from 0 on, not {reprlib.repr(labels)}")
        return None, None
    names = [labels[str(i)] for i in range(len(labels))]
    if not all(isinstance(name, str) and name.isprintable() and 0 < len(name) <= 1000 for name in names):
        problems.append(f"id2label should give printable texts, not {reprlib.repr(names)}")
        return None, None
    if names == [f"LABEL_{i}" for i in range(len(names))]:  # transformers' default, which means that there are no names
        return len(names), None
    return len(names), tuple(names)


def preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """Reads the preprocessing in a ``preprocessor_config.json`` of ConvNextImageProcessor, BitImageProcessor or similar.

    Raises:
        WeightsError: jresnet's preprocessing (resize the shorter side, crop the centre) cannot express it.
    """
    size, crop = config.get("size", 224), config.get("crop_size")
    if isinstance(size, dict):
        size = size.get("shortest_edge")
    if isinstance(crop, dict):
        crop = crop.get("height") if crop.get("height") == crop.get("width") else None
    problems = []
    if type(size) is not int or not 1 <= size <= 4096:
        problems.append(f"size should be a shortest_edge of 1 to 4096 pixels, not {reprlib.repr(config.get('size'))}")
        size = 224
    if config.get("do_resize") is False:
        problems.append("do_resize is false")
    share = config.get("crop_pct")
    resize = size
    if config.get("do_center_crop") is True:
        if type(crop) is not int or not 1 <= crop <= size:
            problems.append(f"crop_size should be a square within size, not {reprlib.repr(config.get('crop_size'))}")
            crop = size
    elif isinstance(share, int | float) and not isinstance(share, bool) and 0.01 <= share <= 1 and size < _WARPED:
        resize, crop = int(size / share), size
    else:
        problems.append("images are resized without keeping the aspect ratio, or not cropped")
        crop = size
    scale = config.get("rescale_factor", 1 / 255)
    if config.get("do_rescale") is False or not isinstance(scale, int | float) or abs(scale * 255 - 1) > 1e-3:
        problems.append(f"pixels should be scaled by 1/255, not {reprlib.repr(scale)}")
    mean, std = (_numbers(config.get(name), problems, name) for name in ("image_mean", "image_std"))
    if config.get("do_normalize") is False:
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    found = Preprocessing(resize, crop, mean, std, _RESAMPLE.get(config.get("resample", 2), "another filter"))  # type: ignore[arg-type]
    try:
        found.check()
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise WeightsError("; ".join(problems))
    return found


def _numbers(values: Any, problems: list[str], name: str) -> tuple[float, ...]:
    if not isinstance(values, list) or not values or not all(isinstance(value, int | float) for value in values):
        problems.append(f"{name} should be numbers, not {reprlib.repr(values)}")
        return (0.5,) * 3
    return tuple(values)


# --- Writing


def write(
    config: ResNetConfig, categories: Sequence[str] | None = None, chosen: Preprocessing | None = None
) -> dict[str, str]:
    """The JSON files that ``AutoModelForImageClassification.from_pretrained`` needs beside ``model.safetensors``.

    Args:
        config: configuration of a network that transformers has (:func:`jresnet.pytorch.statedict.check_dialect`).
        categories: the names of the classes; ``None``: transformers' default names ``LABEL_0``, ...
        chosen: the preprocessing; ``None``: do not write preprocessor_config.json.

    Returns:
        The text of each file, by name.
    """
    names = categories or [f"LABEL_{i}" for i in range(config.num_classes)]
    said = {
        "architectures": ["ResNetForImageClassification" if config.num_classes else "ResNetModel"],
        "model_type": "resnet",
        "num_channels": config.in_channels,
        "embedding_size": config.widths[0],
        "hidden_sizes": list(config.outputs),
        "depths": list(config.depths),
        "layer_type": config.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": config.stride_in == "1x1",
    }
    if config.num_classes:
        said["id2label"] = {str(i): name for i, name in enumerate(names)}
        said["label2id"] = {name: i for i, name in enumerate(names)}
    files = {"config.json": json.dumps(said, indent=2) + "\n"}
    if chosen is not None:
        resample = {name: number for number, name in _RESAMPLE.items()}[chosen.interpolation]
        size = chosen.crop if chosen.resize is None else chosen.resize
        about = {
            "image_processor_type": "BitImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": resample,
            "do_center_crop": True,
            "crop_size": {"height": chosen.crop, "width": chosen.crop},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(chosen.mean),
            "image_std": list(chosen.std),
        }
        files["preprocessor_config.json"] = json.dumps(about, indent=2) + "\n"
    return files
