"""Reading a run's ``metrics.jsonl``, a JSON object a line and epoch; no jax is needed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jresnet.errors import InputError
from jresnet.files import read_ordinary

LARGEST = 2**26  # bytes of a metrics.jsonl that is read; 200 epochs are some 60 kB
TIMINGS = ("seconds", "compile_seconds", "images_per_second")
MOST = 1e15  # of a figure; beyond 1e308 a whole number is no float


def finite(value: Any) -> Any:
    """``value``, of JSON's types, with None for every NaN and infinity: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def duration(seconds: float) -> str:
    """``95`` -> ``1 min 35 s``; two units at most, up to days."""
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
    """Which losses, accuracies and timings are neither a number that can be one nor null."""

    def figure(name: str, value: Any) -> bool:
        if value is None:
            return True
        # NaN is one, in files of other programs.
        least, most = 0, 1 if name.endswith("_accuracy") else MOST
        return type(value) in (int, float) and not (value < least or value > most)

    named = ("_loss", "_accuracy", *TIMINGS)
    return [name for name, value in row.items() if name.endswith(named) and not figure(name, value)]


def read_metrics(path: Path, epochs: int | None = None) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``: all, or the first ``epochs``; none where there is no file.

    A last line that ends before its end, as a killed process leaves it, is not among them.

    Raises:
        InputError: where the file cannot be read, or another line is no row, or not that of its epoch.
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
            what = f"{', '.join(bad)} is no figure" if bad else f"it is epoch {row['epoch']}, step {row['step']}"
            raise InputError(f"{path} is damaged: line {number}: {what}")
        rows.append(row)
    return rows
