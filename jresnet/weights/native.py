"""Native weight files: safetensors with the configuration, provenance, and digests of the arrays and of the metadata.

safetensors itself detects truncation and bad headers; the digests detect changed bits. Files are written atomically, so that
an existing file is always complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike

from jresnet.errors import InputError, WeightsError
from jresnet.files import TORCH_SUFFIXES, printable, write_atomically
from jresnet.models.config import ResNetConfig
from jresnet.models.fuse import FusedResNet
from jresnet.models.layers import Linear
from jresnet.models.params import arrays, config_of, differences, fill, shapes
from jresnet.models.resnet import ResNet
from jresnet.models.zoo import FREE, configure, find, name_of
from jresnet.weights.preprocessing import Preprocessing

FORMAT = "jresnet-1"
RESERVED = ("format", "arch", "config", "digest", "metadata_digest", "versions")  # metadata entries written by `save`
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Limits of a safetensors header, whose Python objects take many times its size. The header of a resnet1202_cifar has 1 MB
# and 30,000 strings; the categories of ImageNet-21k add 1 MB.
MAX_HEADER = 8 << 20  # bytes
MAX_TEXTS = 200_000  # quoted strings: five per tensor, two per metadata entry


def digest(values: Mapping[str, np.ndarray]) -> str:
    """SHA-256 in hex over name, dtype, shape and bytes of all arrays, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(values):
        value = np.ascontiguousarray(values[name])
        total.update(f"{name} {value.dtype.str} {list(values[name].shape)}\n".encode())
        total.update(value.reshape(-1).view(np.uint8).data)  # bfloat16 arrays do not support the buffer protocol
    return total.hexdigest()


def save(path: str | Path, model: ResNet, arch: str | None = None, **provenance: Any) -> None:
    """Writes a model to a native file, atomically.

    The file contains all parameters and statistics in their dtypes, and the configuration. If the head was replaced by
    another ``flax.nnx.Linear``, the file has that head's number of classes.

    Args:
        path: the file, usually ``*.safetensors``.
        model: a model of any configuration, in the zoo or not.
        arch: the expected architecture; ``None``: not checked.
        provenance: further metadata as strings, such as ``source`` and ``source_sha256``. ``preprocessing`` may be a
            :class:`~jresnet.weights.preprocessing.Preprocessing`, ``categories`` a sequence with one name per class, and
            ``scores`` a mapping of numbers, as in :func:`jresnet.get_weights`. Entries that are ``None`` are left out.

    Raises:
        InputError: ``model`` is not an ``arch``, is fused, contains layers that the format cannot store, or values that are
            not finite; a metadata entry is not a string or has a reserved name; or the file cannot be written. One message
            lists all problems.
    """
    config = config_of(model)
    values = {name: np.asarray(value) for name, value in arrays(model).items()}
    if isinstance(model, FusedResNet):
        raise InputError(
            "this model is fused and has no BatchNorm to save: save the model that was passed to jresnet.fuse"
        )
    if arch is not None and configure(arch, **{name: getattr(config, name) for name in FREE}) != config:
        raise InputError(f"this model is not a {arch}: its configuration is {config}")
    metadata, problems = _provenance(provenance, config)
    if Path(path).suffix in TORCH_SUFFIXES:
        problems.append(
            f"{Path(path).suffix} is a suffix of PyTorch files, and this is a native file: name it *.safetensors "
            "(jresnet export-torch converts it to a PyTorch file)"
        )
    problems += _foreign(model, config)
    problems += differences(shapes(config), {name: value.shape for name, value in values.items()})
    for name, value in values.items():
        if value.dtype.name not in DTYPES:
            problems.append(f"{name} is {value.dtype}, not {', '.join(DTYPES)}")
        elif broken := value.size - int(np.isfinite(value).sum()):
            problems.append(f"{name} contains {broken:,} values that are NaN or infinite")
    if problems:
        raise InputError(f"cannot save this model to {path}: {_some(problems)}")
    arch = arch or name_of(config)
    versions = {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}
    metadata = {
        "format": FORMAT,
        **({"arch": arch} if arch else {}),
        # None is left out, so that files of most networks do not contain the optional fields.
        "config": json.dumps({name: said for name, said in dataclasses.asdict(config).items() if said is not None}),
        "versions": json.dumps(versions),
        **metadata,
    }
    # safetensors silently scrambles arrays that are not contiguous.
    values = {name: np.ascontiguousarray(value) for name, value in values.items()}
    write_atomically(path, safetensors.numpy.save(values, sealed(values, metadata)))


def sealed(values: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` with two added entries: the digest of the arrays, and that of all metadata including the former."""
    whole = {**metadata, "digest": digest(values)}
    return {**whole, "metadata_digest": _metadata_digest(whole)}


def _metadata_digest(metadata: Mapping[str, str]) -> str:
    """SHA-256 in hex over all entries except ``metadata_digest``."""
    said = sorted((name, text) for name, text in metadata.items() if name != "metadata_digest")
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _foreign(model: ResNet, config: ResNetConfig) -> list[str]:
    """The problems of submodules that differ in type or settings from those of a new model of ``config``."""

    def parts(model: ResNet) -> dict[str, Any]:
        found = {".".join(map(str, path)): part for path, part in nnx.iter_graph(model) if isinstance(part, nnx.Module)}
        return {path: part for path, part in found.items() if not isinstance(part, nnx.List)}

    found, expected = parts(model), parts(ResNet(config, rngs=None))
    problems = []
    for path, part in found.items():
        if path == "" or (path == "fc" and type(part) is nnx.Linear):
            continue
        if path == "fc" and type(part) is not Linear:
            problems.append(
                f"fc is a {type(part).__name__}, but the format stores one linear layer with a bias: use an Orbax "
                "checkpoint (flax.nnx.state), which stores any model"
            )
        elif path in expected and type(part) is not type(expected[path]):
            problems.append(f"{path} is a {type(part).__name__} of {type(part).__module__}, not of jresnet")
        elif path in expected:
            for name in ("stride", "padding", "groups", "dilation", "eps"):
                own, usual = (getattr(one, name, None) for one in (part, expected[path]))
                if own != usual:
                    problems.append(f"{path} has {name} {own}, but a network of this configuration has {usual}")
    return problems


def _provenance(given: Mapping[str, Any], config: ResNetConfig) -> tuple[dict[str, str], list[str]]:
    """The metadata as strings, and a list of problems."""
    said, problems = {}, []
    for name, value in given.items():
        if value is None:
            continue
        if name in RESERVED:
            problems.append(f"the metadata name {name!r} is reserved: choose another name")
        elif isinstance(value, Preprocessing):
            value = value.to_json()
        elif name == "categories" and isinstance(value, list | tuple):
            if len(value) != config.num_classes:
                problems.append(f"there are {len(value):,} categories for {config.num_classes:,} classes")
            if others := [one for one in value if not isinstance(one, str)]:
                problems.append(
                    f"categories must be names, and {len(others):,} are not text, such as {others[0]!r:.40}"
                )
                continue
            value = json.dumps(value)
        elif name == "scores" and isinstance(value, Mapping):
            try:
                value = json.dumps(dict(value), default=float)  # float: for numpy and JAX numbers
            except (TypeError, ValueError):
                problems.append(f"scores must be numbers and text by name, got {value!r:.80}")
                continue
        if not isinstance(value, str):
            problems.append(f"the metadata {name!r} must be text, got {value!r:.80}")
        elif not value.isascii() and value != value.encode(errors="replace").decode():
            problems.append(f"the metadata {name!r} cannot be written as UTF-8: {value!r:.80}")
        elif problem := _unreadable(name, value):
            problems.append(problem)
        else:
            said[name] = value
    return said, problems


def _unreadable(name: str, text: str) -> str | None:
    """The reason why this entry, given as a string, could not be read back; None if it can."""
    kind = {"categories": list, "scores": dict}.get(name)
    try:
        if name == "preprocessing":
            Preprocessing.from_json(text)
        elif kind and not isinstance(json.loads(text), kind):
            raise ValueError
    except WeightsError as error:
        return f"the metadata {name!r} is not what Preprocessing.to_json() gives, got {text!r:.60}: {error.__cause__}"
    except (ValueError, RecursionError):
        expected = "a list or tuple of names" if kind is list else "a mapping"
        return f"the metadata {name!r} must be {expected}, or such a one as JSON, got {text!r:.60}"
    return None


def _some(problems: list[str]) -> str:
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    return "; ".join(problems[:8]) + more


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the arrays and the metadata of any safetensors file; bfloat16 is supported.

    Raises:
        WeightsError: the file is missing or damaged, or contains a dtype that numpy does not have (float8, float4).
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise OSError("it is a folder or a device; name the file itself")
        _check_header(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, AttributeError, TypeError, ValueError) as error:
        reason = printable(str(error))
        raise WeightsError(
            f"{path} is not a complete safetensors file ({reason}): fetch or convert it again"
        ) from error


def _check_header(path: str | Path) -> None:
    """Raises ValueError if the header of a safetensors file is larger than any network needs."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if MAX_HEADER < length < os.fstat(file.fileno()).st_size:  # safetensors reports a header longer than the file
            raise ValueError(f"its header has {length:,} bytes; expected at most {MAX_HEADER:,}")
        if (texts := file.read(min(length, MAX_HEADER)).count(b'"') // 2) > MAX_TEXTS:
            raise ValueError(f"its header has {texts:,} texts; expected at most {MAX_TEXTS:,}")


def read(path: str | Path) -> tuple[str | None, ResNetConfig, dict[str, np.ndarray], dict[str, str]]:
    """Reads a native file and checks all of it.

    Returns:
        (arch, config, arrays by path, metadata); arch is None if the configuration is not in the zoo.

    Raises:
        WeightsError: the file is missing, truncated, altered, not a native file, or its arrays do not match its
            configuration; one message lists all problems.
    """
    if Path(path).suffix in (".pth", ".pt", ".th"):
        raise WeightsError(
            f"{path} is a PyTorch file: jresnet.create(ARCH, weights=...) reads it, and "
            "python -m convert.torch2flax converts it to a native file"
        )
    return parse(path, *read_safetensors(path))


def parse(
    path: str | Path, values: dict[str, np.ndarray], metadata: dict[str, str]
) -> tuple[str | None, ResNetConfig, dict[str, np.ndarray], dict[str, str]]:
    """As :func:`read`, from the arrays and the metadata of a file; ``path`` is used only in messages."""
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{path} is not a {FORMAT} file (its metadata says {metadata.get('format')!r}): a PyTorch or timm file "
            "is read by jresnet.create(ARCH, weights=...), and python -m convert.torch2flax converts it to a native file"
        )
    if digest(values) != metadata.get("digest") or _metadata_digest(metadata) != metadata.get("metadata_digest"):
        raise WeightsError(f"{path} was altered after it was written (its digest differs): fetch or convert it again")
    try:
        arch = metadata.get("arch")
        if arch is not None:
            find(arch)
        config = _stated(metadata, values)
        if arch is None:
            arch = name_of(config)
        elif configure(arch, **{name: getattr(config, name) for name in FREE}) != config:
            raise InputError(f"its configuration is not that of a {arch}")
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} does not say which network it holds ({str(error)[:500]})") from error
    problems = differences(shapes(config), {name: value.shape for name, value in values.items()})
    problems += [
        f"{name} is {value.dtype}, not {', '.join(DTYPES)}"
        for name, value in values.items()
        if value.dtype.name not in DTYPES
    ]
    if problems:
        raise WeightsError(f"{path} does not hold a {arch or config}: {_some(problems)}")
    return arch, config, values, metadata


def _stated(metadata: Mapping[str, str], values: Mapping[str, np.ndarray]) -> ResNetConfig:
    """The configuration that an untrusted file states; raises :class:`ValueError` and others if it is invalid."""
    said = json.loads(metadata["config"])
    names = {field.name for field in dataclasses.fields(ResNetConfig)}
    needed = {field.name for field in dataclasses.fields(ResNetConfig) if field.default is not None}
    if not isinstance(said, dict) or not needed <= said.keys() <= names:
        may = ", ".join(sorted(names - needed))
        raise InputError(f"its configuration must have {', '.join(sorted(needed))}, may have {may} and nothing else")
    known: dict[str, Any] = {name: _tuples(value) for name, value in said.items()}
    config = ResNetConfig(**known)
    # Building a network takes time and memory per block and channel, so a false configuration must be refused before that.
    blocks, widest = sum(config.depths), max((max(value.shape, default=0) for value in values.values()), default=0)
    if config.pruned is None:
        inner = (max(config.widths) * config.width_per_group // 64 * config.groups, *config.widths)
    else:
        inner = tuple(count for _, pairs in config.pruned for pair in pairs for count in pair)
    channels = (config.in_channels, config.num_classes, config.stem_outputs, *inner, *config.outputs)
    if blocks > len(values) or max(channels) > widest:
        raise InputError(f"its configuration has {blocks:,} blocks or channels that its arrays do not have")
    return config


def _tuples(value: Any) -> Any:
    """Converts lists to tuples, recursively."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def load(path: str | Path, dtype: DTypeLike | None = None) -> ResNet:
    """Loads the model in a native file; ``dtype`` as in :class:`ResNet`, errors as in :func:`read`."""
    _, config, values, _ = read(path)
    return fill(config, values, dtype)
