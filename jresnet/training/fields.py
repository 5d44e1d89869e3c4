"""One list of fields: what each may hold and what it is for. Checks and command-line flags are made from it."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass
from typing import Any

LARGEST = 3.4e38  # of float32, in which training computes
LARGEST_WHOLE = 2**31 - 1  # in which JAX counts, where a field does not allow more
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of a field beside its type and default."""

    help: str  # for people, without the default
    group: str  # the heading under which --help shows the flag; empty: there is no flag
    choices: tuple[str, ...] = ()
    automatic: bool = False  # the flag also takes "auto": the same as not to give it
    switch: bool = False  # the flag can only say yes
    metavar: str | None = None  # what stands for the value in --help
    none: str = "none"  # what null means, in a word
    least: float | None = None  # bounds, themselves allowed...
    most: float | None = None
    above: float | None = None  # ...or not
    below: float | None = None

    @property
    def range(self) -> str:
        """The bounds in words, such as ``at least 0 and below 1``."""
        if self.least is not None and self.most is not None:
            return f"from {self.least:g} to {self.most:.0f}"
        words = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)

    def admits(self, value: float) -> bool:
        """Whether a number lies within the bounds."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def option(help: str, group: str, default: Any = dataclasses.MISSING, **more: Any) -> Any:
    """A dataclass field with an :class:`Option`, of which ``more`` are the other attributes."""
    return dataclasses.field(default=default, metadata={"option": Option(help=help, group=group, **more)})


@functools.cache
def hints_of(record: type) -> dict[str, Any]:
    """The types of a dataclass's fields; to find them takes longer than all that is done with them."""
    return typing.get_type_hints(record)


def problems(record: Any) -> list[str]:
    """What is wrong with the values of a dataclass whose fields are made by :func:`option`: a line each.

    Types count too, since the values may come from a damaged file. NaN and infinity are never allowed.
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
        elif not all(abs(number) <= LARGEST for number in numbers):  # not so for NaN either
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
    """Whether a value is of an annotated type; true is no number, and a whole number serves as any."""
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is(part, typing.get_args(hint)[0]) for part in value)
    if isinstance(hint, types.UnionType):
        return any(_is(value, part) for part in typing.get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "a list of numbers"
    return " or ".join(_KINDS[part] for part in typing.get_args(hint) or (hint,))
