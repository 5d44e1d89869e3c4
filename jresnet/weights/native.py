"""Native weight files: safetensors with a configuration, provenance, and digests over the arrays and over the metadata.

safetensors finds truncation and bad headers; the digests find the flipped bit that it does not. Files are written under
a temporary name and moved into place, so that one that exists is whole.
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
RESERVED = ("format", "arch", "config", "digest", "metadata_digest", "versions")  # entries of the metadata
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Of a safetensors header, which becomes Python objects of many times its size. A resnet1202_cifar has 1 MB and 30,000
# texts, the categories of ImageNet-21k are 1 MB more.
MAX_HEADER = 8 << 20  # bytes
MAX_TEXTS = 200_000  # in quotes: five a tensor, two an entry of the metadata


def digest(values: Mapping[str, np.ndarray]) -> str:
    """SHA-256 in hex over name, dtype, shape and bytes of every array, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(values):
        value = np.ascontiguousarray(values[name])
        total.update(f"{name} {value.dtype.str} {list(values[name].shape)}\n".encode())
        total.update(value.reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer of its own
    return total.hexdigest()


def save(path: str | Path, model: ResNet, arch: str | None = None, **provenance: Any) -> None:
    """Writes ``model`` to a native file, atomically.

    The file holds every parameter and statistic in the dtype it has, and the configuration. A head that is another
    ``flax.nnx.Linear`` than the model began with is saved with its own number of classes.

    Args:
        path: the file; by custom ``*.safetensors``.
        model: a row of the zoo or any other configuration.
        arch: the row that it has to be one of; ``None``: it is not asked.
        provenance: more metadata as text, for example ``source`` and ``source_sha256``. ``preprocessing`` may be a
            :class:`~jresnet.weights.preprocessing.Preprocessing`, ``categories`` a sequence of names, one a class, and
            ``scores`` a mapping of numbers, as :func:`jresnet.get_weights` has them; ``None`` is left out.

    Raises:
        InputError: where ``model`` is not an ``arch``, was fused, holds what this format has no place for or what is not
            finite, where metadata is not text or has a name of the format's own, or where the file cannot be written.
            One message lists everything.
    """
    config = config_of(model)
    values = {name: np.asarray(value) for name, value in arrays(model).items()}
    if isinstance(model, FusedResNet):
        raise InputError(
            "this model is fused and has no BatchNorm to write: save the model that was given to jresnet.fuse"
        )
    if arch is not None and configure(arch, **{name: getattr(config, name) for name in FREE}) != config:
        raise InputError(f"this model is not a {arch}: its configuration is {config}")
    metadata, problems = _provenance(provenance, config)
    if Path(path).suffix in TORCH_SUFFIXES:
        problems.append(
            f"files that end in {Path(path).suffix} are PyTorch's, which this one is not: name it *.safetensors "
            "(jresnet export-torch writes PyTorch's from it)"
        )
    problems += _foreign(model, config)
    problems += differences(shapes(config), {name: value.shape for name, value in values.items()})
    for name, value in values.items():
        if value.dtype.name not in DTYPES:
            problems.append(f"{name} is {value.dtype}, not {', '.join(DTYPES)}")
        elif broken := value.size - int(np.isfinite(value).sum()):
            problems.append(f"{name} holds {broken:,} values that are NaN or infinite")
    if problems:
        raise InputError(f"cannot save this model to {path}: {_some(problems)}")
    arch = arch or name_of(config)
    versions = {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}
    metadata = {
        "format": FORMAT,
        **({"arch": arch} if arch else {}),
        # What is None is left out: so a file says no more of its network than it has to.
        "config": json.dumps({name: said for name, said in dataclasses.asdict(config).items() if said is not None}),
        "versions": json.dumps(versions),
        **metadata,
    }
    # safetensors scrambles arrays that are not contiguous, without a word.
    values = {name: np.ascontiguousarray(value) for name, value in values.items()}
    write_atomically(path, safetensors.numpy.save(values, sealed(values, metadata)))


def sealed(values: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` with the digest of the arrays, and one of itself that covers the former."""
    whole = {**metadata, "digest": digest(values)}
    return {**whole, "metadata_digest": _metadata_digest(whole)}


def _metadata_digest(metadata: Mapping[str, str]) -> str:
    """SHA-256 in hex over every entry but this one."""
    said = sorted((name, text) for name, text in metadata.items() if name != "metadata_digest")
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _foreign(model: ResNet, config: ResNetConfig) -> list[str]:
    """The parts of ``model`` that a model of ``config`` built anew would not have, or not with these settings."""

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
                f"fc is a {type(part).__name__}, and the format has a place for one linear layer with a bias: "
                "Orbax's checkpoints (flax.nnx.state) take any model"
            )
        elif path in expected and type(part) is not type(expected[path]):
            problems.append(f"{path} is a {type(part).__name__} of {type(part).__module__}, not jresnet's own")
        elif path in expected:
            for name in ("stride", "padding", "groups", "dilation", "eps"):
                own, usual = (getattr(one, name, None) for one in (part, expected[path]))
                if own != usual:
                    problems.append(f"{path} has {name} {own}, and a network of this configuration {usual}")
    return problems


def _provenance(given: Mapping[str, Any], config: ResNetConfig) -> tuple[dict[str, str], list[str]]:
    """``given`` as text, and what is wrong with it."""
    said, problems = {}, []
    for name, value in given.items():
        if value is None:
            continue
        if name in RESERVED:
            problems.append(f"the format writes the entry {name!r} itself: choose another name for yours")
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
                value = json.dumps(dict(value), default=float)  # float: numbers of numpy's and JAX's
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
    """Why this entry, given as text, could not be read again as what it has to be."""
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
    """The arrays and the metadata of any safetensors file, bfloat16 included.

    Raises:
        WeightsError: where the file is not there, is damaged, or holds a dtype that numpy has not (float8, float4).
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never answer
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
    """Raises ValueError where the header of a safetensors file is so large that no network can need it."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if MAX_HEADER < length < os.fstat(file.fileno()).st_size:  # a longer one is damage, which safetensors tells
            raise ValueError(f"its header has {length:,} bytes; expected at most {MAX_HEADER:,}")
        if (texts := file.read(min(length, MAX_HEADER)).count(b'"') // 2) > MAX_TEXTS:
            raise ValueError(f"its header has {texts:,} texts; expected at most {MAX_TEXTS:,}")


def read(path: str | Path) -> tuple[str | None, ResNetConfig, dict[str, np.ndarray], dict[str, str]]:
    """Reads a native file and checks it whole.

    Returns:
        (arch, config, arrays by path, metadata); arch is None where the configuration is no row of the zoo.

    Raises:
        WeightsError: where the file is missing, truncated, altered, not jresnet's, or does not hold what its
            configuration needs; one message lists everything that is wrong.
    """
    if Path(path).suffix in (".pth", ".pt", ".th"):
        raise WeightsError(
            f"{path} is a PyTorch file: jresnet.create(ARCH, weights=...) reads it, and "
            "python -m convert.torch2flax makes a native file of it"
        )
    return parse(path, *read_safetensors(path))


def parse(
    path: str | Path, values: dict[str, np.ndarray], metadata: dict[str, str]
) -> tuple[str | None, ResNetConfig, dict[str, np.ndarray], dict[str, str]]:
    """:func:`read`, of the arrays and the metadata of ``path``, whose name is for errors only."""
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{path} is not a {FORMAT} file (its metadata says {metadata.get('format')!r}): a PyTorch or timm file "
            "is read by jresnet.create(ARCH, weights=...), and python -m convert.torch2flax makes a native file of it"
        )
    if digest(values) != metadata.get("digest") or _metadata_digest(metadata) != metadata.get("metadata_digest"):
        raise WeightsError(f"{path} was altered after it was written, its digest differs: fetch or convert it again")
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
    """The configuration that a file states, which anyone may have written; :class:`ValueError` and others if it is none."""
    said = json.loads(metadata["config"])
    names = {field.name for field in dataclasses.fields(ResNetConfig)}
    needed = {field.name for field in dataclasses.fields(ResNetConfig) if field.default is not None}
    if not isinstance(said, dict) or not needed <= said.keys() <= names:
        may = ", ".join(sorted(names - needed))
        raise InputError(f"its configuration must have {', '.join(sorted(needed))}, may have {may} and nothing else")
    known: dict[str, Any] = {name: _tuples(value) for name, value in said.items()}
    config = ResNetConfig(**known)
    # Building a network takes time and memory for every block and channel, so that the file must have as many.
    blocks, widest = sum(config.depths), max((max(value.shape, default=0) for value in values.values()), default=0)
    if config.pruned is None:
        inner = (max(config.widths) * config.width_per_group // 64 * config.groups, *config.widths)
    else:
        inner = tuple(count for _, pairs in config.pruned for pair in pairs for count in pair)
    channels = (config.in_channels, config.num_classes, config.stem_outputs, *inner, *config.outputs)
    if blocks > len(values) or max(channels) > widest:
        raise InputError(f"its configuration has {blocks:,} blocks or channels that its arrays have not")
    return config


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, however deep."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def load(path: str | Path, dtype: DTypeLike | None = None) -> ResNet:
    """The model that a native file holds; errors as :func:`read`, ``dtype`` as in :class:`ResNet`."""
    _, config, values, _ = read(path)
    return fill(config, values, dtype)
