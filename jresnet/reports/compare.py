"""Compares runs from their files: figures of each run over its seeds, and a text table.

Neither jax nor the data are needed, so that runs can be compared on any machine that has their folders.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jresnet.errors import InputError
from jresnet.files import read_ordinary
from jresnet.reports.metrics_file import LARGEST, MOST, TIMINGS, duration, finite, read_metrics

# The settings in the table, from the entry "run" of config.json, with their types.
SETTINGS: dict[str, type | tuple[type, ...]] = {
    "arch": str, "recipe": str, "dataset": str, "epochs": int, "batch_size": int, "lr": (int, float), "precision": str,
    "seed": int,
}  # fmt: skip
SAME = (
    "arch",
    "recipe",
    "parameters",
    "dataset",
    "device",
    "devices",
    "precision",
    "best_chosen_on",
    "versions",
    "command",
)


class Run(NamedTuple):
    """A run's folder: one seed, finished or not."""

    folder: Path
    config: dict[str, Any]  # config.json's "run"
    rows: list[dict[str, Any]]  # metrics.jsonl, an epoch each
    summary: dict[str, Any] | None  # None before the end

    @property
    def state(self) -> str:
        """The state of the run: finished, epoch k of n, or empty."""
        if self.summary is not None:
            return "finished"
        return f"epoch {len(self.rows)} of {self.config['epochs']}" if self.rows else "empty"


class Entry(NamedTuple):
    """A row of the table: a run, or the seeds of one."""

    name: str
    folder: Path
    config: dict[str, Any]  # config.json's "run", of the first seed
    planned: int | None  # number of seeds; None for a single run
    runs: list[Run]  # the runs that were started

    @property
    def state(self) -> str:
        """The state of a single run, or the number of finished seeds and the states of the others."""
        if self.planned is None:
            return self.runs[0].state
        done = [run for run in self.runs if run.summary is not None]
        if len(done) == self.planned:
            return "finished"
        if not any(run.rows for run in self.runs):
            return "empty"
        open_ones = [f"seed {run.config['seed']} {run.state}" for run in self.runs if run.summary is None]
        return ", ".join([f"{len(done)} of {self.planned} seeds finished", *open_ones])

    @property
    def counted(self) -> list[Run]:
        """The runs that the figures are computed from: the finished ones, else all, cut to the same number of epochs."""
        begun = [run for run in self.runs if run.rows]
        done = [run for run in begun if run.summary is not None]
        least = min((len(run.rows) for run in begun), default=0)
        return done or [run._replace(rows=run.rows[:least]) for run in begun]


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
        InputError: the file cannot be read, or is not a JSON object.
    """
    try:
        found = json.loads(read_ordinary(path, LARGEST))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: it is not a JSON object")
    return found


def _read_config(folder: Path) -> tuple[dict[str, Any], Any]:
    """Reads and checks the entry "run" of ``config.json``; also returns the number of seeds, if it has one."""
    path = folder / "config.json"
    if not path.exists():
        what = "is not the folder of a run: it has no config.json" if folder.is_dir() else "is not a folder"
        raise InputError(f"{folder} {what}")
    values = read_json(path)
    config = values.get("run")
    if not isinstance(config, dict):
        raise InputError(f'{path} is not the configuration of a run: it has no "run"')
    bad = [name for name, kind in SETTINGS.items() if not _is(config.get(name), kind)]
    bad += ["runs"] if not _is(values.get("runs", 1), int) else []
    if bad:
        raise InputError(f"{path} is not the configuration of a run: {', '.join(bad)} missing or of a wrong type")
    return config, values.get("runs")


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return (
        isinstance(value, kind) and not isinstance(value, bool) and not (isinstance(value, int) and abs(value) > MOST)
    )


def read_run(folder: Path) -> Run:
    """Reads the run of one seed in ``folder``.

    Raises:
        InputError: there is no run, or a file is damaged.
    """
    config, _ = _read_config(folder)
    path = folder / "metrics.jsonl"
    rows = read_metrics(path)
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else None
    if summary is not None and len(rows) != config["epochs"]:
        raise InputError(f"{path} has {len(rows)} complete lines, but the finished run has {config['epochs']} epochs")
    return Run(folder, config, rows, summary)


def read_entry(folder: Path) -> Entry:
    """Reads the run in ``folder``, or the runs in its folders ``seed-0``, ``seed-1``, ...

    Raises:
        InputError: there is no run, a file is damaged, or runs differ in more than their seed; one message lists all.
    """
    name = folder.resolve().name
    folders = sorted(
        (
            path
            for path in folder.glob("seed-*")
            if re.fullmatch(r"seed-\d+", path.name) and (path / "config.json").exists()
        ),
        key=lambda path: int(path.name[5:]),
    )
    if (folder / "config.json").exists() or not folders:
        config, planned = _read_config(folder)
        if planned is None:
            return Entry(name, folder, config, None, [read_run(folder)])
    else:
        config, planned = {}, len(folders)
    runs, problems = [], []
    for path in folders:
        try:
            runs.append(read_run(path))
        except InputError as error:
            problems.append(str(error))
    for run in runs:
        problems += [f"{run.folder} has seed {run.config['seed']}"] * (run.folder.name != f"seed-{run.config['seed']}")
        differing = [
            key
            for key in sorted({*runs[0].config, *run.config} - {"seed"})
            if runs[0].config.get(key) != run.config.get(key)
        ]
        problems += [f"{run.folder} differs from {runs[0].folder.name} in {', '.join(differing)}"] * bool(differing)
    if problems:
        raise InputError("\n".join(problems))
    return Entry(name, folder, config or runs[0].config, max(planned, len(runs)), runs)


def read_entries(folders: Sequence[Path]) -> list[Entry]:
    """Reads an entry for each folder. Its name is the folder's name, or the whole path if names would be equal.

    Raises:
        InputError: a folder cannot be used; one line per problem.
    """
    entries, problems = [], []
    once: dict[Path, Path] = {}
    for folder in folders:
        once.setdefault(folder.resolve(), folder)
    for folder in once.values():
        try:
            entries.append(read_entry(folder))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    names = [entry.name for entry in entries]
    return [entry._replace(name=str(entry.folder)) if names.count(entry.name) > 1 else entry for entry in entries]


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Computes ``{"mean", "std", "values"}`` of at least one number.

    std is the sample standard deviation (with n - 1); None for a single number. If a value is None or not finite, mean and
    std are None.
    """
    numbers = [float(value) for value in values if value is not None and math.isfinite(value)]
    whole = len(numbers) == len(values)
    return {
        "mean": statistics.fmean(numbers) if whole else None,
        "std": statistics.stdev(numbers) if whole and len(numbers) > 1 else None,
        "values": finite(list(values)),
    }


def summarise(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of ``summary.json`` for several seeds, from the summaries of the seeds in order.

    Fields that are not figures are kept if all seeds agree, and left out otherwise. Each numeric field of "final" and "best"
    and each timing becomes mean, sample standard deviation and values (:func:`spread`).

    Raises:
        InputError: there is no summary, or seeds are missing or not unique.
    """
    seeds = [summary.get("seed") for summary in summaries]
    if not seeds or None in seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"expected one or more different seeds, got {seeds}")
    result: dict[str, Any] = {"n": len(seeds), "seeds": seeds, "runs": [f"seed-{seed}" for seed in seeds]}
    first = summaries[0]
    result |= {name: first[name] for name in SAME if all(summary.get(name) == first.get(name) for summary in summaries)
               and name in first}  # fmt: skip
    for part in ("final", "best"):
        result[part] = _spreads([summary.get(part, {}) for summary in summaries])
    timings = _spreads([{name: summary[name] for name in TIMINGS if name in summary} for summary in summaries])
    return result | timings


def _spreads(singles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The :func:`spread` of each field that is a number or null in all summaries."""
    columns = {name: [single.get(name, "") for single in singles] for name in singles[0]}
    return {
        name: spread(values)
        for name, values in columns.items()
        if all(value is None or _is(value, (int, float)) for value in values) and any(v is not None for v in values)
    }


def figures(entry: Entry) -> dict[str, Any]:
    """The figures of an entry in the table, as JSON values; None if a figure is not available.

    Losses are in nats, accuracies are fractions from 0 to 1, and seconds are those of one seed.
    """
    runs = entry.counted
    last = [run.rows[-1] for run in runs]

    def over_seeds(name: str) -> dict[str, Any] | None:
        return spread([row[name] for row in last]) if last and all(name in row for row in last) else None

    summaries = [run.summary for run in runs if run.summary is not None]
    dataset = summaries[0].get("dataset") if summaries else None
    images = dataset if isinstance(dataset, dict) else {}
    return {
        "name": entry.name,
        "folder": str(entry.folder),
        **{name: entry.config[name] for name in SETTINGS if name != "seed"},
        "images": {split: images.get(f"{split}_images") for split in ("train", "val", "test")},
        "seeds": [run.config["seed"] for run in runs],
        "n": len(runs),
        **{
            name: over_seeds(name)
            for name in ("train_loss", "val_accuracy", "test_accuracy", "images_per_second", "seconds")
        },
        "state": entry.state,
    }


def plus_minus(found: dict[str, Any] | None, form: Callable[[float], str], unit: str = "") -> str:
    """Formats ``mean ± std`` with ``form``; "-" if there is no figure, and "nan" if it is not finite."""
    if found is None:
        return "-"
    if found["mean"] is None:
        return "nan"
    return " ± ".join(form(found[part]) for part in ("mean", "std") if found[part] is not None) + unit


def percent(value: float) -> str:
    """Formats a fraction as a percentage, without the sign."""
    return f"{100 * value:.2f}"


def cells(found: dict[str, Any]) -> dict[str, str]:
    """A row of the text table by column, from the result of :func:`figures`."""
    counts = ", ".join(f"{count:,} {split}" for split, count in found["images"].items() if _is(count, int))
    seconds, pace = found["seconds"], found["images_per_second"]
    row = {
        "run": found["name"],
        "arch": found["arch"],
        "recipe": found["recipe"],
        "data": found["dataset"] + (f" ({counts})" if counts else ""),
        "epochs": str(found["epochs"]),
        "seeds": str(found["n"]),
        "batch": str(found["batch_size"]),
        "lr": f"{found['lr']:g}",
        "precision": found["precision"],
        "train loss": plus_minus(found["train_loss"], "{:.4f}".format),
        "val accuracy": plus_minus(found["val_accuracy"], percent, " %"),
        "test accuracy": plus_minus(found["test_accuracy"], percent, " %"),
        "images/s": f"{pace['mean']:,.0f}" if pace and pace["mean"] is not None else "-",
        "time": duration(seconds["mean"]) if seconds and seconds["mean"] is not None else "-",
        "state": found["state"],
    }
    # Names come from untrusted files: control characters must not reach the terminal.
    return {column: "".join(c if c.isprintable() else "?" for c in text) for column, text in row.items()}


def text_table(rows: Sequence[dict[str, str]]) -> str:
    """Formats the rows as a table; settings that all rows share are printed once above it."""
    settings = ("arch", "recipe", "data", "epochs", "batch", "lr", "precision")
    common = [name for name in settings if len({row[name] for row in rows}) == 1]
    columns = [name for name in rows[0] if name not in common]
    left = {"run", "state", *settings} - {"epochs", "batch", "lr"}
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}

    def line(row: dict[str, str]) -> str:
        parts = [row[name].ljust(widths[name]) if name in left else row[name].rjust(widths[name]) for name in columns]
        return "  ".join(parts).rstrip()

    head = [", ".join(f"{name} {rows[0][name]}" for name in common), ""] if common else []
    return "\n".join([*head, line({name: name for name in columns}), *map(line, rows)])
