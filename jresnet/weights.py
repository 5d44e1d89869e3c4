"""Native weight files: safetensors with an architecture, provenance and a digest over the arrays.

safetensors finds truncation and bad headers; the digest finds the flipped bit that it does not. Files are written under
a temporary name and moved into place, so that one that exists is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import tempfile
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

from jresnet import zoo
from jresnet.errors import InputError, WeightsError
from jresnet.resnet import ResNet, ResNetConfig

FORMAT = "jresnet-1"
_FREE = ("num_classes", "in_channels", "stem")  # what a file may choose apart from its architecture's row
_STATE = (nnx.Param, nnx.BatchStat)


def configure(arch: str, **chosen: Any) -> ResNetConfig:
    """The configuration of ``arch`` with those of num_classes, in_channels and stem that are not None replaced.

    Raises:
        InputError: for an unknown architecture or a value out of range; all of them at once.
    """
    config = dataclasses.replace(zoo.find(arch).config, **{k: v for k, v in chosen.items() if v is not None})
    problems = [
        f"{name} must be a whole number of at least 1, got {value!r}"
        for name in ("num_classes", "in_channels")
        if not isinstance(value := getattr(config, name), int) or isinstance(value, bool) or value < 1
    ]
    if config.stem not in ("imagenet", "cifar"):
        problems.append(f'stem must be "imagenet" or "cifar", got {config.stem!r}')
    if problems:
        raise InputError("; ".join(problems))
    return config


def arrays(model: ResNet) -> dict[str, Any]:
    """Every parameter and running statistic by its dotted path, such as ``layer1.0.bn2.mean``, sorted."""
    flat = nnx.to_flat_state(nnx.state(model, _STATE))
    return dict(sorted((".".join(map(str, path)), variable.get_value()) for path, variable in flat))


def shapes(config: ResNetConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and running statistic by its dotted path."""
    return {path: leaf.shape for path, leaf in arrays(ResNet(config, rngs=None)).items()}


def fill(config: ResNetConfig, values: Mapping[str, np.ndarray], dtype: DTypeLike | None = None) -> ResNet:
    """A model whose leaves are exactly ``values``, by their dotted paths; ``dtype`` as in :class:`ResNet`."""
    graph, state = nnx.split(ResNet(config, dtype=dtype, rngs=None), _STATE)
    flat = {
        path: variable.replace(jax.numpy.asarray(values[".".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat))


def differences(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line for each kind of disagreement between two tables of names and shapes; empty where they agree."""
    missing, unexpected = expected.keys() - got.keys(), got.keys() - expected.keys()
    misshapen = [
        f"{k} is {list(got[k])}, not {list(expected[k])}"
        for k in sorted(expected.keys() & got.keys())
        if tuple(got[k]) != tuple(expected[k])
    ]
    lines = []
    for title, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected)), ("misshapen", misshapen)):
        if names:
            lines.append(f"{len(names)} {title}: {', '.join(names)}")
    return lines


def digest(values: Mapping[str, np.ndarray]) -> str:
    """SHA-256 in hex over name, dtype, shape and bytes of every array, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(values):
        value = np.ascontiguousarray(values[name])
        total.update(f"{name} {value.dtype.str} {list(values[name].shape)}\n".encode())
        total.update(value.data)
    return total.hexdigest()


def save(path: str | Path, model: ResNet, arch: str, **provenance: str) -> None:
    """Writes ``model`` to a native file, atomically.

    Args:
        path: the file; by custom ``*.safetensors``.
        model: a model of ``arch``.
        arch: its row of the zoo.
        provenance: more metadata as text, for example ``source`` and ``source_sha256``.

    Raises:
        InputError: where ``model`` is not an ``arch``, or the file cannot be written.
    """
    chosen = {name: getattr(model.config, name) for name in _FREE}
    if configure(arch, **chosen) != model.config:
        raise InputError(f"this model is not a {arch}: its configuration is {model.config}")
    # safetensors scrambles arrays that are not contiguous, without a word.
    values = {name: np.ascontiguousarray(value) for name, value in arrays(model).items()}
    versions = {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}
    metadata = {
        "format": FORMAT,
        "arch": arch,
        "config": json.dumps(chosen),
        "digest": digest(values),
        "versions": json.dumps(versions),
        **provenance,
    }
    write_atomically(path, safetensors.numpy.save(values, metadata))


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file so that, whenever it is interrupted, the path holds the old content or the new one, whole.

    Raises:
        InputError: where it cannot be written (no such folder, no permission, disk full).
    """
    path = Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            mask = os.umask(0)  # mkstemp makes files private; give this one the permissions of an ordinary file
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    except BaseException:  # Ctrl-C: leave nothing half-written
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of any safetensors file, bfloat16 included.

    Raises:
        WeightsError: where the file is not there or is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is no whole safetensors file ({error}): fetch or convert it again") from error


def read(path: str | Path) -> tuple[str, ResNetConfig, dict[str, np.ndarray], dict[str, str]]:
    """Reads a native file and checks it whole.

    Returns:
        (arch, config, arrays by path, metadata).

    Raises:
        WeightsError: where the file is missing, truncated, altered, not jresnet's, or does not hold what its
            architecture needs; one message lists everything that is wrong.
    """
    path = Path(path)
    if path.suffix in (".pth", ".pt", ".th"):
        raise WeightsError(
            f"{path} is a PyTorch file: convert it first, with python -m convert.torch2flax ARCH --weights {path}"
        )
    values, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{path} is not a {FORMAT} file (its metadata says {metadata.get('format')!r}): a PyTorch or timm file "
            f"is converted with python -m convert.torch2flax ARCH --weights {path}"
        )
    if digest(values) != metadata.get("digest"):
        raise WeightsError(f"{path} was altered after it was written, its digest differs: fetch or convert it again")
    try:
        arch, chosen = metadata["arch"], json.loads(metadata["config"])
        config = configure(arch, **{name: chosen[name] for name in _FREE})
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} does not say which network it holds ({error})") from error
    problems = differences(shapes(config), {name: value.shape for name, value in values.items()})
    problems += [f"{name} is {value.dtype}, not float32" for name, value in values.items() if value.dtype != np.float32]
    if problems:
        raise WeightsError(f"{path} does not hold a {arch}: {'; '.join(problems)}")
    return arch, config, values, metadata


def load(path: str | Path, dtype: DTypeLike | None = None) -> ResNet:
    """The model that a native file holds; errors as :func:`read`, ``dtype`` as in :class:`ResNet`."""
    _, config, values, _ = read(path)
    return fill(config, values, dtype)
