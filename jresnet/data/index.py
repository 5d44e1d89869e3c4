"""Where a million images are: their names in one text instead of a million objects, and a listing that is made once.

Every process that decodes holds the list. As Python's strings the names of ImageNet take some 200 MB in each; as one text
with the ends of its lines, 50 MB.

**Kept listings.** To list 1.3 million files takes a minute, on a network's disk many. A listing is kept in
``jresnet/listings`` of ``XDG_CACHE_HOME`` or ``~/.cache`` beside the state of every folder or file that it came from (its
times of change, size and number). It is used again where all of these are the same: a file added, removed or renamed
changes its folder. It is a safetensors file with a digest, which holds names and numbers; nothing in it is run.
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

RECENT = 2 * 10**9  # ns: a folder that was changed so shortly before may change again within one tick of its clock
VERSION = 1  # of the kept form


class Record(NamedTuple):
    """Where an image is inside a larger file: a record of a TFDS store, or a member of a tar file."""

    path: str
    position: int  # of the record in an array_record file; elsewhere of its first byte
    length: int  # bytes; -1 in an array_record file

    def __str__(self) -> str:
        return f"{self.path}, record at {self.position:,}"


Source = str | Record  # where an image's bytes are: a path, or a part of a file


@dataclass(frozen=True, eq=False)
class Sources(Sequence[Source]):
    """Many sources in few arrays: the names of files below a folder, or parts of some files.

    Args:
        root: what every path begins with.
        text: uint8, the paths one after the other, in UTF-8 with what is no UTF-8 escaped as Python does.
        ends: int64 ``[paths]``, where each ends in ``text``.
        parts: int64 ``[n, 3]``: which path, position and length of each record; None: the sources are the paths.
    """

    root: str
    text: np.ndarray
    ends: np.ndarray
    parts: np.ndarray | None = None

    @staticmethod
    def of(sources: Iterable[Source], root: str = "") -> Sources:
        """Those of a list, all of one kind; paths are relative to ``root``."""
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
        """One source, or with a slice fewer of them."""
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
        """Those at ``positions``."""
        positions = np.asarray(positions, np.int64)
        if self.parts is not None:
            return Sources(self.root, self.text, self.ends, self.parts[positions])
        starts = np.concatenate([[0], self.ends])[positions]
        lengths = self.ends[positions] - starts
        ends = np.cumsum(lengths)
        # Each byte of the new text is as far behind the old start of its path as behind the new one.
        shift = np.repeat(starts - (ends - lengths), lengths)
        return Sources(self.root, self.text[np.arange(len(shift)) + shift], ends)

    def digest(self) -> bytes:
        """SHA-256 of the sources as they are named below ``root``, in their order."""
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
    """Sources as :class:`Sources`."""
    return sources if isinstance(sources, Sources) else Sources.of(sources)


def _joined(paths: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    text, ends = bytearray(), []
    for path in paths:
        text += os.fsencode(path)
        ends.append(len(text))
    return np.frombuffer(bytes(text), np.uint8), np.array(ends, np.int64)


def _same(one: Any, other: Any) -> bool:
    return one == other


# Listings that are kept.


@dataclass
class Found:
    """What a listing found."""

    arrays: dict[str, np.ndarray]
    about: dict[str, Any]  # JSON values
    guards: list[str] = field(default_factory=list)  # the folders and files whose state it depends on


def kept(name: str, make: Callable[[], Found]) -> Found:
    """What ``make`` finds, or what it found before where nothing it depends on has changed since.

    Args:
        name: what is listed and how, such as ``folder /data/train``.
        make: lists; its errors pass.
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
        with contextlib.suppress(InputError, OSError):  # a disk that is full or read-only: listed anew the next time
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            write_atomically(path, safetensors.numpy.save(arrays, metadata))
    return found


def _folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "jresnet" / "listings"


def _states(guards: Iterable[str]) -> list[list[int]] | None:
    """The state of each file or folder; None where one of them is gone."""
    try:
        found = [os.stat(guard) for guard in guards]
    except OSError:
        return None
    return [[state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino] for state in found]


def _read(path: Path, name: str) -> Found | None:
    """A kept listing; None where there is none, it is damaged, or out of date."""
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
