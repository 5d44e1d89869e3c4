"""Reads a run's ``metrics.jsonl``, one JSON object per line and epoch; jax is not needed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jresnet.errors import InputError
from jresnet.files import read_ordinary

LARGEST = 2**26  # largest metrics.jsonl that is read, in bytes; 200 epochs take about 60 kB
TIMINGS = ("seconds", "compile_seconds", "images_per_second")
MOST = 1e15  # largest figure; integers above 1e308 could not be converted to float


def finite(value: Any) -> Any:
    """Replaces NaN and infinity in a JSON value by None, because JSON does not have them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def duration(seconds: float) -> str:
    """Formats seconds with at most two units, up to days: ``95`` as ``1 min 35 s``."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    whole = max(0, round(seconds))
    parts: list[str] = []
    for name, size in units:
        count, whole = divmod(whole, size)
        if count or (parts and len(parts) < 2) or (name == "s" and not parts):
            parts.append(f"{count} {name}")
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if not part.startswith("0 ")) or "0 s"


def no_figures(row: Mapping[str, Any]) -> list[str]:
    """The names of losses, accuracies and timings whose value is neither null nor a possible number."""

    def figure(name: str, value: Any) -> bool:
        if value is None:
            return True
        # NaN is accepted; other programs write it.
        least, most = 0, 1 if name.endswith("_accuracy") else MOST
        return type(value) in (int, float) and not (value < least or value > most)

    named = ("_loss", "_accuracy", *TIMINGS)
    return [name for name, value in row.items() if name.endswith(named) and not figure(name, value)]


def read_metrics(path: Path, epochs: int | None = None) -> list[dict[str, Any]]:
    """Reads the rows of a ``metrics.jsonl``: all, or the first ``epochs``; none if there is no file.

    An incomplete last line, which a killed process may leave, is ignored.

    Raises:
        InputError: the file cannot be read, or another line is not a row or has the wrong epoch.
    """
    try:
        if not path.exists():
            return []
        *lines, tail = read_ordinary(path, LARGEST).split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate((*lines, tail)[:epochs], 1):
        try:
            row = json.loads(line)
            if not all(type(row[name]) is int for name in ("epoch", "step")):
                raise TypeError
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            if number > len(lines):
                break
            expected = "a JSON object with whole numbers for epoch and step"
            raise InputError(f"{path} is damaged: line {number} is not {expected}") from error
        bad = no_figures(row)
        if row["epoch"] != number or row["step"] < 0 or bad:
            what = f"invalid value of {', '.join(bad)}" if bad else f"it is epoch {row['epoch']}, step {row['step']}"
            raise InputError(f"{path} is damaged: line {number}: {what}")
        rows.append(row)
    return rows
