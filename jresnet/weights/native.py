"""Native weight files: safetensors with an architecture, provenance and a digest over the arrays.

safetensors finds truncation and bad headers; the digest finds the flipped bit that it does not. Files are written under
a temporary name and moved into place, so that one that exists is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
from collections.abc import Mapping
from pathlib import Path

import flax
import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike

from jresnet.errors import InputError, WeightsError
from jresnet.files import write_atomically
from jresnet.models.params import arrays, differences, fill, shapes
from jresnet.models.resnet import ResNet, ResNetConfig
from jresnet.models.zoo import FREE, configure

FORMAT = "jresnet-1"


def digest(values: Mapping[str, np.ndarray]) -> str:
    """SHA-256 in hex over name, dtype, shape and bytes of every array, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(values):
        value = np.ascontiguousarray(values[name])
        total.update(f"{name} {value.dtype.str} {list(values[name].shape)}\n".encode())
        total.update(value.reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer of its own
    return total.hexdigest()


def save(path: str | Path, model: ResNet, arch: str, **provenance: str) -> None:
    """Writes ``model`` to a native file, atomically.

    Args:
        path: the file; by custom ``*.safetensors``.
        model: a model of ``arch``.
        arch: its row of the zoo.
        provenance: more metadata as text, for example ``source`` and ``source_sha256``.

    Raises:
        InputError: where ``model`` is not an ``arch`` or was fused, or the file cannot be written.
    """
    chosen = {name: getattr(model.config, name) for name in FREE}
    if configure(arch, **chosen) != model.config:
        raise InputError(f"this model is not a {arch}: its configuration is {model.config}")
    # safetensors scrambles arrays that are not contiguous, without a word.
    values = {name: np.ascontiguousarray(value) for name, value in arrays(model).items()}
    if "bn1.scale" not in values:
        raise InputError(
            "this model is fused and has no BatchNorm to write: save the model that was given to jresnet.fuse"
        )
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


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of any safetensors file, bfloat16 included.

    Raises:
        WeightsError: where the file is not there, is damaged, or holds a dtype that numpy has not (float8, float4).
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never answer
            raise OSError("it is a folder or a device; name the file itself")
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is no whole safetensors file ({error}): fetch or convert it again") from error


def read(path: str | Path) -> tuple[str, ResNetConfig, dict[str, np.ndarray], dict[str, str]]:
    """Reads a native file and checks it whole.

    Returns:
        (arch, config, arrays by path, metadata).

    Raises:
        WeightsError: where the file is missing, truncated, altered, not jresnet's, or does not hold what its
            architecture needs; one message lists everything that is wrong.
    """
    if Path(path).suffix in (".pth", ".pt", ".th"):
        raise WeightsError(
            f"{path} is a PyTorch file: jresnet.create(ARCH, weights=...) reads it, and "
            "python -m convert.torch2flax makes a native file of it"
        )
    return parse(path, *read_safetensors(path))


def parse(
    path: str | Path, values: dict[str, np.ndarray], metadata: dict[str, str]
) -> tuple[str, ResNetConfig, dict[str, np.ndarray], dict[str, str]]:
    """:func:`read`, of the arrays and the metadata of ``path``, whose name is for errors only."""
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{path} is not a {FORMAT} file (its metadata says {metadata.get('format')!r}): a PyTorch or timm file "
            "is read by jresnet.create(ARCH, weights=...), and python -m convert.torch2flax makes a native file of it"
        )
    if digest(values) != metadata.get("digest"):
        raise WeightsError(f"{path} was altered after it was written, its digest differs: fetch or convert it again")
    try:
        arch, chosen = metadata["arch"], json.loads(metadata["config"])
        config = configure(arch, **{name: chosen[name] for name in FREE})
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} does not say which network it holds ({str(error)[:500]})") from error
    problems = differences(shapes(config), {name: value.shape for name, value in values.items()})
    problems += [f"{name} is {value.dtype}, not float32" for name, value in values.items() if value.dtype != np.float32]
    if problems:
        raise WeightsError(f"{path} does not hold a {arch}: {'; '.join(problems)}")
    return arch, config, values, metadata


def load(path: str | Path, dtype: DTypeLike | None = None) -> ResNet:
    """The model that a native file holds; errors as :func:`read`, ``dtype`` as in :class:`ResNet`."""
    _, config, values, _ = read(path)
    return fill(config, values, dtype)
