"""``jresnet.pytorch.torchfile`` without torch: files of both formats built by hand, and a corpus of hostile ones."""

import contextlib
import io
import pickle as op
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jresnet.errors import WeightsError
from jresnet.pytorch import torchfile, unpickle
from jresnet.pytorch.torchfile import read

# --- Builders: pickle opcodes, and the two formats around them.


class Raw(bytes):
    """Opcodes that go into a pickle as they are."""


def emit(value) -> bytes:
    """The protocol 2 opcodes that push ``value``."""
    if isinstance(value, Raw):
        return value
    if value is None or value is True or value is False:
        return {None: op.NONE, True: op.NEWTRUE, False: op.NEWFALSE}[value]
    if isinstance(value, int):
        long = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return op.BININT + struct.pack("<i", value) if abs(value) < 1 << 31 else op.LONG1 + bytes([len(long)]) + long
    if isinstance(value, float):
        return op.BINFLOAT + struct.pack(">d", value)
    if isinstance(value, str):
        return op.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return op.MARK + b"".join(map(emit, value)) + op.TUPLE
    if isinstance(value, list):
        return op.EMPTY_LIST + op.MARK + b"".join(map(emit, value)) + op.APPENDS
    return op.EMPTY_DICT + op.MARK + b"".join(emit(k) + emit(v) for k, v in value.items()) + op.SETITEMS


def glob(name: str) -> Raw:
    module, _, attribute = name.rpartition(".")
    return Raw(op.GLOBAL + f"{module}\n{attribute}\n".encode())


def call(name: str, *args) -> Raw:
    return Raw(glob(name) + emit(args) + op.REDUCE)


def build(obj, state) -> Raw:
    return Raw(emit(obj) + emit(state) + op.BUILD)


def put(value, index: int) -> Raw:
    return Raw(emit(value) + op.LONG_BINPUT + struct.pack("<I", index))


def get(index: int) -> Raw:
    return Raw(op.LONG_BINGET + struct.pack("<I", index))


def storage(key="0", kind="Float", numel=6, *view) -> Raw:
    return Raw(emit(("storage", glob(f"torch.{kind}Storage"), key, "cuda:0", numel, *view)) + op.BINPERSID)


def tensor(store=None, offset=0, shape=(2, 3), strides=(3, 1)) -> Raw:
    args = store or storage(), offset, shape, strides, False, call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", *args)


def program(value, protocol=2) -> bytes:
    return op.PROTO + bytes([protocol]) + emit(value) + op.STOP


SIX = np.arange(6, dtype=np.float32)


def zip_bytes(pickle: bytes, storages=None, kind=zipfile.ZIP_STORED, **more: str) -> bytes:
    out = io.BytesIO()
    entries = [("archive/data.pkl", pickle), ("archive/byteorder", "little")]
    entries += [(f"archive/data/{k}", v.tobytes()) for k, v in ({"0": SIX} if storages is None else storages).items()]
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in [*entries, *more.items()]:
            # ZipInfo's date is fixed: today's would make other tests' names in each of pytest's processes.
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return out.getvalue()


def legacy_bytes(pickle: bytes, storages=None, little=True, magic=torchfile.LEGACY_MAGIC) -> bytes:
    if storages is None:
        storages = {"0": SIX} if emit("storage") in pickle else {}
    head = [program(magic), program(1001), program({"little_endian": little}), pickle, program(list(storages))]
    return b"".join(head) + b"".join(struct.pack("<q", a.size) + a.tobytes() for a in storages.values())


FORMATS = {"zip": zip_bytes, "legacy": legacy_bytes}


@pytest.fixture
def load(tmp_path):
    """Writes bytes to a file and reads it."""

    def load(data: bytes):
        (tmp_path / "model.pth").write_bytes(data)
        return read(tmp_path / "model.pth")

    return load


@pytest.fixture
def refused(load):
    """The message with which a file of these bytes is refused."""

    def refused(data: bytes, match: str) -> str:
        with pytest.raises(WeightsError, match=match) as info:
            load(data)
        assert "model.pth" in str(info.value)
        return str(info.value)

    return refused


@pytest.fixture(params=FORMATS)
def in_format(request):
    return FORMATS[request.param]


# --- What is read.


def test_state_dict(load, in_format):
    weights = call("collections.OrderedDict")
    weights = Raw(weights + op.MARK + emit("fc.weight") + tensor() + op.SETITEMS)
    weights = build(weights, {"_metadata": call("collections.OrderedDict")})
    saved = load(in_format(program({"state_dict": weights, "epoch": 3, "best": 0.5, "names": ["a", None, (True,)]})))
    assert (saved["epoch"], saved["best"], saved["names"]) == (3, 0.5, ["a", None, (True,)])
    assert type(saved["state_dict"]) is OrderedDict
    array = saved["state_dict"]["fc.weight"]
    np.testing.assert_array_equal(array, SIX.reshape(2, 3), strict=True)
    assert array.flags.c_contiguous
    assert array.flags.writeable


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ((0, (3, 2), (1, 3)), SIX.reshape(2, 3).T),
        ((4, (2,), (1,)), SIX[4:]),
        ((5, (), ()), SIX[5]),
        ((1, (2, 2), (2, 1)), [[1, 2], [3, 4]]),
        ((0, (1, 6), (2**61, 1)), SIX[None]),  # the stride of a dimension of one counts for nothing
        ((0, (0, 5), (5, 1)), np.empty((0, 5))),
    ],
)
def test_views(load, in_format, view, expected):
    array = load(in_format(program(tensor(storage(), *view))))
    np.testing.assert_array_equal(array, np.asarray(expected, np.float32), strict=True)
    assert array.flags.c_contiguous


def test_shared_storage(load, in_format):
    """Tied names share an array, as they share memory in torch; different views never share memory."""
    saved = load(in_format(program({"a": tensor(), "b": tensor(), "c": tensor(None, 0, (6,), (1,))})))
    assert saved["a"] is saved["b"]
    assert not np.shares_memory(saved["a"], saved["c"])


def test_extras(load, in_format):
    dtype = build(call("numpy.dtype", "f8", False, True), (3, "<", None, None, None, -1, -1, 0))
    raw = call("_codecs.encode", struct.pack("<d", 91.5).decode("latin1"), "latin1")
    scalar = call("numpy.core.multiarray.scalar", dtype, raw)
    namespace = build(Raw(glob("argparse.Namespace") + op.EMPTY_TUPLE + op.NEWOBJ), {"lr": 0.1})
    extras = {
        "best_acc": scalar,
        "args": namespace,
        "milestones": call("collections.Counter", {30: 1}),
        "size": call("torch.Size", (1, 2)),
        "device": call("torch.device", "cuda", 0),
        "dtype": glob("torch.bfloat16"),
        "old": call("torch._utils._rebuild_tensor", storage(), 0, (6,), (1,)),
        "parameter": call("torch._utils._rebuild_parameter", tensor(), True, call("collections.OrderedDict")),
        "python2": Raw(op.SHORT_BINSTRING + b"\x03abc"),
        "ordered": call("collections.OrderedDict", [["k", 1]]),
    }
    saved = load(in_format(program(extras)))
    np.testing.assert_array_equal(saved.pop("old"), SIX)
    np.testing.assert_array_equal(saved.pop("parameter"), SIX.reshape(2, 3))
    assert type(saved["best_acc"]) is float
    assert saved.pop("dtype").name == "bfloat16"
    assert saved == {
        "best_acc": 91.5, "args": {"lr": 0.1}, "milestones": {30: 1}, "size": (1, 2), "device": ("cuda", 0),
        "python2": "abc", "ordered": {"k": 1},
    }  # fmt: skip


def test_protocol_4(load, in_format):
    text = lambda s: op.SHORT_BINUNICODE + bytes([len(s)]) + s.encode()  # noqa: E731
    body = Raw(text("collections") + op.MEMOIZE + text("OrderedDict") + op.STACK_GLOBAL + op.EMPTY_TUPLE + op.REDUCE)
    body = Raw(op.FRAME + struct.pack("<Q", len(body)) + body)
    assert load(in_format(program(body, protocol=4), {})) == {}


def test_storage_view_of_the_legacy_format(load):
    window = storage("0", "Float", 6, ("9", 2, 3))
    np.testing.assert_array_equal(load(legacy_bytes(program(tensor(window, 1, (2,), (1,))))), SIX[3:5])


def test_bool_bytes_become_bools(load, in_format):
    data = {"0": np.array([0, 1, 2, 255], np.uint8)}
    array = load(in_format(program(tensor(storage("0", "Bool", 4), 0, (4,), (1,))), data))
    assert array.view(np.uint8).tolist() == [0, 1, 1, 1]


def test_checkpoint_of_many_tensors(load):
    """The steps of a pickle suffice for what has few bytes a tensor."""
    count = 5000
    tensors = {f"{i}": tensor(storage(f"{i}", "Long", 1), 0, (), ()) for i in range(count)}
    saved = load(legacy_bytes(program(tensors), {f"{i}": np.array([i]) for i in range(count)}))
    assert [int(array) for array in saved.values()] == list(range(count))


# --- Objects of classes that nobody imports.


def module(kind: str, tensors=None, modules=None, **attributes) -> Raw:
    """As torch.nn.Module pickles itself."""
    state = {"training": True, "_parameters": tensors or {}, "_buffers": {}, "_modules": modules or {}} | attributes
    return build(Raw(glob(kind) + op.EMPTY_TUPLE + op.NEWOBJ), state)


def test_a_module_saved_whole(load, in_format):
    hooks = {"_forward_hooks": call("collections.OrderedDict"), "act": glob("torch.nn.functional.relu")}
    conv = module("torch.nn.modules.conv.Conv2d", {"weight": tensor(), "bias": None}, stride=(2, 2), **hooks)
    net = module("__main__.Net", {"scale": tensor(None, 0, (6,), (1,))}, {"0": conv, "none": None})
    saved = load(in_format(program({"model": net, "epoch": 3})))
    assert saved["epoch"] == 3
    assert saved["model"].kind == "__main__.Net"
    assert list(saved["model"]) == ["scale", "0.weight"]
    np.testing.assert_array_equal(saved["model"]["0.weight"], SIX.reshape(2, 3))
    assert saved["model"].settings["0"] == {
        "class": "torch.nn.modules.conv.Conv2d", "training": True, "stride": (2, 2),
    }  # fmt: skip


def test_the_class_of_a_module_in_the_legacy_format(load):
    """Named beside its source code, which is not looked at."""
    kind = Raw(emit(("module", glob("__main__.Net"), "/home/me/net.py", "class Net: ...")) + op.BINPERSID)
    state = {"_parameters": {"w": tensor()}, "_buffers": {}, "_modules": {}}
    saved = load(legacy_bytes(program(build(Raw(kind + op.EMPTY_TUPLE + op.NEWOBJ), state))))
    assert list(saved) == ["w"]


def test_torchscript(load):
    """Its attributes are tensors and modules; code may be compressed, and is not read."""
    inner = build(Raw(glob("__torch__.Conv") + op.EMPTY_TUPLE + op.NEWOBJ), {"weight": tensor(), "training": False})
    outer = build(
        Raw(glob("__torch__.Net") + op.EMPTY_TUPLE + op.NEWOBJ),
        {"conv": inner, "sizes": call("torch.jit._pickle.build_intlist", [1])},
    )
    data = zip_bytes(program(outer), None, **{"archive/constants.pkl": "", "archive/version": "6"})
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("archive/code/__torch__.py", "class Net: ..." * 100, zipfile.ZIP_DEFLATED)
    saved = load(out.getvalue())
    np.testing.assert_array_equal(saved["conv.weight"], SIX.reshape(2, 3))
    assert list(saved) == ["conv.weight"]


def test_objects_beside_the_tensors(load, in_format):
    """As plain data: what a script keeps of its arguments does not keep its weights from being read."""
    new = lambda name: Raw(glob(name) + op.EMPTY_TUPLE + op.NEWOBJ)  # noqa: E731
    array = build(
        call("numpy.core.multiarray._reconstruct", glob("numpy.ndarray"), (0,), "b"),
        (
            1,
            (2,),
            call("numpy.dtype", "f8"),
            False,
            call("_codecs.encode", np.ones(2).tobytes().decode("latin1"), "latin1"),
        ),
    )
    extras = {
        "w": tensor(),
        "args": build(new("my.Config"), {"lr": 0.1, "strides": (1, 2)}),
        "dict": Raw(new("easydict.EasyDict") + op.MARK + emit("arch") + emit("resnet18") + op.SETITEMS),
        "list": Raw(new("omegaconf.ListConfig") + op.MARK + emit(1) + emit(2) + op.APPENDS),
        "path": call("pathlib.PosixPath", "home"),
        "function": glob("my.function"),
        "best": array,
        "by object": Raw(
            op.EMPTY_DICT
            + op.MARK
            + new("my.Key")
            + emit(1)
            + emit((1, 2))
            + emit(2)
            + emit("c")
            + emit(3)
            + op.SETITEMS
        ),
    }
    saved = load(in_format(program(extras)))
    np.testing.assert_array_equal(saved.pop("w"), SIX.reshape(2, 3))
    np.testing.assert_array_equal(saved.pop("best"), [1.0, 1.0])
    assert saved == {
        "args": {"lr": 0.1, "strides": (1, 2)}, "dict": {"arch": "resnet18"}, "list": [1, 2], "path": None,
        "function": None, "by object": {"c": 3},
    }  # fmt: skip


def test_objects_that_hold_one_another(load, refused, in_format, monkeypatch):
    """A trainer and its callbacks; modules in modules by memo references, 2^60 of them in few bytes."""
    me = put(Raw(glob("my.Trainer") + op.EMPTY_TUPLE + op.NEWOBJ), 0)
    saved = load(in_format(program(build(me, {"model": tensor(), "self": get(0)}))))
    assert saved["self"] is None
    loop = put(Raw(glob("my.Net") + op.EMPTY_TUPLE + op.NEWOBJ), 0)
    state = {"_parameters": {"w": tensor()}, "_buffers": {}, "_modules": {"self": get(0)}}
    refused(in_format(program(build(loop, state))), "contains itself")
    monkeypatch.setattr(unpickle, "FREE_STEPS", 20_000)
    nets = [put(module("my.Net", {"w": tensor()}), 0)]
    nets += [put(module("my.Net", {}, {"a": get(i), "b": get(i)}), i + 1) for i in range(60)]
    refused(in_format(program(nets)), "builds too many objects")


def test_copies_of_arrays_are_paid_for(refused, in_format, monkeypatch):
    monkeypatch.setattr(unpickle, "FREE_STEPS", 20_000)
    raw = put(call("_codecs.encode", "x" * 80_000, "latin1"), 0)
    one = lambda i: build(  # noqa: E731
        call("numpy.core.multiarray._reconstruct", glob("numpy.ndarray"), (0,), "b"),
        (1, (10_000,), call("numpy.dtype", "f8"), False, raw if i == 0 else get(0)),
    )
    refused(in_format(program([tensor(), *map(one, range(100))])), "builds too many objects")


# --- Files of other kinds.


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "web page"),
        (bytes(257) + b"ustar\x0000" + bytes(248), "tar archive"),
        (struct.pack("<Q", 40) + b'{"__metadata__":{}}', "safetensors"),
        (b"Not Found", "not a file of torch.save"),
        (program({"a": 1}), "a pickle, but not written by torch.save"),
        (zip_bytes(program(1), {}, **{"archive/archive_format": "pt2"}), "a program of torch.export"),
        (zip_bytes(program(1), {}, **{"other/data.pkl": ""}), "not of torch.save"),
        (zip_bytes(program(1), {})[:100], "truncated"),
        (legacy_bytes(program(1), {}, little=False), "big-endian"),
        (zip_bytes(program(1), {}).replace(b"little", b"tittle"), "CRC"),
    ],
)  # fmt: skip
def test_other_files(refused, data, match):
    refused(data, match)


def test_big_endian_archive(refused):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", program(1))
        archive.writestr("a/byteorder", "big")
    refused(out.getvalue(), "big-endian")


def test_missing_and_folder(tmp_path):
    with pytest.raises(WeightsError, match=r"nothing\.pth cannot be read \(No such file"):
        read(tmp_path / "nothing.pth")
    with pytest.raises(WeightsError, match="is a folder"):
        read(str(tmp_path))
    with pytest.raises(WeightsError):
        read("nul\0byte")


# --- Hostile pickles, each in both formats.


@pytest.mark.parametrize(
    "name", ["os.system", "posix.system", "builtins.eval", "builtins.getattr", "operator.attrgetter"]
)
def test_forbidden_globals(refused, in_format, tmp_path, name):
    order = f"touch {tmp_path}/ran" if "system" in name else f"open('{tmp_path}/ran', 'w')"
    message = refused(in_format(program(call(name, order))), f"forbidden global {name},")
    assert "torch.save(model.state_dict()" in message
    assert not (tmp_path / "ran").exists()


def test_forbidden_global_of_protocol_4(refused, in_format):
    refused(in_format(program(Raw(emit("os") + emit("system") + op.STACK_GLOBAL), 4)), r"forbidden global os\.system,")


def test_whole_module(refused, in_format):
    model = Raw(glob("torchvision.models.resnet.ResNet") + op.EMPTY_TUPLE + op.NEWOBJ)
    refused(in_format(program(build(model, {"training": True}))), r"resnet\.ResNet.*model\.state_dict\(\)")


ORDER = call("os.system", "true")
PLACES = {
    "value": {"weight": ORDER},
    "key": Raw(op.EMPTY_DICT + ORDER + op.NONE + op.SETITEM),
    "list": [[ORDER]],
    "tuple": (1, (ORDER,)),
    "state": build(call("collections.OrderedDict"), ORDER),
    "namespace": build(Raw(glob("argparse.Namespace") + op.EMPTY_TUPLE + op.NEWOBJ), {"lr": ORDER}),
    "argument": call("collections.OrderedDict", [["k", ORDER]]),
    "arguments": Raw(glob("collections.OrderedDict") + ORDER + op.REDUCE),
    "function": Raw(call("builtins.getattr", glob("os"), "system") + emit(("true",)) + op.REDUCE),
    "new": Raw(ORDER + emit(()) + op.NEWOBJ),
    "hooks": call("torch._utils._rebuild_tensor_v2", storage(), 0, (2, 3), (3, 1), False, ORDER),
    "shape": tensor(None, 0, ORDER),
    "parameter": call("torch._utils._rebuild_parameter", ORDER, True, None),
    "storage": Raw(ORDER + op.BINPERSID),
    "storage type": Raw(emit(("storage", ORDER, "0", "cpu", 6)) + op.BINPERSID),
    "location": Raw(emit(("storage", glob("torch.FloatStorage"), "0", ORDER, 6)) + op.BINPERSID),
    "discarded": Raw(put(ORDER, 0) + emit({"weight": 1})),
}


@pytest.mark.parametrize("place", PLACES)
def test_code_in_every_place(refused, in_format, place):
    """Nested in whatever a pickle is built of."""
    refused(in_format(program(PLACES[place])), r"forbidden global (os\.system|builtins\.getattr),")


@pytest.mark.parametrize("number", range(5))
def test_code_in_every_pickle_of_the_legacy_format(refused, number):
    parts = [program(torchfile.LEGACY_MAGIC), program(1001), program({"little_endian": True}), GOOD, program(["0"])]
    parts[number] = program(ORDER)
    refused(b"".join(parts) + struct.pack("<q", 6) + SIX.tobytes(), r"forbidden global os\.system,")


def test_attribute_of_an_allowed_global(refused, in_format):
    name = "collections.OrderedDict.__init__.__globals__"
    refused(in_format(program(Raw(emit("collections") + emit(name[12:]) + op.STACK_GLOBAL), 4)), "forbidden global")


HOSTILE = [
    (call("torch._utils._rebuild_parameter", call("os.system", "true")), "forbidden"),  # nested
    (Raw(emit("eval") + emit(("1",)) + op.REDUCE), "expected function, found str"),
    (Raw(call("collections.OrderedDict") + emit(()) + op.REDUCE), "expected function, found OrderedDict"),
    (call("collections.OrderedDict", 5), "expected tuple, found int"),
    (call("_codecs.encode", "x", "rot13"), "another encoding"),
    (call("numpy.core.multiarray.scalar", call("numpy.dtype", "O"), "12345678"), "'O'"),
    (call("numpy.core.multiarray.scalar", "f8", "12345678"), "not a number"),
    (call("numpy.core.multiarray.scalar", glob("torch.float64"), Raw(op.SHORT_BINBYTES + b"\x01a")), "not a number"),
    (build(call("numpy.dtype", "f8"), (3, ">")), "big-endian"),
    (build([], {"__setstate__": 1}), "sets attributes of a list"),
    (build(glob("torch.float32"), {"names": 1}), "expected tuple, found dict"),
    (build(glob("collections.OrderedDict"), {"__init__": 1}), "sets attributes of a function"),
    (build(tensor(), {"shape": (9,)}), "sets attributes of a _Tensor"),
    (Raw(op.MARK + emit("ls") + op.INST + b"os\nsystem\n"), "opcode 0x69"),
    (Raw(op.MARK + glob("collections.OrderedDict") + op.OBJ), "opcode 0x6f"),
    (Raw(glob("collections.OrderedDict") + emit(()) + emit({}) + op.NEWOBJ_EX), "opcode 0x92"),
    (Raw(op.EXT1 + b"\x01"), "opcode 0x82"),
    (Raw(op.EXT4 + b"\x01\0\0\0"), "opcode 0x84"),
    (Raw(op.PERSID + b"1\n"), "opcode 0x50"),
    (Raw(op.INT + b"1\n"), "opcode 0x49"),
    (Raw(op.LONG4 + struct.pack("<i", 1 << 30)), "opcode 0x8b"),
    (Raw(op.BINUNICODE8 + struct.pack("<Q", 1 << 62)), "more bytes"),
    (Raw(op.BINBYTES8 + struct.pack("<Q", (1 << 64) - 1)), "more bytes"),
    (Raw(op.BINSTRING + struct.pack("<i", -5)), "more bytes"),
    (Raw(op.FRAME + struct.pack("<Q", 1 << 60) + op.NONE), "frame of"),
    (Raw(op.PROTO + b"\x09" + op.NONE), "protocol or frame of 9"),
    (get(7), "KeyError"),
    (Raw(b""), "IndexError"),
    (Raw(op.TUPLE), "IndexError"),
    (Raw(op.BINUNICODE + b"\x01\0\0\0\xff"), "UnicodeDecodeError"),
    (Raw(op.EMPTY_DICT + op.MARK + op.NONE + op.SETITEMS), "zip"),
    (Raw(op.EMPTY_DICT + emit([]) + op.NONE + op.SETITEM), "expected str, found list"),
    (Raw(op.EMPTY_DICT + emit((1 << 61) - 1 << 61) + op.NONE + op.SETITEM), "64 bits"),
    (Raw(op.NONE + op.NONE + op.APPEND), "expected list, found NoneType"),
    (Raw(emit([1]) + emit(0) + emit(5) + op.SETITEM), "expected dict, found list"),
    (Raw(emit(5) + op.BINPERSID), "expected tuple, found int"),
    (Raw(emit(("module", glob("torch.FloatStorage"), "0", "cpu", 6)) + op.BINPERSID), "that is not a storage"),
    (Raw(emit(("module", None, "0", "cpu", 6)) + op.BINPERSID), "that is not a storage"),
    (storage(), "a storage or a function where a value"),
    ({"f": glob("_codecs.encode")}, "a storage or a function where a value"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "match"), HOSTILE)
def test_hostile_pickles(refused, in_format, body, match):
    refused(in_format(program(body)), match)


@pytest.mark.parametrize(
    ("view", "match"),
    [
        ((0, (1 << 40,), (1,)), "larger than its storage"),
        ((0, (1 << 40,), (0,)), "larger than its storage"),  # four bytes expanded to terabytes
        ((0, (1 << 40, 1 << 40), (0, 0)), "larger than its storage"),
        ((6, (1,), (1,)), "larger than its storage"),
        ((5, (2,), (1,)), "larger than its storage"),
        ((0, (2, 4), (2, 1)), "larger than its storage"),  # overlapping rows, eight elements of six
        ((1 << 61, (1,), (1,)), "larger than its storage"),
        ((-1, (1,), (1,)), "negative"),
        ((5, (6,), (-1,)), "negative"),
        ((0, (-1, -6), (1, 1)), "negative"),
        ((0, (1 << 70, 0), (1, 1)), "huge"),
        ((0, (2, 3), (1,)), "missing size"),
        ((0, (True,), (1,)), "missing size"),
        ((0, (1,) * 33, (1,) * 33), "missing size"),
        ((0, (2.0,), (1,)), "missing size"),
        ((0, (0, 1 << 61), (1, 1)), "damaged"),  # an empty array that numpy cannot describe
    ],
)  # fmt: skip
def test_tensor_outside_its_storage(refused, in_format, view, match):
    refused(in_format(program(tensor(storage(), *view))), match)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ([tensor(), tensor(storage("0", "Double", 3), 0, (3,), (1,))], "two types or sizes"),
        ([tensor(), tensor(storage("0", "Float", 7))], "two types or sizes"),
        (tensor(storage("0", "Float", -1), 0, (0,), (1,)), "that is not a storage"),
        (tensor(storage("0", "Float", 6, ("1", 4, 3)), 0, (1,), (1,)), "that is not a storage"),
        (tensor(storage("0", "Float", 1 << 50)), "truncated"),
        (tensor(storage("0", "Float", 7)), "of 28 bytes|two sizes"),
        (tensor(storage("1")), "of 24 bytes|storages that differ"),
        (tensor(storage("../../etc/passwd")), "of 24 bytes|storages that differ"),
        (call("torch._utils._rebuild_tensor_v3", storage(), 0, (), (), False, None, glob("torch.float64")), "reinterp"),
        (call("torch._utils._rebuild_tensor_v2", storage(), 0, (3,), (1,), False, None, {"conj": True}), "lazy"),
        ([tensor(None, i, (6 - i - j,), (1,)) for i in range(6) for j in range(6 - i)], "has 224 bytes of tensors"),
    ],
)  # fmt: skip
def test_storages_that_do_not_fit(refused, in_format, body, match):
    refused(in_format(program(body)), match)


RECURSIVE = {
    "dict": Raw(put(Raw(op.EMPTY_DICT), 0) + emit("self") + get(0) + op.SETITEM),
    "list": Raw(put(Raw(op.EMPTY_LIST), 0) + get(0) + op.APPEND),
    "list by tuple": Raw(put(Raw(op.EMPTY_LIST), 0) + get(0) + op.TUPLE1 + op.APPEND),
    "lists": Raw(put([], 0) + put([get(0)], 1) + op.TUPLE2 + get(0) + get(1) + op.APPEND + op.TUPLE2),
    "ordered": Raw(put(call("collections.OrderedDict"), 0) + emit("self") + get(0) + op.SETITEM),
    "namespace": Raw(
        put(call("argparse.Namespace"), 0) + op.EMPTY_DICT + emit("self") + get(0) + op.SETITEM + op.BUILD
    ),
}


@pytest.mark.parametrize("kind", RECURSIVE)
def test_recursive_structures(refused, in_format, kind):
    refused(in_format(program(RECURSIVE[kind])), "contains itself")


def test_deep_nesting(load, refused, in_format):
    deep = lambda levels: program(Raw(op.EMPTY_TUPLE + levels * op.TUPLE1))  # noqa: E731
    load(in_format(deep(torchfile.MAX_DEPTH), {}))
    refused(in_format(deep(torchfile.MAX_DEPTH + 1)), "nested deeper")
    refused(in_format(deep(100_000)), "nested deeper")


def test_billion_laughs(refused, in_format, monkeypatch):
    """Lists in lists by memo references: a few bytes, and 2^60 values for who walks over them."""
    monkeypatch.setattr(unpickle, "FREE_STEPS", 20_000)
    body = put([], 0)
    for i in range(60):
        body = Raw(body + put([get(i), get(i)], i + 1))
    refused(in_format(program(body)), "builds too many objects")


@pytest.mark.parametrize(
    "copy",
    [
        Raw(glob("collections.OrderedDict") + get(0) + op.TUPLE1 + op.REDUCE),
        Raw(op.EMPTY_DICT + get(1) + op.BUILD),
        Raw(glob("_codecs.encode") + get(2) + emit("latin1") + op.TUPLE2 + op.REDUCE),
    ],
)
def test_copies_are_paid_for(refused, in_format, monkeypatch, copy):
    """A large value in the memo, copied by ever so few bytes."""
    monkeypatch.setattr(unpickle, "FREE_STEPS", 20_000)
    pairs = put([(i, None) for i in range(500)], 0) + put(dict.fromkeys(range(500)), 1) + put("x" * 100_000, 2)
    refused(in_format(program(Raw(pairs + copy * 200))), "builds too many objects")


def test_pickle_longer_than_allowed(refused, in_format, monkeypatch):
    monkeypatch.setattr(torchfile, "MAX_PICKLE", 1000)
    refused(in_format(program("x" * 1000)), "more than 1,000 bytes|first 1,000 bytes")


# --- Hostile archives.

GOOD = program({"w": tensor(), "epoch": 7})


def directory(data: bytes, name: str) -> int:
    """Where the directory's record of an entry begins."""
    return data.rindex(name.encode()) - 46


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entry(refused, kind):
    refused(zip_bytes(GOOD, kind=kind), "compressed or encrypted")


def test_decompression_bomb(refused):
    """64 MiB of zeros in 64 KiB: refused by its directory, before a byte is inflated."""
    data = zip_bytes(GOOD, {"0": np.zeros(1 << 23)}, zipfile.ZIP_DEFLATED)
    assert len(data) < 1 << 17
    tracemalloc.start()
    try:
        refused(data, "compressed or encrypted")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_encrypted_entry(refused):
    data = bytearray(zip_bytes(GOOD))
    data[directory(data, "archive/data/0") + 8] |= 1
    refused(bytes(data), "compressed or encrypted")


@pytest.mark.parametrize("name", ["archive/data/0", "archive/data.pkl", "archive/byteorder"])
def test_duplicate_entry(refused, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns the writer
        data = zip_bytes(GOOD, **{name: "another"})
    refused(data, "two entries of one name")


def test_duplicate_entry_behind_a_zero_byte(refused):
    """zipfile ends a name at its first zero byte, and another reader may not."""
    data = zip_bytes(GOOD, **{"archive/data/0_": "another"})
    refused(data.replace(b"archive/data/0_", b"archive/data/0\0"), "two entries of one name")


def test_two_names_of_one_entry(refused):
    """The directory calls it what its own header does not."""
    data = bytearray(zip_bytes(program(tensor(storage("1")))))
    at = directory(data, "archive/data/0") + 46
    data[at : at + 14] = b"archive/data/1"
    refused(bytes(data), "File name in directory")


@pytest.mark.parametrize("name", ["../evil", "archive/../../evil", "/etc/evil", "archive\\..\\evil"])
def test_path_traversal(refused, name):
    refused(zip_bytes(GOOD, **{name: "x"}), "leads out of the archive")


def test_overlapping_entries(refused):
    """Two names for the same bytes, as zip bombs have them."""
    data = bytearray(zip_bytes(GOOD, {"0": SIX, "1": SIX}))
    first, second = directory(data, "archive/data/0"), directory(data, "archive/data/1")
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    refused(bytes(data), "overlaps")


def test_partly_overlapping_entries(refused):
    """A storage that begins inside the one before it: its header lies in the other's bytes."""
    inner = zip_bytes(GOOD, {"1": SIX})
    header = inner[inner.index(b"archive/data/1") - 30 :][:44]
    data = bytearray(zip_bytes(GOOD, {"0": np.frombuffer(header + SIX.tobytes(), np.uint8), "1": SIX}))
    at = directory(data, "archive/data/1") + 42
    data[at : at + 4] = struct.pack("<I", data.index(header))
    refused(bytes(data), "overlaps")


def test_entry_larger_than_the_file(refused):
    data = bytearray(zip_bytes(GOOD))
    at = directory(data, "archive/data/0") + 20
    data[at : at + 8] = struct.pack("<II", 1 << 30, 1 << 30)
    refused(bytes(data), "overlaps another or the end")


def test_directory_larger_than_its_file_explains(refused, monkeypatch):
    monkeypatch.setattr(torchfile, "MAX_DIRECTORY", 1000)
    refused(zip_bytes(GOOD, {}, **{f"archive/{i}": "" for i in range(100)}), "directory larger")


def zip64(data: bytes, length: int, record=b"PK\6\6") -> bytes:
    """The archive with zip64 records, as torch writes them, that give its directory this many bytes."""
    entries, end = struct.unpack("<H", data[-12:-10])[0], data[-22:]
    size, offset = struct.unpack("<II", end[12:20])
    sizes = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, entries, entries, length or size, offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(data) - 22, 1)
    return data[:-22] + record + sizes + locator + end


def test_zip64(load, refused):
    assert load(zip64(zip_bytes(GOOD), 0))["epoch"] == 7
    refused(zip64(zip_bytes(GOOD), 10 << 20), "directory larger")
    refused(zip64(zip_bytes(GOOD), 0, record=b"PK\6\0"), "truncated")


def test_zip64_offset_beyond_any_file(refused):
    data = zip_bytes(GOOD)
    at = directory(data, "archive/data/0")
    extra = struct.pack("<HHQ", 1, 8, 1 << 63)
    header = bytearray(data[at : at + 46 + 14])
    header[30:32], header[42:46] = struct.pack("<H", len(extra)), b"\xff" * 4
    end = bytearray(data[at + 60 :])
    end[12:16] = struct.pack("<I", struct.unpack("<I", end[12:16])[0] + len(extra))
    refused(data[:at] + bytes(header) + extra + bytes(end), "offset-sized integer")


def test_legacy_goes_on(refused):
    refused(legacy_bytes(GOOD) + b"\0", "data after its last storage")


def test_legacy_storage_listed_twice(refused):
    data = legacy_bytes(GOOD).replace(program(["0"]), program(["0", "0"])) + struct.pack("<q", 6) + SIX.tobytes()
    refused(data, "storages that differ")


# --- Damage: every truncation and every flipped byte of every file of a small corpus.

CHECKPOINT = program(
    {
        "state_dict": {"a": tensor(), "tied": tensor(), "column": tensor(None, 1, (2,), (3,))},
        "half": tensor(storage("1", "Half", 12), 4, (4, 2), (1, 4)),
        "truth": tensor(storage("2", "Bool", 6), 0, (6,), (1,)),
        "best": call(
            "numpy.core.multiarray.scalar", call("numpy.dtype", "i4"), call("_codecs.encode", "abcd", "latin1")
        ),
        "args": [None, True, 0.1, ("x", 1 << 40)],
    }
)
STORAGES = {"0": SIX, "1": np.arange(12, dtype=np.float16), "2": np.arange(6, dtype=np.uint8)}
WINDOW = program({"w": tensor(storage("0", "Float", 6, ("9", 2, 3)), 1, (2,), (1,))})
CORPUS = {
    "zip": zip_bytes(GOOD),
    "zip64": zip64(zip_bytes(GOOD), 0),
    "zip checkpoint": zip_bytes(CHECKPOINT, STORAGES),
    "legacy": legacy_bytes(GOOD),
    "legacy checkpoint": legacy_bytes(CHECKPOINT, STORAGES),
    "legacy window": legacy_bytes(WINDOW),
}


def equal(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", CORPUS)
def test_every_truncation_is_found(load, refused, name):
    data = CORPUS[name]
    load(data)
    for length in range(len(data)):
        refused(data[:length], "model.pth")


@pytest.mark.parametrize("name", CORPUS)
def test_flipped_bytes(load, name):
    """In an archive each is found or harmless; in the legacy format a number may change, and nothing worse happens."""
    data = CORPUS[name]
    whole = load(data)
    outcomes = []
    for position in range(len(data)):
        for mask in (0x01, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= mask
            try:
                saved = load(bytes(damaged))
            except WeightsError:
                outcomes.append(False)
            else:
                outcomes.append(True)
                assert name.startswith("legacy") or equal(saved, whole)
    assert 0 < sum(outcomes) < 2 * len(outcomes) // 3


ARENA = """
import os, random, resource, sys
from jresnet.pytorch.torchfile import read
from jresnet.errors import WeightsError

folder, damaged = sys.argv[1:]
events, outcomes = set(), []

def attempt(path):
    try:
        read(path)
        outcomes.append("read")
    except WeightsError:
        outcomes.append("refused")

paths = sorted(entry.path for entry in os.scandir(folder))
for path in paths:  # what is imported and cached once
    attempt(path)
random.Random("")  # imports a hash function on Python 3.13
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20),) * 2)
sys.addaudithook(lambda event, details: events.add(f"{event} {details[0]}" if event in ("open", "import") else event))
for path in paths:
    attempt(path)
    if os.path.basename(path).startswith("good"):
        content, draw = open(path, "rb").read(), random.Random(path)
        for position, byte in enumerate(content):
            new = draw.choice((byte ^ 0x80, 0, 255, draw.randrange(256)))
            with open(damaged, "wb") as file:
                file.write(content[:position] + bytes([new]) + content[position + 1 :])
            attempt(damaged)
print(len(outcomes), outcomes.count("refused"))
print(*sorted(events), sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and address space limits are Linux's")
def test_nothing_runs_and_nothing_large_is_allocated(tmp_path):
    """The hostile corpus, and the good one with each of its bytes replaced in turn, in a process that may take 64 MiB more
    than it has, and whose audit events (imports, code compiled or executed, processes, sockets, files) are recorded."""
    hostile = [*PLACES.values(), *RECURSIVE.values(), *(body for body, _ in HOSTILE)]
    files = {f"good {name}": data for name, data in CORPUS.items()}
    files |= {f"{kind} {i}": FORMATS[kind](program(body)) for kind in FORMATS for i, body in enumerate(hostile)}
    folder, damaged = tmp_path / "files", tmp_path / "damaged"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    command = [sys.executable, "-c", ARENA, str(folder), str(damaged)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    counts, *events = done.stdout.splitlines()
    attempts, refused = map(int, counts.split())
    assert attempts == 2 * len(files) + sum(map(len, CORPUS.values()))
    assert refused > 4 * len(hostile) + attempts // 4
    assert set(events) <= {f"open {path}" for path in (*(folder / name for name in files), damaged)}


# --- Fuzzing: whatever the bytes, an object or a WeightsError.


@pytest.fixture(scope="module")
def survives(tmp_path_factory):
    path: Path = tmp_path_factory.mktemp("fuzz") / "model.pth"

    def survives(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(WeightsError):
            read(path)

    return survives


OPCODES = [
    getattr(op, name) for name in dir(op) if isinstance(getattr(op, name), bytes) and len(getattr(op, name)) == 1
]
FRAGMENTS = [
    *OPCODES, tensor(), storage(), emit({"a": [1, (2.0,)]}), emit("latin1"), emit(()), put([], 0), get(0), b"\0\0\0\0",
    *(glob(name) for name in torchfile._GLOBALS), call("numpy.dtype", "f8"), emit(1 << 100),
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([b"", b"PK\3\4", b"\x80\2", program(torchfile.LEGACY_MAGIC)]), st.binary(max_size=300))
def test_random_bytes(survives, start, rest):
    survives(start + rest)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(FORMATS)), st.lists(st.sampled_from(FRAGMENTS), max_size=40))
def test_random_programs(survives, kind, fragments):
    survives(FORMATS[kind](program(Raw(b"".join(fragments)))))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(FORMATS)), st.booleans(), st.data())
def test_random_mutations(survives, kind, inside, data):
    """Spans of a good file replaced; ``inside``: of its pickle, under a checksum that is right."""
    content = GOOD if inside else FORMATS[kind](GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        stop = start + data.draw(st.integers(0, 8))
        content = content[:start] + data.draw(st.binary(max_size=8)) + content[stop:]
    survives(FORMATS[kind](content) if inside else content)


# --- Memory: a small multiple of the file's size beyond a constant, which the first test makes small.


@pytest.mark.parametrize(
    "body",
    [
        Raw(op.EMPTY_DICT * 2_000_000),
        Raw(op.MARK * 2_000_000),
        Raw(op.EMPTY_LIST + op.MEMOIZE * 2_000_000),
        Raw(op.NONE + b"".join(op.LONG_BINPUT + struct.pack("<I", i * 7919) for i in range(400_000))),
        Raw(call("collections.OrderedDict") * 50_000),
        [tensor(None, 0, (1 << 45,), (0,))],
        tensor(storage("0", "Double", 1 << 45), 0, (1 << 45,), (1,)),
        [tensor(storage("0", "Byte", 1 << 16), i, (1 << 15,), (1,)) for i in range(1 << 10)],
    ],
    ids=["dicts", "marks", "memoize", "memo", "calls", "stride 0", "large storage", "views"],
)
def test_memory(refused, in_format, monkeypatch, body):
    monkeypatch.setattr(unpickle, "FREE_STEPS", 10_000)
    data = in_format(program(body), {"0": np.zeros(1 << 16, np.uint8)} if type(body) is list else None)
    tracemalloc.start()
    try:
        refused(data, "builds too many objects|larger than its|truncated|bytes of tensors in")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * len(data) + (4 << 20)


MIB = 1 << 20


@pytest.mark.parametrize(
    ("body", "kind", "factor"),
    [
        ([tensor(storage("0", "Byte", 4 * MIB), 0, (4 * MIB,), (1,))], np.uint8, 1),  # as a state_dict has them
        ([tensor(storage("0", "Byte", 4 * MIB), 0, (2048, 2048), (1, 2048))], np.uint8, 2),  # a copy beside its storage
        ([tensor(storage("0", "Bool", 4 * MIB), 0, (4 * MIB,), (1,))], np.uint8, 3),
        (
            [tensor(storage("0", "Byte", 4 * MIB), 0, (1,) * i + (4 * MIB,), (1,) * (i + 1)) for i in range(4)],
            np.uint8,
            5,
        ),
        ("x" * 4 * MIB + "\U0001f600", None, 7),  # one wide letter makes Python take four bytes for each of the others
    ],
    ids=["state_dict", "transposed", "bool", "four views", "wide string"],
)
def test_memory_of_files_that_are_read(load, in_format, body, kind, factor):
    """A multiple of the file, which the module's docstring states, and two chunks."""
    data = in_format(program(body), {} if kind is None else {"0": np.ones(4 * MIB, kind)})
    tracemalloc.start()
    try:
        load(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < factor * len(data) + 2 * torchfile.CHUNK + len(data) // 100


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and address space limits are Linux's")
def test_memory_limit_of_the_system(tmp_path):
    """The same with nothing made small, in a process that may take 256 MiB more than Python itself."""
    laughs = put([], 0)
    for i in range(60):
        laughs = Raw(laughs + put([get(i), get(i)], i + 1))
    bodies = [
        Raw(op.NONE + op.LONG_BINPUT + b"\xff\xff\xff\x7f"),  # the C unpickler reserves 32 GiB for this memo index
        Raw(op.BINUNICODE8 + struct.pack("<Q", 1 << 40)),
        Raw(op.EMPTY_DICT * 1_000_000),
        laughs,
        tensor(None, 0, (1 << 45,), (0,)),
    ]
    paths = []
    for body, kind in zip(bodies, ["zip", "legacy", "zip", "legacy", "zip"], strict=True):
        paths.append(tmp_path / f"{len(paths)}.pth")
        paths[-1].write_bytes(FORMATS[kind](program(body)))
    script = """
import resource, sys
from jresnet.pytorch.torchfile import read
from jresnet.errors import WeightsError
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (256 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        read(path)
        print("read")
    except WeightsError:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script, *map(str, paths)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["read"] + ["refused"] * 4
