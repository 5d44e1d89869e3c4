"""Dataclass fields with help texts and allowed values, from which checks and command-line flags are made."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass
from typing import Any

LARGEST = 3.4e38  # largest float32, the dtype of training
LARGEST_WHOLE = 2**31 - 1  # largest int32, in which JAX counts; the limit of integers unless a field allows more
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """Properties of a field besides its type and default."""

    help: str  # help text, without the default
    group: str  # heading of the flag in --help; empty: there is no flag
    choices: tuple[str, ...] = ()
    automatic: bool = False  # the flag also accepts "auto", which is the same as omitting it
    switch: bool = False  # the flag takes no value and means true
    metavar: str | None = None  # placeholder for the value in --help
    none: str = "none"  # meaning of null, in a word
    least: float | None = None  # inclusive bounds
    most: float | None = None
    above: float | None = None  # exclusive bounds
    below: float | None = None

    @property
    def range(self) -> str:
        """The bounds in words, such as ``at least 0 and below 1``."""
        if self.least is not None and self.most is not None:
            return f"from {self.least:g} to {self.most:.0f}"
        words = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)

    def admits(self, value: float) -> bool:
        """Whether a number is within the bounds."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def option(help: str, group: str, default: Any = dataclasses.MISSING, **more: Any) -> Any:
    """A dataclass field with an :class:`Option`; ``more`` are further attributes of the option."""
    return dataclasses.field(default=default, metadata={"option": Option(help=help, group=group, **more)})


@functools.cache
def hints_of(record: type) -> dict[str, Any]:
    """The types of a dataclass's fields; cached, because resolving them is slow."""
    return typing.get_type_hints(record)


def problems(record: Any) -> list[str]:
    """Checks the values of a dataclass whose fields are made by :func:`option`; returns one line per problem.

    Types are checked too, because values may come from a damaged file. NaN and infinity are never allowed.
    """
    hints = hints_of(type(record))  # type: ignore[arg-type] # a class is hashable
    found = []
    for field in dataclasses.fields(record):
        option, value, hint = field.metadata["option"], getattr(record, field.name), hints[field.name]
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if type(v) in (int, float)]
        expected = ""
        if not _is(value, hint):
            expected = _name(hint)
        elif option.choices and value not in option.choices:
            expected = f"one of {', '.join(option.choices)}"
        elif not all(abs(number) <= LARGEST for number in numbers):  # the comparison is false for NaN
            expected = "finite"
        elif not all(map(option.admits, numbers)):
            expected = option.range
        elif option.most is None and not _is(0.5, hint) and any(number > LARGEST_WHOLE for number in numbers):
            expected = f"at most {LARGEST_WHOLE:,}"
        if expected:
            text = repr(list(value) if isinstance(value, tuple) else value)
            found.append(f"`{field.name}` must be {expected}, got {text if len(text) < 60 else text[:60] + '...'}")
    return found


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; a bool is not a number, and an int is accepted as a float."""
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is(part, typing.get_args(hint)[0]) for part in value)
    if isinstance(hint, types.UnionType):
        return any(_is(value, part) for part in typing.get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "a list of numbers"
    return " or ".join(_KINDS[part] for part in typing.get_args(hint) or (hint,))
