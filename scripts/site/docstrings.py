"""Convert docstrings for the site: Sphinx cross-references become code, and doctest examples become fenced blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^( *)>>> .*\n(?:\1\S.*(?:\n|$))*", re.MULTILINE)


class Plain(griffe.Extension):
    """The griffe extension that mkdocs.yml lists."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes an object's docstring in place."""
        if obj.docstring:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub(_fenced, text)


def _fenced(example: re.Match[str]) -> str:
    margin = example[1]
    text = re.sub(r" *# doctest: \S+$", "", example[0].rstrip("\n"), flags=re.MULTILINE)
    return f"{margin}```pycon\n{text}\n{margin}```\n"
