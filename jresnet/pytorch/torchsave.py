"""Write a file that ``torch.load(path, weights_only=True)`` reads, without torch: ``write(path, tensors)``.

It is the zip archive of torch >= 1.6 (``torch/serialization.py``, ``_save``): ``data.pkl``, a pickle that names globals
of torch and the storages; ``data/0``, ``data/1``, ..., the storages' bytes; ``byteorder`` and ``version``. Python's
pickler writes the name of a global only where it can import it, so the opcodes are written here.

Two records of torch's are left out. ``serialization_id`` is for torch's own logging. ``.format_version`` promises that a
storage's place follows from the sizes before it, as torch's zip writer lays them out; without it torch looks the place up.
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

ALIGNMENT = 64  # bytes: where each record begins, as torch aligns them, so that a mapped file's tensors are aligned
_KINDS = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}


def write(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes ``tensors`` as ``torch.save`` writes a ``state_dict``; the same tensors give the same bytes.

    An array under two names is stored once, as torch stores tensors that share memory. The ``_metadata`` that PyTorch's
    own state_dicts carry is left out: it tells ``load_state_dict`` how old a file is, and ``BatchNorm2d`` asks only to
    supply a ``num_batches_tracked`` that is missing.

    Args:
        path: the file; by custom ``*.pth``. It is written atomically.
        tensors: numpy arrays of float64, float32, float16, bfloat16 or int64, of any shape and strides.

    Raises:
        InputError: for another dtype, or where the file cannot be written.
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
            info = zipfile.ZipInfo(f"archive/{name}")  # dated 1980, whenever it is written
            info.create_system = 0  # else it says which one this is
            padding = -(content.tell() + 30 + len(info.filename) + 4) % ALIGNMENT  # 30: zip's header, 4: this field's
            info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)  # torch's name for it
            archive.writestr(info, data)

        add("data.pkl", _pickle((name, keys[id(value)], value) for name, value in tensors.items()))
        add("byteorder", sys.byteorder.encode())
        for identity, value in storages.items():
            add(f"data/{keys[identity]}", value.reshape(-1).view(np.uint8).data)
        add("version", b"3\n")
    write_atomically(path, content.getvalue())


def _pickle(tensors: Iterable[tuple[str, str, np.ndarray]]) -> bytes:
    """An OrderedDict of names to tensors, each the whole of the storage with the key beside its name."""
    empty = _global("collections", "OrderedDict") + op.EMPTY_TUPLE + op.REDUCE
    out = [op.PROTO + b"\2", empty, op.MARK]
    for name, key, value in tensors:
        kind = _global("torch", f"{_KINDS[value.dtype.name]}Storage")
        storage = _tuple(_text("storage"), kind, _text(key), _text("cpu"), _int(value.size)) + op.BINPERSID
        strides = [math.prod(max(n, 1) for n in value.shape[i + 1 :]) for i in range(value.ndim)]
        shape = (_tuple(*map(_int, value.shape)), _tuple(*map(_int, strides)))
        tensor = _tuple(storage, _int(0), *shape, op.NEWFALSE, empty)  # 0: its offset; no gradient, no hooks
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
