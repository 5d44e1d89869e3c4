"""Read what ``torch.save`` wrote (``.pth``, ``.pt``, ``.th``) into numpy arrays, without torch: ``read(path)``.

A ``.npz`` of numpy's ``savez`` is read too, by its own headers: see :func:`_read_npz`.

A ``torch.save`` file is a pickle beside raw storages, and a pickle is a program: it is run by
:mod:`jresnet.pytorch.unpickle`, which builds plain data and runs nothing. The worst file can build dicts, lists, tuples,
numbers, strings, descriptions of tensors, and inert records of the attributes of objects. A module that was saved whole
(``torch.save(model)``, ``torch.jit.save``) is such a record, and its tensors are read from it as a :class:`Module`: neither
its class nor its code is needed, or looked at.

What a file of S bytes costs is bounded before it is spent: its pickle is at most 64 MiB long and may run half a million
instructions and S / 64 more. While it runs, tensors are only described. Their storages, which must lie in the file
without overlap, are read once every tensor was found inside its storage, and all of them together within four times
the storages' bytes. Measured at the peak: S and 1 MiB for one tensor a storage, 5 S for four views of one, 7 S for a
pickle that is one long string with a wide letter, and 60 MB for a file of 0.4 MB that holds 400,000 dicts.

Of the two formats (``torch/serialization.py``: ``_save``, ``_legacy_save``) the zip archive of torch >= 1.6 has a CRC,
by which a flipped byte of a storage is found. The legacy stream of pickles and storages has no checksum: there a
flipped byte of a number cannot be seen, and a caller who knows the file's SHA-256 compares that first.
"""

import io
import math
import pickle  # the name of an opcode only: nothing here is unpickled by it
import re
import stat
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from jresnet.errors import WeightsError
from jresnet.files import printable
from jresnet.pytorch import unpickle
from jresnet.pytorch.unpickle import Refused, expect

MAX_PICKLE = 64 << 20  # bytes; a tensor takes about 150: room for 400,000 of them
MAX_DEPTH = 100  # levels of dicts, lists and tuples
MAX_VIEWS = 4  # all arrays together, as a multiple of the storages they share
MAX_DIRECTORY = 1 << 20  # bytes of a zip archive's directory, and a quarter of the file; zipfile takes 12 times as much
MAX_INFLATED = 32  # a .npz's arrays, as a multiple of the file; numpy.savez_compressed gains a tenth on weights
CHUNK = 1 << 20  # bytes read at a time, so that a large storage is not held twice
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001  # torch/serialization.py: MAGIC_NUMBER, PROTOCOL_VERSION
ADVICE = "only tensors, numbers and strings in dicts and lists are read; save with torch.save(model.state_dict(), path)"

# torch's globals that may stand for modules, or for objects beside them; of its others, tensors might be made.
_MODULES = re.compile(r"torch\.(nn|optim|utils|distributed|fx|amp|cuda\.amp|ao\.nn|jit\._pickle|_dynamo)\.")

_NUMPY = "float64 float32 float16 complex128 complex64 bool int64 int32 int16 int8 uint64 uint32 uint16 uint8"
_ML = "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in _NUMPY.split()}
_NUMPY_CODES = {dtype.str[1:]: dtype for dtype in _DTYPES.values()}  # as numpy pickles them: f8, i4, b1
_DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in _ML.split()}
_STORAGES = {  # torch/storage.py, _dtype_to_storage_type_map; younger dtypes come in an UntypedStorage
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "ComplexDouble": "complex128", "ComplexFloat": "complex64",
}  # fmt: skip


def read(path: str | Path) -> object:
    """What ``torch.load(path, weights_only=True)`` returns, with numpy arrays for tensors.

    Args:
        path: a file that ``torch.save`` wrote, in either format.

    Returns:
        The saved object: dict, OrderedDict, list, tuple, str, int, float, complex, bool, bytes, None. A tensor or
        Parameter, wherever it lay (``cuda:0`` too), is a C-contiguous, writable array; two that the file describes
        alike (tied weights) are one array, all others share no memory. A ``torch.dtype`` is numpy's, a ``torch.device``
        a tuple, an ``argparse.Namespace`` or ``Counter`` a dict, a numpy scalar a Python number, a module a
        :class:`Module`, any other object the dict of its attributes or items, None where it has neither. Attributes of
        an OrderedDict (``_metadata``) are dropped.

    Raises:
        WeightsError: the file is missing, damaged, of another format, or asks for more than tensors.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise Refused("is a folder or a device; name the file itself")
        with open(path, "rb") as file:
            head = file.read(512)
            if head.startswith(b"PK\x03\x04"):
                return _read_zip(file, status.st_size)
            if head.startswith(pickle.PROTO):
                return _read_legacy(file, status.st_size)
        raise Refused(_foreign(head))
    except Refused as refusal:
        raise WeightsError(f"{path} {refusal}") from None
    except OSError as error:
        cause = error.strerror or error
        raise WeightsError(f"{path} cannot be read ({cause}); expected a .pth file that torch.save wrote") from error
    except (*unpickle.DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        cause = f"{type(error).__name__}: {str(error)[:200]}"
        raise WeightsError(f"{path} is damaged or not written by torch.save ({cause}); get the file again") from error


_ONLY = "only PyTorch's weights are converted: save those with torch.save(model.state_dict(), path)"


def _foreign(head: bytes) -> str:
    """What a file is that begins neither like an archive nor like a pickle."""
    if not head:
        return "is empty; get the file again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights it stands for; run `git lfs pull`, or download the file itself"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "is a web page, as servers send where a file has gone or needs a login; download the file itself"
    if head[257:262] == b"ustar":
        return "is a tar archive, as torch before 0.1.10 wrote; load it with torch, and save it again with torch.save"
    if head.startswith(b"\x89HDF"):
        return f"is an HDF5 file, as Keras writes, whose layers have other names and layouts; {_ONLY}"
    if head[0] == 8 and (b"pytorch" in head or b"onnx" in head.lower()):
        return f"is an ONNX file, a program with its constants; {_ONLY}"
    if head.lstrip().startswith((b'{"', b"{\n", b"[")):
        return (
            "is JSON, not the tensors themselves; the index of a checkpoint in several files is read where it is called "
            "*.index.json; else load it with what wrote it, and save it with torch.save(model.state_dict(), path)"
        )
    if 0x80 < head[0] < 0x90 and 0xA0 < head[1] < 0xC0:
        return f"is a msgpack file, as flax writes, of another network's names and layouts; {_ONLY}"
    if head[4:9] == b"\0\0\0\0{":
        return "is a safetensors file; give it the ending .safetensors"
    return f"is not a file of torch.save: it begins with {head[:8]!r}, not like a zip archive or a pickle"


class Module(dict[str, Any]):
    """The tensors of a module that was saved whole, by the names that its ``state_dict()`` has."""

    kind: str = ""  # its class: "torchvision.models.resnet.ResNet"
    # Of every module inside, by its name: "class", and its plain attributes, such as a convolution's "stride": (2, 2)
    settings: dict[str, dict[str, Any]]


# --- The pickle: what it may hold while it runs, and what it may cause.


class _Storage(NamedTuple):
    """A storage, or a window into one, that the pickle names; not read yet. ``start`` and ``nbytes`` in bytes."""

    key: str
    dtype: np.dtype[Any]
    start: int
    nbytes: int


class _Tensor(NamedTuple):
    """A tensor found to lie inside its storage. ``start`` (from the storage's first byte) and ``strides`` in bytes."""

    key: str
    dtype: np.dtype[Any]
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Interpreter(unpickle.Interpreter):
    """With a ``_Tensor`` for every tensor, and the storages that they need."""

    hints: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("torch.qint", "torch.quint", "torch._utils._rebuild_qtensor", "torch.ScriptObject"),
            "the network was quantised, and its float weights are lost: convert it from before that",
        ),
        **dict.fromkeys(
            ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
            "of a pickle of numpy arrays, as detectron2 publishes, make a file with numpy.savez(path, **arrays)",
        ),
    }

    def __init__(self, data: bytes, size: int, inert: bool = True):
        super().__init__(data, _GLOBALS, size=size, inert=inert, advice=ADVICE)
        self.storages: dict[str, tuple[np.dtype[Any], int]] = {}  # key: dtype, size in bytes
        self.tensors: dict[_Tensor, None] = {}  # a set in the order of the file

    # The arguments are a stranger's: each function checks all that it uses.

    def persistent(self, tag: Any, kind: Any, key: Any, _location: Any, numel: Any = None, view: Any = None) -> Any:  # type: ignore[override]
        """A storage. A view (key, start, count), of the legacy format, is a window into the storage.

        The legacy format also names the class of a module so, with its source code: ("module", class, file, code).
        """
        if tag == "module" and type(kind) is unpickle.Unknown:
            return kind
        key, numel = expect(key, str), expect(numel, int)
        _, start, count = (None, 0, numel) if view is None else expect(view, tuple)
        inside = 0 <= expect(start, int) <= start + expect(count, int) <= numel
        if expect(tag, str) != "storage" or not isinstance(kind, np.dtype) or not inside:
            raise ValueError("a persistent id that names no storage")
        stored = kind, numel * kind.itemsize
        if self.storages.setdefault(key, stored) != stored:
            raise Refused(f"names the storage {key[:40]!r} with two types or sizes; get the file again")
        return _Storage(key, kind, start * kind.itemsize, count * kind.itemsize)

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any, lazy: Any = None) -> _Tensor:
        """``_rebuild_tensor*``. Offset and strides count elements; ``lazy``: a conjugation or negation not yet done."""
        storage, shape, strides = expect(storage, _Storage), expect(shape, tuple), expect(strides, tuple)
        dtype = storage.dtype if dtype is None else dtype
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or len(shape) > 32 or any(type(n) is not int or n >> 62 for n in numbers):
            raise ValueError("a tensor with a negative, huge or missing size, stride or offset")
        if lazy or not isinstance(dtype, np.dtype) or storage.dtype not in (dtype, _DTYPES["uint8"]):
            raise Refused(f"holds a lazy or reinterpreted view of {storage.dtype}; save it again after tensor.clone()")
        numel, item = math.prod(shape), dtype.itemsize
        end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1 if numel else 0
        if max(end, numel) * item > storage.nbytes:
            raise Refused(
                f"describes a tensor ({dtype}, shape {shape}, strides {strides}, offset {offset}) larger than its "
                f"storage of {storage.nbytes:,} bytes; get the file again, or save expanded tensors after .contiguous()"
            )
        start = storage.start + offset * item if numel else 0
        steps = tuple(stride * item if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))
        tensor = _Tensor(storage.key, dtype, start, shape, steps)
        self.tensors[tensor] = None
        return tensor

    def build(self, target: Any, state: Any) -> None:
        """BUILD sets attributes: a Namespace's (a dict here) are kept, an OrderedDict's dropped, a dtype's checked."""
        if type(target) is dict:
            self.fill(target, expect(state, dict).items())
        elif isinstance(target, np.dtype):
            if expect(expect(state, tuple)[1], str) not in "<|=":
                raise Refused("holds a big-endian number; save it again on a little-endian machine")
        elif type(target) is unpickle.Record:
            target.state = state
        elif type(target) is not OrderedDict:
            raise Refused(f"sets attributes of a {type(target).__name__}, which torch.save does not do; {ADVICE}")

    def is_inert(self, full: str) -> bool:
        """torch's own globals that make tensors of kinds which are not read are refused, not passed over."""
        return super().is_inert(full) and (not full.startswith("torch.") or _MODULES.match(full) is not None)

    def scalar(self, dtype: Any, raw: Any) -> Any:
        """``numpy.core.multiarray.scalar``, as a Python number."""
        if not isinstance(dtype, np.dtype) or len(expect(raw, bytes)) != dtype.itemsize:
            raise ValueError("a numpy scalar that is no number")
        return np.frombuffer(raw, dtype)[0].item()


_GLOBALS: dict[str, object] = {  # dtypes, and functions that take the interpreter before their arguments
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.{kind}Storage": _DTYPES[name] for kind, name in _STORAGES.items()},
    "torch.storage.UntypedStorage": _DTYPES["uint8"],
    # storage, offset, shape, strides, requires_grad, hooks; then v3's dtype; then a dict if lazy
    "torch._utils._rebuild_tensor": lambda run, *args: run.tensor(*args, None),
    "torch._utils._rebuild_tensor_v2": lambda run, *args: run.tensor(*args[:4], None, *args[6:]),
    "torch._utils._rebuild_tensor_v3": lambda run, *args: run.tensor(*args[:4], *args[6:]),
    "torch._utils._rebuild_parameter": lambda run, data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda run, data, *_: data,
    "torch.Size": lambda run, sizes=(): sizes,
    "torch.device": lambda run, *parts: parts,
    # Python 2 pickled OrderedDict([[key, value], …])
    "collections.OrderedDict": lambda run, items=(): run.fill(OrderedDict(), expect(items, tuple, list)),
    "collections.Counter": lambda run, counts: expect(counts, dict),
    "argparse.Namespace": lambda run: {},
    "_codecs.encode": _Interpreter.encode,
    "numpy.dtype": lambda run, code, *_: _NUMPY_CODES[expect(code, str)],
    "numpy.core.multiarray.scalar": _Interpreter.scalar,
    "numpy._core.multiarray.scalar": _Interpreter.scalar,
}


# --- From the pickle's object to arrays.


def _assemble(saved: object, run: _Interpreter, keys: Iterable[str], load: Callable[[str, int], np.ndarray]) -> object:
    """``saved`` with its arrays. ``load(key, nbytes)`` reads a storage; it is called in the order of ``keys``."""
    held = sum(nbytes for _, nbytes in run.storages.values())
    asked = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in run.tensors)
    if held > run.size:
        raise Refused(f"is cut short: its storages take {held:,} bytes, the file has {run.size:,}; get it again")
    if asked > MAX_VIEWS * held:
        raise Refused(f"asks for {asked:,} bytes of tensors from {held:,} bytes of storage; save .contiguous() copies")
    run.data = b""  # up to 64 MiB
    users: dict[str, list[_Tensor]] = {key: [] for key in run.storages}
    for tensor in run.tensors:
        users[tensor.key].append(tensor)
    arrays = {}
    for key in keys:
        storage = load(key, run.storages[key][1])
        for tensor in users[key]:
            arrays[tensor] = _array(tensor, storage, alone=len(users[key]) == 1)
    run.steps = run.limit  # memo references can put one list in many places, and that list in many more

    finished: dict[unpickle.Record, object] = {}  # by the record itself: they may hold one another

    def finish(node: Any, depth: int = 0) -> object:
        run.charge(1)
        kind = type(node)
        if depth > MAX_DEPTH:
            raise Refused(f"nests deeper than {MAX_DEPTH} levels, or contains itself; {ADVICE}")
        if kind is _Tensor:
            return arrays[node]
        if kind in (list, tuple):
            return kind([finish(child, depth + 1) for child in node])
        if kind in (dict, OrderedDict):
            return kind([(key, finish(child, depth + 1)) for key, child in node.items()])
        if kind in (str, int, float, complex, bool, bytes, type(None)) or isinstance(node, np.dtype):
            return node
        if kind is unpickle.Unknown:
            return None
        if kind is unpickle.Record:
            if node not in finished:
                finished[node] = None  # what it holds itself is not looked at again
                finished[node] = record(node, depth + 1)
            return finished[node]
        raise Refused(f"holds a storage or a function by itself, where values belong; {ADVICE}")

    def record(node: unpickle.Record, depth: int) -> object:
        # What records share by the memo is copied for each of them, and so paid for by each.
        held = [node.state, node.items, *node.args[:1]]
        run.charge(sum(len(value) for value in held if isinstance(value, dict)))
        if type(node.state) is tuple:
            run.charge(sum(len(value) for value in node.state if type(value) is bytes) // unpickle.BYTES_PER_STEP)
        if (array := _numpy_array(node)) is not None:
            return array
        if _parts(node) is not None:
            module = Module()
            module.kind, module.settings = node.name, {}
            collect(node, "", module, depth)
            return module
        if isinstance(node.items, list):
            return finish(node.items, depth)
        named = node.state if isinstance(node.state, dict) else {}
        return finish(named | (node.items or {}), depth) if named or node.items else None

    def collect(node: unpickle.Record, prefix: str, into: Module, depth: int) -> None:
        """The tensors of a module and of those inside it, and what they say of themselves."""
        if depth > MAX_DEPTH:
            raise Refused(f"nests modules deeper than {MAX_DEPTH} levels, or contains itself; {ADVICE}")
        run.charge(len(prefix) // unpickle.BYTES_PER_STEP)
        own, attributes = _parts(node) or ({}, {})
        run.charge(1 + len(own) + len(attributes))
        plain = {name: value for name, value in attributes.items() if _is_plain(value)}
        into.settings[prefix.removesuffix(".")] = {"class": node.name} | plain
        for name, child in own.items():
            if type(child) is _Tensor:
                into[f"{prefix}{name}"] = arrays[child]
            elif type(child) is unpickle.Record:
                collect(child, f"{prefix}{name}.", into, depth + 1)

    if type(saved) is unpickle.Record and not run.tensors:
        raise Refused(f"names the forbidden global {printable(saved.name)}, which this reader never runs; {ADVICE}")
    return finish(saved)


def _parts(node: unpickle.Record) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The tensors and modules that a module registers, and its other attributes; None of what is no module.

    Of torch.nn.Module's ``__dict__``, which a graph module gives as an argument, or of TorchScript's attributes.
    """
    state = node.state
    if state is None and node.args and isinstance(node.args[0], dict):
        state = node.args[0]
    if not isinstance(state, dict):
        return None
    named = {name: value for name, value in state.items() if isinstance(name, str)}
    if node.name.startswith("__torch__."):
        return named, named
    groups = [named.get(group) for group in ("_parameters", "_buffers", "_modules")]
    if not all(isinstance(group, dict) for group in groups):
        return None
    own = {name: value for group in groups for name, value in group.items() if isinstance(name, str)}  # type: ignore[union-attr]
    return own, named


def _is_plain(value: Any) -> bool:
    """Whether an attribute says how a layer computes: a number, a short text, or a few numbers."""
    if isinstance(value, str):
        return len(value) <= 40
    if isinstance(value, tuple):
        return len(value) <= 4 and all(type(one) is int for one in value)
    return type(value) in (int, float, bool)


def _numpy_array(node: unpickle.Record) -> np.ndarray | None:
    """An array of numpy's that was pickled beside the tensors, or instead of them."""
    if not node.name.endswith("multiarray._reconstruct") or not isinstance(node.state, tuple) or len(node.state) != 5:
        return None
    _, shape, dtype, by_columns, raw = node.state
    if not isinstance(dtype, np.dtype) or type(raw) is not bytes or not isinstance(shape, tuple):
        return None
    if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(raw):
        return None
    flat: np.ndarray = np.frombuffer(raw, dtype).copy()
    return np.ascontiguousarray(flat.reshape(shape, order="F" if by_columns else "C"))


def _array(tensor: _Tensor, storage: np.ndarray, alone: bool) -> np.ndarray:
    if 0 in tensor.shape:
        return np.empty(tensor.shape, tensor.dtype)
    view: np.ndarray = np.ndarray(tensor.shape, tensor.dtype, storage.data, tensor.start, tensor.strides)
    if view.dtype == bool:
        view = view.view(np.uint8) != 0  # numpy leaves undefined what a byte of 2 means
    elif alone and view.nbytes == storage.nbytes and view.flags.c_contiguous:
        return view  # of memory that nobody else has
    return np.array(view, order="C")


def _bytes(stream: IO[bytes], nbytes: int) -> np.ndarray:
    storage = np.empty(nbytes, np.uint8)
    for start in range(0, nbytes, CHUNK):  # a short read does not fit, which is a ValueError
        storage.data[start : start + CHUNK] = stream.read(min(CHUNK, nbytes - start))
    return storage


# --- The two formats.


def _read_zip(file: io.BufferedReader, size: int) -> object:
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise Refused("is a zip archive with two entries of one name; get the file again")
        if any(name.endswith(("/archive_format", "/serialized_exported_program.json")) for name in entries):
            raise Refused("is a program of torch.export; load it with torch.export.load and torch.save its state_dict")
        script = any(name.endswith("/constants.pkl") for name in entries)
        npz = all(name.endswith(".npy") for name in entries)
        end = 0
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            name, parts = info.filename[:80], PurePosixPath(info.filename).parts
            packed = info.compress_type or info.file_size != info.compress_size
            code = script and "code" in parts[1:-1]  # TorchScript's, which is never read
            if info.flag_bits & 0x2041 or (
                packed and not ((npz or code) and info.compress_type in (0, zipfile.ZIP_DEFLATED))
            ):
                raise Refused(f"has the compressed or encrypted entry {name!r}; torch.save stores; save it again")
            if {"/", "//", ".."} & set(parts) or "\\" in info.filename:
                raise Refused(f"has the entry {name!r}, which leads out of the archive; get the file again")
            file.seek(info.header_offset + 26)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))  # the local name and padding
            if info.header_offset < end or start + info.compress_size > size:
                raise Refused(f"has the entry {name!r}, which overlaps another or the end; get the file again")
            end = start + info.compress_size
        if npz:
            return _read_npz(archive, size)
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Refused("is a zip archive, but not of torch.save: expected a folder with data.pkl; unpack it first")
        if roots[0] + "byteorder" in entries and archive.read(roots[0] + "byteorder") != b"little":
            raise Refused("is big-endian; load it with torch and save it again on a little-endian machine")
        if entries[roots[0] + "data.pkl"].file_size > MAX_PICKLE:
            raise Refused(f"has a pickle of more than {MAX_PICKLE:,} bytes; {ADVICE}")

        def load(key: str, nbytes: int) -> np.ndarray:
            name = f"{roots[0]}data/{key}"
            if name not in entries or entries[name].file_size != nbytes:
                raise Refused(f"has not the {nbytes:,} bytes of storage {name[:80]!r}; get the file again")
            with archive.open(name) as stream:  # BadZipFile at the last byte, if the CRC differs
                return _bytes(stream, nbytes)

        run = _Interpreter(archive.read(roots[0] + "data.pkl"), size)
        return _assemble(run.load(), run, list(run.storages), load)


def _read_npz(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    """The arrays of ``numpy.savez`` by their names; bounded by what the archive says before anything is inflated."""
    if sum(info.file_size for info in archive.infolist()) > MAX_INFLATED * size:
        raise Refused(f"inflates to more than {MAX_INFLATED} times its size; save it again with numpy.savez")
    arrays = {}
    for info in archive.infolist():
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, by_columns, dtype = header(stream)
            # A header may ask for any size: memory is reserved only for what the entry holds.
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != info.file_size - stream.tell():
                raise Refused(f"has the entry {info.filename[:80]!r} of objects, or of another size than it says")
            flat = _bytes(stream, math.prod(shape) * dtype.itemsize).view(dtype)
            arrays[info.filename.removesuffix(".npy")] = flat.reshape(shape, order="F" if by_columns else "C")
    return arrays


def _check_directory(file: io.BufferedReader, size: int) -> None:
    """Refuse a directory that is large for its file before zipfile makes objects of it."""
    file.seek(max(0, size - 98))
    tail = file.read(98).rjust(98, b"\0")
    end64, locator, end = tail[:56], tail[56:76], tail[76:]  # the zip64 records, which a file need not have
    zip64 = locator.startswith(b"PK\6\7")
    if not end.startswith(b"PK\5\6") or not end.endswith(b"\0\0") or (zip64 and not end64.startswith(b"PK\6\6")):
        raise Refused("is a zip archive that is cut short, or not written by torch.save; get the file again")
    (length,), (length64,) = struct.unpack("<I", end[12:16]), struct.unpack("<Q", end64[40:48])
    if max(length % 0xFFFFFFFF, length64 * zip64) > MAX_DIRECTORY + size // 4:  # 0xFFFFFFFF: see the zip64 record
        raise Refused("is a zip archive with a directory larger than torch.save's; get the file again")


def _read_legacy(file: io.BufferedReader, size: int) -> object:
    file.seek(0)
    run = _Interpreter(file.read(min(size, MAX_PICKLE)), size, inert=False)  # read() reserves all that it is asked for
    if run.load() != LEGACY_MAGIC or run.load() != LEGACY_VERSION:
        raise Refused("is a pickle, but not one that torch.save wrote; save it again with torch.save")
    if expect(run.load(), dict).get("little_endian") is not True:
        raise Refused("is big-endian; load it with torch and save it again on a little-endian machine")
    run.inert = True
    saved = run.load()
    run.inert = False
    keys = [expect(key, str) for key in expect(run.load(), list)]
    if sorted(keys) != sorted(run.storages):
        raise Refused("lists other storages than its tensors use; get the file again")
    file.seek(run.position)

    def load(key: str, nbytes: int) -> np.ndarray:
        (numel,) = struct.unpack("<q", file.read(8))
        if numel * run.storages[key][0].itemsize != nbytes:
            raise Refused(f"gives storage {key[:40]!r} two sizes; get the file again")
        return _bytes(file, nbytes)

    result = _assemble(saved, run, keys, load)
    if file.read(1):
        raise Refused("goes on after its last storage; get the file again")
    return result
