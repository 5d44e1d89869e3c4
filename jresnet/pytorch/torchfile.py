"""Reads files of ``torch.save`` (``.pth``, ``.pt``, ``.th``) into numpy arrays, without torch: ``read(path)``.

A ``.npz`` file of ``numpy.savez`` is read, too: see :func:`_read_npz`.

A ``torch.save`` file consists of a pickle and raw storages. A pickle is a program. :mod:`jresnet.pytorch.unpickle`
interprets it, builds only plain data and executes no code. A malicious file can at most build dicts, lists, tuples, numbers,
strings, descriptions of tensors, and inert records of the attributes of objects. A module that was saved as a whole
(``torch.save(model)``, ``torch.jit.save``) is such a record, and its tensors are read as a :class:`Module`. Its class and
its code are neither needed nor executed.

Time and memory for a file of S bytes are limited in advance. The pickle has at most 64 MiB and may run 500,000 + S / 64
instructions, during which tensors are only described. Storages must lie in the file without overlap. They are read after
every tensor was checked to lie inside its storage, and the arrays may take at most four times the storages' bytes together.
Measured peak memory: S + 1 MiB for one tensor per storage, 5 S for four views of one storage, 7 S for a pickle that is one
long string with a wide character, and 60 MB for a file of 0.4 MB with 400,000 dicts.

There are two formats (``torch/serialization.py``: ``_save``, ``_legacy_save``). The zip archive of torch >= 1.6 has CRCs,
which detect changed bytes in storages. The legacy stream of pickles and storages has no checksum, so that a changed number
is not detected: a caller who knows the file's SHA-256 should compare it first.
"""

import io
import math
import pickle  # only for the value of an opcode; it is never used to unpickle
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
from jresnet.files import TORCH_SUFFIXES, printable
from jresnet.pytorch import unpickle
from jresnet.pytorch.unpickle import Refused, expect

MAX_PICKLE = 64 << 20  # bytes; a tensor takes about 150, so this is enough for 400,000 tensors
MAX_DEPTH = 100  # nesting levels of dicts, lists and tuples
MAX_VIEWS = 4  # largest total size of the arrays, as a multiple of the storages they share
MAX_DIRECTORY = 1 << 20  # size of a zip directory in bytes, plus a quarter of the file; zipfile takes 12 times as much
MAX_INFLATED = 32  # largest size of a .npz's arrays, as a multiple of the file; compression saves only 10 % on weights
CHUNK = 1 << 20  # bytes read at a time, so that a large storage is not in memory twice
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001  # torch/serialization.py: MAGIC_NUMBER, PROTOCOL_VERSION
ADVICE = "only tensors, numbers and strings in dicts and lists are read; save with torch.save(model.state_dict(), path)"

# Globals of torch that may become inert records: modules and related objects. Others may be functions that make tensors.
_MODULES = re.compile(
    r"torch\.((nn|optim|utils|distributed|fx|amp|cuda\.amp|ao\.nn|jit\._pickle|_dynamo)\.|_TorchCompile\w+$)"
)

_NUMPY = "float64 float32 float16 complex128 complex64 bool int64 int32 int16 int8 uint64 uint32 uint16 uint8"
_ML = "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in _NUMPY.split()}
_NUMPY_CODES = {dtype.str[1:]: dtype for dtype in _DTYPES.values()}  # numpy's codes in pickles: f8, i4, b1
_DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in _ML.split()}
_STORAGES = {  # torch/storage.py, _dtype_to_storage_type_map; newer dtypes use UntypedStorage
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "ComplexDouble": "complex128", "ComplexFloat": "complex64",
}  # fmt: skip


def read(path: str | Path) -> object:
    """Reads a file like ``torch.load(path, weights_only=True)``, with numpy arrays instead of tensors.

    Args:
        path: a file written by ``torch.save``, in either format.

    Returns:
        The saved object: dict, OrderedDict, list, tuple, str, int, float, complex, bool, bytes, None. A tensor or Parameter
        of any device (also ``cuda:0``) becomes a C-contiguous, writable array. Two tensors with the same description (tied
        weights) become one array; other arrays share no memory. Further conversions: ``torch.dtype`` to numpy's,
        ``torch.device`` to a tuple, ``argparse.Namespace`` and ``Counter`` to a dict, a numpy scalar to a Python number, a
        module to a :class:`Module`, any other object to the dict of its attributes or items, or None if it has none.
        Attributes of an OrderedDict (``_metadata``) are dropped.

    Raises:
        WeightsError: the file is missing, damaged, of another format, or contains forbidden objects.
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
        raise WeightsError(f"{path} cannot be read ({cause}); expected a .pth file written by torch.save") from error
    except (*unpickle.DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        cause = f"{type(error).__name__}: {str(error)[:200]}"
        raise WeightsError(f"{path} is damaged or not written by torch.save ({cause}); get the file again") from error


_ONLY = "only PyTorch weights can be converted: save them with torch.save(model.state_dict(), path)"


def _foreign(head: bytes) -> str:
    """A phrase that says what a file is that does not begin like an archive or a pickle."""
    if not head:
        return "is empty; get the file again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer instead of the weights; run `git lfs pull`, or download the file itself"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "is a web page, which servers send if a file is missing or needs a login; download the file itself"
    if head[257:262] == b"ustar":
        return "is a tar archive, as torch before 0.1.10 wrote; load it with torch, and save it again with torch.save"
    if head.startswith(b"\x89HDF"):
        return f"is an HDF5 file (Keras), whose layers have other names and layouts; {_ONLY}"
    if head.startswith(b"\x08\x01\x12"):
        return f"is a TensorFlow SavedModel, whose layers have other names and layouts; {_ONLY}"
    # The version of ONNX, and the next field: the producer's name or version, a domain, a number, the graph, or an opset.
    if re.match(rb"\x08[\x03-\x3f][\x12\x1a\x22\x28\x3a\x42]", head):
        return f"is an ONNX file, which contains a program; {_ONLY}"
    if head.lstrip().startswith((b'{"', b"{\n", b"[")):
        return (
            "is a JSON file without tensors; if it is the index of a sharded checkpoint, name it *.index.json; otherwise "
            "load it with the library that wrote it, and save it with torch.save(model.state_dict(), path)"
        )
    if re.match(rb"([\x81-\x8f]|\xde..)[\xa1-\xbf]", head, re.DOTALL):
        return f"is a msgpack file (Flax), whose layers have other names and layouts; {_ONLY}"
    if head.startswith(b"\x93NUMPY"):
        return "is a .npy file of one array; save the state_dict's arrays with numpy.savez(path, **arrays)"
    if head[4:8] == b"TFL3":
        return f"is a TensorFlow Lite file, whose layers have other names and layouts; {_ONLY}"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")):
        return "is a compressed file; unpack it, and name the file inside"
    if head[4:9] == b"\0\0\0\0{":
        return "is a safetensors file; rename it to *.safetensors"
    return f"is not a file of torch.save: it begins with {head[:8]!r}, not like a zip archive or a pickle"


class Module(dict[str, Any]):
    """The tensors of a module that was saved as a whole, by the names in its ``state_dict()``."""

    kind: str = ""  # name of its class, such as "torchvision.models.resnet.ResNet"
    # For every submodule by name: its "class" and its plain attributes, such as a convolution's "stride": (2, 2)
    settings: dict[str, dict[str, Any]]


# --- Interpreting the pickle.


class _Storage(NamedTuple):
    """A storage, or a window into one, that is not read yet. ``start`` and ``nbytes`` are in bytes."""

    key: str
    dtype: np.dtype[Any]
    start: int
    nbytes: int


class _Tensor(NamedTuple):
    """A tensor that lies inside its storage. ``start`` (from the storage's first byte) and ``strides`` are in bytes."""

    key: str
    dtype: np.dtype[Any]
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Interpreter(unpickle.Interpreter):
    """An interpreter that creates a ``_Tensor`` for every tensor, and records the storages that tensors use."""

    hints: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("torch.qint", "torch.quint", "torch._utils._rebuild_qtensor", "torch.ScriptObject"),
            "the network was quantised, which loses the float weights: convert weights from before the quantisation",
        ),
        **dict.fromkeys(
            (
                "numpy.core.multiarray._reconstruct",
                "numpy._core.multiarray._reconstruct",
                "numpy.core.numeric._frombuffer",
                "numpy._core.numeric._frombuffer",
            ),
            "convert a pickle of numpy arrays, as published by detectron2, with numpy.savez(path, **arrays)",
        ),
    }

    def __init__(self, data: bytes, size: int, inert: bool = True):
        super().__init__(data, _GLOBALS, size=size, inert=inert, advice=ADVICE)
        self.storages: dict[str, tuple[np.dtype[Any], int]] = {}  # key: dtype, size in bytes
        self.tensors: dict[_Tensor, None] = {}  # a set in the order of the file

    # Arguments are untrusted: each method checks everything that it uses.

    def persistent(self, tag: Any, kind: Any, key: Any, _location: Any, numel: Any = None, view: Any = None) -> Any:  # type: ignore[override]
        """A storage. In the legacy format, a view (key, start, count) is a window into the storage.

        The legacy format also uses persistent ids for classes with their source code: ("module", class, file, code).
        """
        if tag == "module" and type(kind) is unpickle.Unknown:
            return kind
        key, numel = expect(key, str), expect(numel, int)
        _, start, count = (None, 0, numel) if view is None else expect(view, tuple)
        inside = 0 <= expect(start, int) <= start + expect(count, int) <= numel
        if expect(tag, str) != "storage" or not isinstance(kind, np.dtype) or not inside:
            raise ValueError("a persistent id that is not a storage")
        stored = kind, numel * kind.itemsize
        if self.storages.setdefault(key, stored) != stored:
            raise Refused(f"names the storage {key[:40]!r} with two types or sizes; get the file again")
        return _Storage(key, kind, start * kind.itemsize, count * kind.itemsize)

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any, lazy: Any = None) -> _Tensor:
        """``_rebuild_tensor*``. Offset and strides are in elements; ``lazy`` is a pending conjugation or negation."""
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
        """BUILD sets attributes: those of a Namespace (a dict here) are kept, those of an OrderedDict are dropped."""
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
        """Globals of torch that make unsupported kinds of tensors are refused, instead of becoming inert."""
        return super().is_inert(full) and (not full.startswith("torch.") or _MODULES.match(full) is not None)

    def scalar(self, dtype: Any, raw: Any) -> Any:
        """``numpy.core.multiarray.scalar``, as a Python number."""
        if not isinstance(dtype, np.dtype) or len(expect(raw, bytes)) != dtype.itemsize:
            raise ValueError("a numpy scalar that is not a number")
        return np.frombuffer(raw, dtype)[0].item()


_GLOBALS: dict[str, object] = {  # dtypes, and functions whose first argument is the interpreter
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.{kind}Storage": _DTYPES[name] for kind, name in _STORAGES.items()},
    "torch.storage.UntypedStorage": _DTYPES["uint8"],
    # Arguments: storage, offset, shape, strides, requires_grad, hooks; then v3's dtype; then a dict if lazy
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


# --- Converting the pickle's object to arrays.


def _assemble(saved: object, run: _Interpreter, keys: Iterable[str], load: Callable[[str, int], np.ndarray]) -> object:
    """Replaces the tensors in ``saved`` by arrays. ``load(key, nbytes)`` reads a storage, in the order of ``keys``."""
    held = sum(nbytes for _, nbytes in run.storages.values())
    asked = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in run.tensors)
    if held > run.size:
        raise Refused(f"is truncated: its storages take {held:,} bytes, but the file has {run.size:,}; get it again")
    if asked > MAX_VIEWS * held:
        raise Refused(f"has {asked:,} bytes of tensors in {held:,} bytes of storage; save .contiguous() copies")
    run.data = b""  # frees up to 64 MiB
    users: dict[str, list[_Tensor]] = {key: [] for key in run.storages}
    for tensor in run.tensors:
        users[tensor.key].append(tensor)
    arrays = {}
    for key in keys:
        storage = load(key, run.storages[key][1])
        for tensor in users[key]:
            arrays[tensor] = _array(tensor, storage, alone=len(users[key]) == 1)
    run.steps = run.limit  # a new limit for copying: memo references can multiply a list exponentially

    finished: dict[unpickle.Record, object] = {}  # by record, because records may contain one another

    def finish(node: Any, depth: int = 0) -> object:
        run.charge(1)
        kind = type(node)
        if depth > MAX_DEPTH:
            raise Refused(f"is nested deeper than {MAX_DEPTH} levels, or contains itself; {ADVICE}")
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
                finished[node] = None  # stops the recursion if the record contains itself
                finished[node] = record(node, depth + 1)
            return finished[node]
        raise Refused(f"contains a storage or a function where a value is expected; {ADVICE}")

    def record(node: unpickle.Record, depth: int) -> object:
        # Data that records share through the memo is copied for each of them, so each is charged for it.
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
        """Collects the tensors and settings of a module and its submodules."""
        if depth > MAX_DEPTH:
            raise Refused(f"has modules nested deeper than {MAX_DEPTH} levels, or contains itself; {ADVICE}")
        run.charge(len(prefix) // unpickle.BYTES_PER_STEP)
        own, attributes = _parts(node) or ({}, {})
        items = _set_items(attributes.get("_non_persistent_buffers_set"))  # a state_dict does not have these, either
        run.charge(1 + len(own) + len(attributes) + len(items))
        hidden = {name for name in items if isinstance(name, str)}
        plain = {name: value for name, value in attributes.items() if _is_plain(value)}
        into.settings[prefix.removesuffix(".")] = {"class": node.name} | plain
        for name, child in own.items():
            if type(child) is _Tensor and name not in hidden:
                into[f"{prefix}{name}"] = arrays[child]
            elif type(child) is unpickle.Record:
                collect(child, f"{prefix}{name}.", into, depth + 1)

    if type(saved) is unpickle.Record and saved.name.startswith("__torch__.") and not run.tensors:
        raise Refused(
            "is a TorchScript program without parameters: torch.jit.freeze and torch.jit.optimize_for_inference make "
            "constants of them; save the model before that with torch.save(model.state_dict(), path)"
        )
    if type(saved) is unpickle.Record and not run.tensors:
        raise Refused(f"uses the forbidden global {printable(saved.name)}, which this reader never runs; {ADVICE}")
    return finish(saved)


def _parts(node: unpickle.Record) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The tensors and submodules of a module, and all its attributes; None if the record is not a module.

    They are in torch.nn.Module's ``__dict__``, which a graph module passes as an argument, or in TorchScript's attributes.
    """
    state = node.state
    if node.name == "torch._dynamo.eval_frame.OptimizedModule" and node.args and type(node.args[0]) is unpickle.Record:
        return {"_orig_mod": node.args[0]}, {}  # torch.compile's
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


def _set_items(node: Any) -> list[Any]:
    """The items in the record of a set."""
    inside = node.args[0] if type(node) is unpickle.Record and node.args else None
    return inside if isinstance(inside, list) else []


def _is_plain(value: Any) -> bool:
    """Whether an attribute may be a setting of a layer: a number, a short string, or a few integers."""
    if isinstance(value, str):
        return len(value) <= 40
    if isinstance(value, tuple):
        return len(value) <= 4 and all(type(one) is int for one in value)
    return type(value) in (int, float, bool)


def _numpy_array(node: unpickle.Record) -> np.ndarray | None:
    """The numpy array that a record describes; None if it does not describe one."""
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
        view = view.view(np.uint8) != 0  # bool bytes other than 0 and 1 are undefined in numpy
    elif alone and view.nbytes == storage.nbytes and view.flags.c_contiguous:
        return view  # no other array shares this memory
    return np.array(view, order="C")


def _bytes(stream: IO[bytes], nbytes: int) -> np.ndarray:
    storage = np.empty(nbytes, np.uint8)
    for start in range(0, nbytes, CHUNK):  # a short read raises ValueError
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
        if "model.weights.h5" in entries:
            raise Refused(f"is a Keras file, whose layers have other names and layouts; {_ONLY}")
        if any(PurePosixPath(name).suffix in TORCH_SUFFIXES for name in entries):
            raise Refused("is a zip archive with a file of weights inside; unpack it, and name that file")
        script = any(name.endswith("/constants.pkl") for name in entries)
        npz = all(name.endswith(".npy") for name in entries)
        end = 0
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            name, parts = info.filename[:80], PurePosixPath(info.filename).parts
            packed = info.compress_type or info.file_size != info.compress_size
            code = script and "code" in parts[1:-1]  # TorchScript's code is never read
            if info.flag_bits & 0x2041 or (
                packed and not ((npz or code) and info.compress_type in (0, zipfile.ZIP_DEFLATED))
            ):
                raise Refused(
                    f"has the compressed or encrypted entry {name!r}, unlike files of torch.save; save it again"
                )
            if {"/", "//", ".."} & set(parts) or "\\" in info.filename:
                raise Refused(f"has the entry {name!r}, which leads out of the archive; get the file again")
            file.seek(info.header_offset + 26)
            # after the local name and padding
            start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            if info.header_offset < end or start + info.compress_size > size:
                raise Refused(f"has the entry {name!r}, which overlaps another or the end; get the file again")
            end = start + info.compress_size
        if npz:
            return _read_npz(archive, size)
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Refused("is a zip archive, but not of torch.save: expected one data.pkl inside; unpack it first")
        if roots[0] + "byteorder" in entries and archive.read(roots[0] + "byteorder") != b"little":
            raise Refused("is big-endian; load it with torch and save it again on a little-endian machine")
        if entries[roots[0] + "data.pkl"].file_size > MAX_PICKLE:
            raise Refused(f"has a pickle of more than {MAX_PICKLE:,} bytes; {ADVICE}")

        def load(key: str, nbytes: int) -> np.ndarray:
            name = f"{roots[0]}data/{key}"
            if name not in entries or entries[name].file_size != nbytes:
                raise Refused(f"lacks storage {name[:80]!r} of {nbytes:,} bytes; get the file again")
            with archive.open(name) as stream:  # raises BadZipFile at the last byte if the CRC differs
                return _bytes(stream, nbytes)

        run = _Interpreter(archive.read(roots[0] + "data.pkl"), size)
        return _assemble(run.load(), run, list(run.storages), load)


def _read_npz(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    """The arrays of ``numpy.savez`` by name. Their total size is checked before anything is decompressed."""
    if sum(info.file_size for info in archive.infolist()) > MAX_INFLATED * size:
        raise Refused(f"inflates to more than {MAX_INFLATED} times its size; save it again with numpy.savez")
    arrays = {}
    for info in archive.infolist():
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, by_columns, dtype = header(stream)
            # A header may state any size: memory is allocated only if the entry has that size.
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != info.file_size - stream.tell():
                raise Refused(
                    f"has the entry {info.filename[:80]!r} of objects, or of another size than its header says; save one "
                    "array per tensor: numpy.savez(path, **arrays)"
                )
            flat = _bytes(stream, math.prod(shape) * dtype.itemsize).view(dtype)
            arrays[info.filename.removesuffix(".npy")] = flat.reshape(shape, order="F" if by_columns else "C")
    return arrays


def _check_directory(file: io.BufferedReader, size: int) -> None:
    """Refuses a zip directory that is too large for its file, before zipfile creates objects from it."""
    file.seek(max(0, size - 98))
    tail = file.read(98).rjust(98, b"\0")
    end64, locator, end = tail[:56], tail[56:76], tail[76:]  # the first two are the optional zip64 records
    zip64 = locator.startswith(b"PK\6\7")
    if not end.startswith(b"PK\5\6") or not end.endswith(b"\0\0") or (zip64 and not end64.startswith(b"PK\6\6")):
        raise Refused("is a truncated zip archive, or not written by torch.save; get the file again")
    (length,), (length64,) = struct.unpack("<I", end[12:16]), struct.unpack("<Q", end64[40:48])
    if max(length % 0xFFFFFFFF, length64 * zip64) > MAX_DIRECTORY + size // 4:  # 0xFFFFFFFF refers to the zip64 record
        raise Refused("is a zip archive with a directory larger than torch.save's; get the file again")


def _read_legacy(file: io.BufferedReader, size: int) -> object:
    file.seek(0)
    # read() allocates the requested size at once
    run = _Interpreter(file.read(min(size, MAX_PICKLE)), size, inert=False)
    if run.load() != LEGACY_MAGIC or run.load() != LEGACY_VERSION:
        raise Refused("is a pickle, but not written by torch.save; save it again with torch.save")
    if expect(run.load(), dict).get("little_endian") is not True:
        raise Refused("is big-endian; load it with torch and save it again on a little-endian machine")
    run.inert = True
    saved = run.load()
    run.inert = False
    keys = [expect(key, str) for key in expect(run.load(), list)]
    if sorted(keys) != sorted(run.storages):
        raise Refused("lists storages that differ from those its tensors use; get the file again")
    file.seek(run.position)

    def load(key: str, nbytes: int) -> np.ndarray:
        (numel,) = struct.unpack("<q", file.read(8))
        if numel * run.storages[key][0].itemsize != nbytes:
            raise Refused(f"gives storage {key[:40]!r} two sizes; get the file again")
        return _bytes(file, nbytes)

    result = _assemble(saved, run, keys, load)
    if file.read(1):
        raise Refused("has data after its last storage; get the file again")
    return result
