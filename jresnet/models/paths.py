"""Selects parts of a network by name: ``"layer1"``, ``"head"``, ``"layer*.bn*"``.

A name selects all tensors of the module with that path. A name with shell-style wildcards selects the tensors of all
matching modules: ``"layer*.bn*"`` includes ``layer1.0.bn1.scale`` and ``layer1.0.bn1.bias``; ``"*.bias"`` is every bias.
These names have a special meaning, unless a module has the same name:

* ``"head"``: the last layer, ``fc``, of any type,
* ``"backbone"``: everything but the head,
* ``"stem"``: ``conv1`` and ``bn1``,
* ``"norms"``: the parameters of every BatchNorm.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Collection, Iterable

from jresnet.errors import InputError

GROUPS: dict[str, Callable[[str, Collection[str]], bool]] = {
    "head": lambda path, _: _within(path, "fc"),
    "backbone": lambda path, _: not _within(path, "fc"),
    "stem": lambda path, _: _within(path, "conv1") or _within(path, "bn1"),
    "norms": lambda path, paths: f"{path.rpartition('.')[0]}.scale" in paths,
}


def select(name: str, paths: Collection[str]) -> set[str]:
    """Selects the dotted ``paths`` that match a name.

    Raises:
        InputError: no path matches; the message suggests similar names.
    """
    if not isinstance(name, str):
        raise InputError(f"the name of a part must be a string such as 'layer1' or 'head', got {name!r}")
    found = {path for path in paths if any(fnmatch.fnmatchcase(part, name) for part in _above(path))}
    if not found and name in GROUPS:
        found = {path for path in paths if GROUPS[name](path, paths)}
    if not found:
        raise unknown(name, {part for path in paths for part in _above(path)} | GROUPS.keys(), "part of this network")
    return found


def unknown(name: object, known: Iterable[str], what: str) -> InputError:
    """The error for an unknown name, with suggestions of similar ones."""
    near = difflib.get_close_matches(str(name)[:80], known, n=3, cutoff=0.6)
    top = list(dict.fromkeys(part.partition(".")[0] for part in sorted(known)))
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(top[:20])}"
    return InputError(f"{str(name)[:80]!r} is no {what}: {hint}")


def _above(path: str) -> list[str]:
    """``a.b.c`` -> ``a.b.c``, ``a.b``, ``a``."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")
