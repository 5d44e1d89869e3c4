"""Writes files that ``torch.load(path, weights_only=True)`` reads, without torch: ``write(path, tensors)``.

The format is the zip archive of torch >= 1.6 (``torch/serialization.py``, ``_save``): ``data.pkl``, a pickle that refers to
globals of torch and to storages; ``data/0``, ``data/1``, ..., the storages' bytes; ``byteorder`` and ``version``. Python's
pickler can only write names of globals that it can import, so this module writes the opcodes itself.

Two of torch's records are omitted: ``serialization_id``, which serves torch's logging, and ``.format_version``, which
promises that the offsets of storages can be computed from their sizes. Without it torch looks the offsets up.
"""

from __future__ import annotations

import io
import math
import pickle as op  # the opcodes' names only
import struct
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jresnet.errors import InputError
from jresnet.files import write_atomically

ALIGNMENT = 64  # alignment of records in bytes, as in torch, so that the tensors of a memory-mapped file are aligned
_KINDS = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}


def write(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors like ``torch.save`` writes a ``state_dict``. The same tensors always give the same bytes.

    An array under two names is stored once, like tensors in torch that share memory. The ``_metadata`` of PyTorch's
    state_dicts is omitted: ``load_state_dict`` reads format versions from it, and ``BatchNorm2d`` needs its version only
    if ``num_batches_tracked`` is missing.

    Args:
        path: the file, usually ``*.pth``; it is written atomically.
        tensors: numpy arrays of float64, float32, float16, bfloat16 or int64, of any shape and strides.

    Raises:
        InputError: an array has another dtype, or the file cannot be written.
    """
    unfit = [
        f"{name} is {v.dtype}" for name, v in tensors.items() if v.dtype.name not in _KINDS or not v.dtype.isnative
    ]
    if unfit:
        raise InputError(f"only {', '.join(_KINDS)} can be written, but {'; '.join(unfit)}")
    storages = {id(value): value for value in tensors.values()}
    keys = {identity: str(i) for i, identity in enumerate(storages)}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:

        def add(name: str, data: bytes | memoryview) -> None:
            info = zipfile.ZipInfo(f"archive/{name}")  # its date is always 1980
            info.create_system = 0  # the default depends on the operating system
            # 30 and 4: headers of zip and this field
            padding = -(content.tell() + 30 + len(info.filename) + 4) % ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)  # FB is torch's tag for padding
            archive.writestr(info, data)

        add("data.pkl", _pickle((name, keys[id(value)], value) for name, value in tensors.items()))
        add("byteorder", sys.byteorder.encode())
        for identity, value in storages.items():
            add(f"data/{keys[identity]}", value.reshape(-1).view(np.uint8).data)
        add("version", b"3\n")
    write_atomically(path, content.getvalue())


def _pickle(tensors: Iterable[tuple[str, str, np.ndarray]]) -> bytes:
    """The pickle of an OrderedDict of tensors, from (name, key of the storage, array); each tensor is a whole storage."""
    empty = _global("collections", "OrderedDict") + op.EMPTY_TUPLE + op.REDUCE
    out = [op.PROTO + b"\2", empty, op.MARK]
    for name, key, value in tensors:
        kind = _global("torch", f"{_KINDS[value.dtype.name]}Storage")
        storage = _tuple(_text("storage"), kind, _text(key), _text("cpu"), _int(value.size)) + op.BINPERSID
        strides = [math.prod(max(n, 1) for n in value.shape[i + 1 :]) for i in range(value.ndim)]
        shape = (_tuple(*map(_int, value.shape)), _tuple(*map(_int, strides)))
        tensor = _tuple(storage, _int(0), *shape, op.NEWFALSE, empty)  # offset 0, requires_grad False, no hooks
        out += [_text(name), _global("torch._utils", "_rebuild_tensor_v2"), tensor, op.REDUCE]
    return b"".join([*out, op.SETITEMS, op.STOP])


def _global(module: str, name: str) -> bytes:
    return op.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return op.MARK + b"".join(items) + op.TUPLE


def _text(text: str) -> bytes:
    return op.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def _int(number: int) -> bytes:
    return op.BININT + struct.pack("<i", number) if number < 1 << 31 else op.LONG1 + struct.pack("<Bq", 8, number)
