"""Safetensors files from strangers: whatever their bytes, reading gives what they hold or a WeightsError."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import command, randomise
from hypothesis import given, settings
from hypothesis import strategies as st

import jresnet
from jresnet.errors import WeightsError
from jresnet.models import params, zoo
from jresnet.models.config import ResNetConfig
from jresnet.weights import native

TINY = ResNetConfig("basic", (1,), (2,), num_classes=2, in_channels=1, stem="cifar")
CONFIG = json.loads(json.dumps(dataclasses.asdict(TINY)))
ONE = {"a": np.zeros(1, np.float32)}


def raw(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), start: Any = 0, stop: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def claims(config: Any = CONFIG, arch: str = "tiny", values: dict[str, np.ndarray] = ONE) -> bytes:
    """A native file that states this architecture and this configuration, with digests that fit."""
    config = config if isinstance(config, str) else json.dumps(config)
    return safetensors.numpy.save(values, stated(values, config, arch))


def stated(values: dict[str, np.ndarray], config: str, arch: str) -> dict[str, str]:
    return native.sealed(values, {"format": native.FORMAT, "arch": arch, "config": config})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    """A native file of 3 KB: one block of two channels, an architecture that is there for these tests only."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.ZOO, "tiny", zoo.Row("tiny", TINY, 112, 32, 0.0, "these tests"))
        model = jresnet.create("tiny", seed=1)
        randomise(model)
        native.save(path, model, "tiny", source="a test")
        yield path.read_bytes()


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Writes bytes to a file and reads it with a function of ``weights``; None for a WeightsError."""
    path = tmp_path_factory.mktemp("file") / "some.safetensors"

    def read(data: bytes, function: Callable[..., Any] = native.read) -> Any:
        path.write_bytes(data)
        try:
            return function(path)
        except WeightsError:
            return None

    return read


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """The message with which a function of ``weights`` refuses a file of these bytes."""

    def refused(data: bytes, match: str, function: Callable[..., Any] = native.read) -> str:
        (tmp_path / "some.safetensors").write_bytes(data)
        with pytest.raises(WeightsError, match=match) as caught:
            function(tmp_path / "some.safetensors")
        assert "some.safetensors" in str(caught.value)
        return str(caught.value)

    return refused


# --- Damage: every truncation and every flipped byte of a small file.


def test_every_truncation_is_found(tiny: bytes, refused: Callable[..., str]) -> None:
    for length in range(len(tiny)):
        refused(tiny[:length], "not a complete safetensors file")
    refused(tiny + b"\0", "not a complete safetensors file")


def test_flipped_bytes(tiny: bytes, read: Callable[..., Any]) -> None:
    """None gets through, but for what JSON says in two ways."""
    whole = read(tiny)
    for position in range(len(tiny)):
        for mask in (0x01, 0xFF):
            damaged = bytearray(tiny)
            damaged[position] ^= mask
            if (found := read(bytes(damaged))) is not None:
                assert found[:2] == whole[:2]
                assert found[3] == whole[3]
                assert native.digest(found[2]) == native.digest(whole[2])


# --- Hostile headers.


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "header too small"),
        (b"\0" * 7, "header too small"),
        (struct.pack("<Q", 0), "JSON"),
        (struct.pack("<Q", 99_999_999) + b"{}", "invalid header length"),
        (struct.pack("<Q", 1 << 63) + b"{}", "header too large"),
        (b"\xff" * 8 + b"{}", "header too large"),
        (raw(b"null"), "JSON"),
        (raw(b"[]"), "JSON"),
        (raw(b"{"), "JSON"),
        (raw(b'{"\xff": 1}'), "UTF-8"),
        (raw(b'{"\\ud800": 1}'), "JSON"),
        (raw(b'{"a":' + b"[" * 1_000_000), "recursion limit"),
        (raw(b'{"a":' * 100_000), "recursion limit"),
        (raw({"a": 1}), "JSON"),
        (raw({"a": {"dtype": "F32"}}), "JSON"),
        (raw({"a": entry(), "b": entry()}, b"\0" * 8), "invalid offset"),  # the same bytes twice
        (raw({"a": entry(stop=8, shape=(2,)), "b": entry(start=4, stop=8)}, b"\0" * 8), "invalid offset"),
        (raw({"a": entry(start=4, stop=8)}, b"\0" * 8), "invalid offset"),  # a hole
        (raw({"a": entry(start=4, stop=0)}, b"\0" * 4), "invalid offset"),
        (raw({"a": entry(start=-4, stop=0)}, b"\0" * 4), "-4"),
        (raw({"a": entry(stop=1 << 63)}, b"\0" * 4), "offset|shape|not fully covered"),
        (raw({"a": entry()}, b"\0" * 3), "not fully covered"),
        (raw({"a": entry()}, b"\0" * 5), "not fully covered"),
        (raw({"a": entry(shape=(-1,))}, b"\0" * 4), "-1"),
        (raw({"a": entry(shape=(1.0,))}, b"\0" * 4), "floating point"),
        (raw({"a": entry(shape=(True,))}, b"\0" * 4), "boolean"),
        (raw({"a": entry(shape=None)}, b"\0" * 4), "JSON"),
        (raw({"a": entry(shape=(2,))}, b"\0" * 4), "invalid shape"),
        (raw({"a": entry(shape=(1 << 32, 1 << 32))}, b"\0" * 4), "overflow"),
        (raw({"a": entry(shape=(1 << 62, 4), stop=0)}), "overflow"),
        (raw({"a": entry(shape=(1 << 64, 0), stop=0)}), "JSON"),
        (raw({"a": entry(shape=(0, (1 << 64) - 1), stop=0)}), "not a complete safetensors file"),
        (raw({"a": entry(shape=(0, 1 << 62), stop=0)}), "too big"),
        (raw({"a": entry(shape=(1,) * 100)}, b"\0" * 4), "64"),
        (raw({"a": entry("F64")}, b"\0" * 4), "invalid shape"),
        (raw({"a": entry("F33")}, b"\0" * 4), "F33"),
        (raw({"a": entry(32)}, b"\0" * 4), "JSON"),
        (raw(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8), "not fully covered"),
        (raw(b'{"a":{"dtype":"F32","dtype":"F64","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4), "duplicate field"),
        (raw(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate field"),
        (raw({"__metadata__": []}), "JSON"),
        (raw({"__metadata__": {"format": 1}}), "JSON"),
        (raw({"__metadata__": {"format": {"format": "jresnet-1"}}}), "JSON"),
    ],
)  # fmt: skip
def test_hostile_headers(refused: Callable[..., str], data: bytes, match: str) -> None:
    message = refused(data, match, native.read_safetensors)
    assert "is not a complete safetensors file" in message
    refused(data, match)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({str(i): entry(shape=(0,), stop=0) for i in range(50_000)}, "its header has 250,000 texts"),
        ({"__metadata__": {str(i): "" for i in range(150_000)}}, "its header has 300,001 texts"),
        ({"__metadata__": {"a": "x" * (9 << 20)}}, r"its header has 9,437,\d+ bytes"),
    ],
)
def test_headers_that_would_cost_time_and_memory(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, header: dict[str, Any], match: str
) -> None:
    """A million empty tensors took 9 s and 0.5 GB."""
    monkeypatch.delattr("safetensors.safe_open")
    refused(raw(header, b"\0"), match, native.read_safetensors)


def test_the_largest_network_is_far_from_the_bounds() -> None:
    names = params.shapes(zoo.configure("resnet1202_cifar"))
    assert 5 * len(names) < native.MAX_TEXTS / 4
    assert sum(len(name) + 120 for name in names) < native.MAX_HEADER / 4


@pytest.mark.parametrize(
    "data",
    [
        raw({}),
        raw({"__metadata__": None}),
        raw({"a": entry(shape=(1 << 40, 0), stop=0)}),
        raw({"": entry()}, b"\0" * 4),
        raw({"a\0\x1b[2J": entry()}, b"\0" * 4),
        raw(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 4),
        raw(b'{"__metadata__":{"format":"jresnet-1","format":"x"}}'),
    ],
)
def test_odd_headers_hold_what_they_say_and_are_not_native(
    read: Callable[..., Any], refused: Callable[..., str], data: bytes
) -> None:
    values, _ = read(data, native.read_safetensors)
    assert sum(value.nbytes for value in values.values()) <= 4
    refused(data, "is not a jresnet-1 file")


BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8,
    "U64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F4": 1,
    "F6_E2M3": 3, "F6_E3M2": 3,
}  # fmt: skip


@pytest.mark.parametrize("dtype", BYTES)
def test_every_dtype_is_read_or_refused(
    tiny: bytes, read: Callable[..., Any], refused: Callable[..., str], dtype: str
) -> None:
    """Those of ``BYTES`` from F8 on numpy has not; a native file holds float32 only."""
    size = BYTES[dtype]
    shape = {"F4": 2, "F6_E2M3": 4, "F6_E3M2": 4}.get(dtype, 1)
    tensor, data = {"a": entry(dtype, (4 * shape,), 0, 4 * size)}, b"\1" * 4 * size
    found = read(raw(tensor, data), native.read_safetensors)
    if dtype.startswith(("F4", "F6_", "F8_")):
        assert found is None
        return
    values = found[0]
    assert values["a"].tobytes() == data
    metadata = stated(values, json.dumps(CONFIG), "tiny")
    message = refused(raw(tensor | {"__metadata__": metadata}, data), "does not hold a tiny: .* missing")
    assert ("not float32" in message) == (dtype not in ("F32", "F64", "F16", "BF16"))


# --- Hostile metadata: a stranger writes digests that fit, so that the file may say anything.

DEEP = 100_000


@pytest.mark.parametrize(
    "config",
    [
        "", "{", "null", "7", "NaN", '"x"', "[]", "[1, 2, 3, 4]", "{}", "\ufeff{}", "[" * DEEP, '{"a":' * DEEP, "1" * 5000,
        '{"num_classes":' + "9" * 5000 + "}",
        *(
            {**CONFIG, name: value}
            for name in ("num_classes", "in_channels", "depths", "widths", "groups", "conv_bias")
            for value in (-1, 1.5, 2.0, float("inf"), float("nan"), "2", "x" * 100_000, [], {}, [2, 2])
        ),
        *(
            {**CONFIG, name: value}
            for name in ("stem", "shortcut")
            for value in (0, 1 << 64, 1.5, True, "", "x" * 100_000, [], {}, ["cifar"])
        ),
    ],
)  # fmt: skip
def test_configurations_that_are_none(tiny: bytes, refused: Callable[..., str], config: Any) -> None:
    assert len(refused(claims(config), "does not say which network it holds")) < 1000


@pytest.mark.parametrize("arch", ["", "nope", "x" * 100_000, "resnet" * 10_000, "TINY", "../tiny", "tiny\0", "\x1b[2J"])
def test_architectures_that_are_none(tiny: bytes, refused: Callable[..., str], arch: str) -> None:
    message = refused(claims(arch=arch), "does not say which network it holds .unknown architecture")
    assert len(message) < 1000
    assert "\x1b" not in message


@pytest.mark.parametrize("name", ["num_classes", "in_channels"])
@pytest.mark.parametrize("number", [10**9, 1 << 63, 10**400])
def test_a_configuration_alone_allocates_nothing(
    tiny: bytes, refused: Callable[..., str], name: str, number: int
) -> None:
    data = claims({**CONFIG, name: number})
    tracemalloc.start()
    try:
        refused(
            data,
            "does not say which network it holds .(its configuration has .* that its arrays do not have|.* at most)",
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_a_large_head_is_told_from_the_files(
    tiny: bytes, read: Callable[..., Any], refused: Callable[..., str]
) -> None:
    """All tensors are there, but the stated number of classes is not theirs."""
    values = read(tiny)[2]
    refused(claims({**CONFIG, "num_classes": 1}, values=values), r"fc.kernel is \[2, 2\], not \[2, 1\]")
    for name, value in (("num_classes", 10**9), ("widths", [10**9]), ("depths", [10**9]), ("width_per_group", 10**9)):
        bottleneck = {"block": "bottleneck"} if name == "width_per_group" else {}
        refused(
            claims({**CONFIG, **bottleneck, name: value}, values=values),
            "that its arrays do not have|at most 1,000,000",
        )


# --- Fuzzing: whatever the bytes, what the file holds or a WeightsError.


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([b"", struct.pack("<Q", 2), raw(b"{}"), raw({"a": entry()})]), st.binary(max_size=200))
def test_random_bytes(read: Callable[..., Any], start: bytes, rest: bytes) -> None:
    read(start + rest)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_mutations(tiny: bytes, read: Callable[..., Any], data: st.DataObject) -> None:
    """Spans of a good file replaced; the header's length is made to fit, so that more than its first bytes are read."""
    content = tiny[8:]
    header = int.from_bytes(tiny[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        stop = start + data.draw(st.integers(0, 8))
        new = data.draw(st.binary(max_size=8))
        header += (len(new) - len(content[start:stop])) * (start < header)
        content = content[:start] + new + content[stop:]
    read(struct.pack("<Q", max(header, 0)) + content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16", "F8_E4M3", "cifar", "imagenet", "resnet20_cifar", "tiny", native.FORMAT]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_headers(tiny: bytes, read: Callable[..., Any], data: st.DataObject) -> None:
    """Valid JSON in which any value became any other: of a tensor's entry, or of the metadata."""
    length = 8 + int.from_bytes(tiny[:8], "little")
    header = json.loads(tiny[8:length])
    for _ in range(data.draw(st.integers(1, 3))):
        entries = header[data.draw(st.sampled_from(sorted(header)))]
        if isinstance(entries, dict) and entries:
            entries[data.draw(st.sampled_from(sorted(entries)))] = data.draw(JSON)
    read(raw(header, tiny[length:]))


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=20) | JSON.map(json.dumps), st.sampled_from(["tiny", "resnet20_cifar", ""]) | st.text(max_size=9)
)
def test_random_claims(tiny: bytes, read: Callable[..., Any], config: str, arch: str) -> None:
    assert read(claims(config, arch)) is None


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(CONFIG)), JSON))
def test_random_configurations(tiny: bytes, read: Callable[..., Any], chosen: dict[str, Any]) -> None:
    assert read(claims({**CONFIG, **chosen})) is None


# --- Other kinds of file, and memory.


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors", "nul\0byte", ""):
        with pytest.raises(WeightsError):
            native.read_safetensors(path)


@pytest.mark.skipif(sys.platform != "linux", reason="address space limits and /dev are Linux's")
def test_memory_limit_of_the_system(tiny: bytes, native_file: Path, tmp_path: Path) -> None:
    """In a process that may take 256 MiB more than it has after one good file: tracemalloc does not see Rust's memory."""
    many = {f"{i}": entry(shape=(0,), stop=0) for i in range(50_000)}
    hostile: list[bytes | bytearray] = [
        struct.pack("<Q", 99_999_999) + b"{}",
        struct.pack("<Q", 1 << 62) + b"{}",
        raw(b"[" * 10_000_000),
        raw({"a": entry(shape=(1 << 40,), stop=1 << 42)}),
        raw({"__metadata__": {"format": "x" * 5_000_000}}),
        raw(many),
        claims({**CONFIG, "num_classes": 10**9}, "resnet20_cifar"),
        claims({**CONFIG, "widths": [10**9]}, "wide_resnet101_2"),
        claims(arch="x" * 5_000_000),
        claims("[" * 5_000_000),
    ]
    for position in range(8):
        hostile.append(bytearray(claims(arch="resnet20_cifar")))
        hostile[-1][position] ^= 0xFF
    paths = [tmp_path / f"{i}.safetensors" for i in range(len(hostile))]
    for path, data in zip(paths, hostile, strict=True):
        path.write_bytes(data)
    os.mkfifo(tmp_path / "pipe.safetensors")
    paths += [tmp_path / "pipe.safetensors", Path("/dev/zero")]
    script = """
import resource, sys
from jresnet.weights import native
from jresnet.errors import WeightsError
native.read(sys.argv[1])
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (256 << 20),) * 2)
for path in sys.argv[2:]:
    try:
        native.read(path)
    except WeightsError:
        print("refused")
"""
    done = command("-c", script, native_file, *paths)
    assert done.stdout.split() == ["refused"] * len(paths), done.stderr[-2000:]
