"""Compact lists of up to millions of images, and a cache of such lists.

Every process that decodes images holds the list. The names of ImageNet take about 200 MB per process as Python strings, and
50 MB as one byte array with end positions.

**Cached listings.** Listing 1.3 million files takes a minute, and many minutes on a network disk. So a listing is stored in
``jresnet/listings`` of ``XDG_CACHE_HOME`` or ``~/.cache``, together with the state (times of change, size, inode) of every
folder or file that it depends on. It is reused if none of these states changed; adding, removing or renaming a file changes
its folder. The stored file is a safetensors file with a digest that contains only names and numbers, no code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from jresnet.errors import InputError
from jresnet.files import write_atomically

# ns; a folder that changed so recently may change again without a new time stamp, so it is not cached
RECENT = 2 * 10**9
VERSION = 1  # version of the file format


class Record(NamedTuple):
    """The location of an image inside a larger file: a record of a TFDS store, or a member of a tar file."""

    path: str
    position: int  # index of the record in an array_record file; otherwise offset of its first byte
    length: int  # bytes; -1 in an array_record file

    def __str__(self) -> str:
        return f"{self.path}, record at {self.position:,}"


Source = str | Record  # location of an image: a path, or a part of a file


@dataclass(frozen=True, eq=False)
class Sources(Sequence[Source]):
    """A compact sequence of sources: files below a folder, or parts of some files.

    Args:
        root: folder of all paths.
        text: uint8, all paths concatenated, in UTF-8 with Python's surrogateescape.
        ends: int64 ``[paths]``, the end of each path in ``text``.
        parts: int64 ``[n, 3]``: index of the path, position and length of each record; None: the sources are the paths.
    """

    root: str
    text: np.ndarray
    ends: np.ndarray
    parts: np.ndarray | None = None

    @staticmethod
    def of(sources: Iterable[Source], root: str = "") -> Sources:
        """Builds the sequence from sources of one kind; paths are relative to ``root``."""
        found = list(sources)
        if found and isinstance(found[0], Record):
            records = [source for source in found if isinstance(source, Record)]
            paths = {path: i for i, path in enumerate(dict.fromkeys(record.path for record in records))}
            parts = np.array([(paths[path], position, length) for path, position, length in records], np.int64)
            return Sources(root, *_joined(paths), parts)
        return Sources(root, *_joined(map(str, found)))

    def __len__(self) -> int:
        return len(self.ends if self.parts is None else self.parts)

    def __getitem__(self, which: Any) -> Any:
        """One source, or for a slice a shorter sequence."""
        if isinstance(which, slice):
            return self.take(np.arange(len(self))[which])
        if self.parts is None:
            return self._path(which)
        path, position, length = self.parts[which].tolist()
        return Record(self._path(path), position, length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_same, self, other))

    __hash__ = None  # type: ignore[assignment]

    def take(self, positions: Sequence[int] | np.ndarray) -> Sources:
        """The sources at ``positions``."""
        positions = np.asarray(positions, np.int64)
        if self.parts is not None:
            return Sources(self.root, self.text, self.ends, self.parts[positions])
        starts = np.concatenate([[0], self.ends])[positions]
        lengths = self.ends[positions] - starts
        ends = np.cumsum(lengths)
        # Each byte has the same offset from the start of its path in the old and in the new text.
        shift = np.repeat(starts - (ends - lengths), lengths)
        return Sources(self.root, self.text[np.arange(len(shift)) + shift], ends)

    def digest(self) -> bytes:
        """SHA-256 over the sources in order, without ``root``."""
        total = hashlib.sha256()
        for array in (self.text, self.ends, *([] if self.parts is None else [self.parts])):
            total.update(np.ascontiguousarray(array).data)
        return total.digest()

    def _path(self, number: int) -> str:
        number = range(len(self.ends))[number]
        start = int(self.ends[number - 1]) if number else 0
        name = self.text[start : int(self.ends[number])].tobytes().decode("utf-8", "surrogateescape")
        return os.path.join(self.root, name) if self.root else name


def compact(sources: Sequence[Source]) -> Sources:
    """Converts any sequence of sources to :class:`Sources`."""
    return sources if isinstance(sources, Sources) else Sources.of(sources)


def _joined(paths: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    text, ends = bytearray(), []
    for path in paths:
        text += os.fsencode(path)
        ends.append(len(text))
    return np.frombuffer(bytes(text), np.uint8), np.array(ends, np.int64)


def _same(one: Any, other: Any) -> bool:
    return one == other


# Cached listings.


@dataclass
class Found:
    """The result of a listing."""

    arrays: dict[str, np.ndarray]
    about: dict[str, Any]  # JSON values
    guards: list[str] = field(default_factory=list)  # folders and files that the result depends on


def kept(name: str, make: Callable[[], Found]) -> Found:
    """The result of ``make``, from the cache if nothing that it depends on has changed.

    Args:
        name: identifies the listing, such as ``folder /data/train``.
        make: creates the listing; its exceptions are passed on.
    """
    path = (
        _folder()
        / f"{hashlib.sha256(f'{VERSION} {name}'.encode(errors='surrogateescape')).hexdigest()[:32]}.safetensors"
    )
    if (before := _read(path, name)) is not None:
        return before
    began = time.time_ns()
    found = make()
    states = _states(found.guards)
    if states is not None and all(max(state[:2]) < began - RECENT for state in states):
        about = {"name": name, "about": found.about, "guards": list(zip(found.guards, states, strict=True))}
        text = json.dumps(about)
        arrays = {key: np.ascontiguousarray(value) for key, value in found.arrays.items()}
        metadata = {"about": text, "digest": _digest(text, arrays)}
        with contextlib.suppress(InputError, OSError):  # disk full or read-only: not cached
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            write_atomically(path, safetensors.numpy.save(arrays, metadata))
    return found


def _folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "jresnet" / "listings"


def _states(guards: Iterable[str]) -> list[list[int]] | None:
    """The state of each file or folder; None if one of them does not exist."""
    try:
        found = [os.stat(guard) for guard in guards]
    except OSError:
        return None
    return [[state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino] for state in found]


def _read(path: Path, name: str) -> Found | None:
    """A cached listing; None if there is none, or it is damaged or out of date."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        text = metadata["about"]
        if metadata["digest"] != _digest(text, arrays):
            return None
        about = json.loads(text)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError, safetensors.SafetensorError):
        return None
    guards = [guard for guard, _ in about["guards"]]
    if about["name"] != name or _states(guards) != [state for _, state in about["guards"]]:
        return None
    return Found(arrays, about["about"], guards)


def _digest(text: str, arrays: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256(text.encode())
    for key in sorted(arrays):
        total.update(f"{key} {arrays[key].dtype} {arrays[key].shape}".encode())
        total.update(arrays[key].reshape(-1).view(np.uint8).data)
    return total.hexdigest()
