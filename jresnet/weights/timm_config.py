"""Reads ``config.json`` of a repository or folder, in the format of timm (``timm.models._hub.save_config_for_hf``) or of
transformers' ResNet (:mod:`jresnet.weights.transformers_config`).

**Preprocessing** in timm's format is read as timm's ``validate.py`` does, with which timm's published results were computed:
``create_transform(**resolve_model_data_config(model, use_test_size=True), is_training=False)``. The shorter side is resized
to ``floor(size / crop_pct)`` and a centre square of ``size`` is cropped. ``test_input_size`` and ``test_crop_pct`` are used
if the configuration has them, else ``input_size`` and ``crop_pct``.
"""

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jresnet.errors import InputError, WeightsError
from jresnet.models import zoo
from jresnet.weights import transformers_config
from jresnet.weights.preprocessing import Preprocessing

MAX_BYTES = 4 << 20  # a table of 21,841 names takes 1 MB


class Described(NamedTuple):
    """The content of a ``config.json``; all fields are None if there is no file, or its format is unknown."""

    arch: str | None = None  # a name in the zoo
    num_classes: int | None = None  # 0: the weights have no head
    preprocessing: Preprocessing | None = None
    categories: tuple[str, ...] | None = None  # in the order of the logits
    # fields of the ResNetConfig; stride_in cannot be inferred from the tensors
    network: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()  # one sentence for each thing that was ignored


def load(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a small untrusted file.

    Raises:
        WeightsError: the file is not a JSON object, or too large.
    """
    try:
        size, content = path.stat().st_size, b""
        if size <= MAX_BYTES:
            content = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    if not content:
        raise WeightsError(f"{path} should have 1 to {MAX_BYTES:,} bytes of JSON, but has {size:,} bytes")
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} should contain an object, not {reprlib.repr(config)}")
    return config


def read(path: Path, preprocessor: Path | None = None) -> Described:
    """Reads a ``config.json``. The file is untrusted: size, types and ranges are checked.

    Args:
        path: path of ``config.json``.
        preprocessor: path of ``preprocessor_config.json``, which transformers writes beside it; ``None``: there is none.

    Raises:
        InputError: the network is not in the zoo.
        WeightsError: the file is not a JSON object, or contains unsupported values; one message lists all problems.
    """
    config = load(path)
    if "architecture" not in config:
        return _of_transformers(path, config, preprocessor) if "model_type" in config else Described()
    arch = config["architecture"]
    if not isinstance(arch, str) or arch not in zoo.ZOO:
        raise InputError(
            f"the repository holds a network {reprlib.repr(arch)}, which jresnet does not have ({path}). "
            f"There are {', '.join(zoo.ZOO)}."
        )
    # timm's older format has everything in one object.
    pretrained = config.get("pretrained_cfg", config)
    if not isinstance(pretrained, dict):
        raise WeightsError(f"pretrained_cfg in {path} should be an object, not {reprlib.repr(pretrained)}")
    problems: list[str] = []
    num_classes = _num_classes(config, pretrained, problems)
    _check_network(config, num_classes, problems)
    preprocessing = _preprocessing(pretrained, problems)
    categories = _categories(pretrained | config, num_classes, problems)
    if problems:
        raise WeightsError(f"{path} cannot be used: {'; '.join(problems)}")
    return Described(arch, num_classes, preprocessing, categories)


def _of_transformers(path: Path, config: dict[str, Any], preprocessor: Path | None) -> Described:
    try:
        network, num_classes, categories = transformers_config.network(config)
    except WeightsError as error:
        raise WeightsError(f"{path} cannot be used: {error}") from None
    found = Described(None, num_classes, None, categories, network)
    if preprocessor is None:
        return found
    try:
        return found._replace(preprocessing=transformers_config.preprocessing(load(preprocessor)))
    except WeightsError as error:  # the network can be used without the preprocessing
        return found._replace(notes=(f"the preprocessing in {preprocessor.name} is ignored: {error}",))


def _num_classes(config: dict[str, Any], pretrained: dict[str, Any], problems: list[str]) -> int | None:
    value = config.get("num_classes", pretrained.get("num_classes"))
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1_000_000:
        problems.append(f"num_classes should be 0 to 1,000,000, not {reprlib.repr(value)}")
        return None
    return value


def _check_network(config: dict[str, Any], num_classes: int | None, problems: list[str]) -> None:
    """Adds problems for model arguments in the configuration that change timm's network."""
    arguments = config.get("model_args", {})
    if not isinstance(arguments, dict):
        problems.append(f"model_args should be an object, not {reprlib.repr(arguments)}")
        return
    plain = {
        "in_chans": 3,
        "num_classes": arguments.get("num_classes") if num_classes is None else num_classes,
        "global_pool": "avg",
    }
    for name, value in ({"global_pool": config.get("global_pool")} | arguments).items():
        if name in ("zero_init_last", "drop_rate", "drop_path_rate", "drop_block_rate"):  # matter in training only
            continue
        if value is not None and (name not in plain or value != plain[name]):
            problems.append(f"{reprlib.repr(name)} = {reprlib.repr(value)} is not supported")


def _preprocessing(pretrained: dict[str, Any], problems: list[str]) -> Preprocessing:
    """As ``timm.data.resolve_data_config`` and ``transforms_imagenet_eval`` of timm 1.0.31, with their defaults."""

    def get(name: str, default: Any) -> Any:
        return default if (value := pretrained.get(name)) is None else value

    def triple(name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        values = get(name, list(default))
        if isinstance(values, list) and len(values) == 3:
            return tuple(values)
        problems.append(f"{name} should be three numbers, not {reprlib.repr(values)}")
        return default

    size = get("test_input_size", get("input_size", [3, 224, 224]))
    share, mode = get("test_crop_pct", get("crop_pct", 0.875)), get("crop_mode", "center")
    mean, std = triple("mean", Preprocessing.mean), triple("std", Preprocessing.std)
    if not isinstance(size, list) or len(size) != 3 or size[0] != 3 or size[1] != size[2]:
        problems.append(f"input_size should be 3 channels and a square, not {reprlib.repr(size)}")
        size = [3, 224, 224]
    elif not isinstance(size[1], int) or not 1 <= size[1] <= 4096:
        problems.append(f"input_size should be 1 to 4096 pixels, not {reprlib.repr(size)}")
        size = [3, 224, 224]
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0.01 <= share <= 1:
        problems.append(f"crop_pct should be a number from 0.01 to 1, not {reprlib.repr(share)}")
        share = 1
    if mode != "center":
        problems.append(f"crop_mode should be 'center', not {reprlib.repr(mode)}")
    found = Preprocessing(math.floor(size[1] / share), size[1], mean, std, get("interpolation", "bicubic"))
    try:
        found.check()
    except InputError as error:
        problems.append(str(error))
    return found


def _categories(config: dict[str, Any], num_classes: int | None, problems: list[str]) -> tuple[str, ...] | None:
    """The names of the classes. Descriptions are preferred, because a name may be just ``n01440764``."""

    def is_text(value: object) -> bool:  # names are printed on terminals
        return isinstance(value, str) and value.isprintable() and 0 < len(value) <= 1000

    # "labels" is the older name.
    names, described = config.get("label_names", config.get("labels")), config.get("label_descriptions") or {}
    if names is None:
        return None
    if isinstance(names, dict) and num_classes and names.keys() <= {str(i) for i in range(num_classes)}:
        # an index without a name gets its number as name
        names = [names.get(str(i), str(i)) for i in range(num_classes)]
    if not isinstance(names, list) or not all(map(is_text, names)) or len(names) != num_classes:
        problems.append(f"label_names should be {num_classes or ''} printable names, not {reprlib.repr(names)}")
    elif not isinstance(described, dict) or not all(map(is_text, described.values())):
        problems.append(f"label_descriptions should give printable texts by name, not {reprlib.repr(described)}")
    else:
        return tuple(described.get(name, name) for name in names)
    return None
