"""``jresnet report RUN [RUN ...]``: runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from jresnet.reports import compare


def main(argv: Sequence[str] | None = None, prog: str = "jresnet report") -> int:
    """Runs the command; returns its exit code."""
    return compare.main(None if argv is None else list(argv))
