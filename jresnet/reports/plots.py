"""Figures of a run: curves, confusion matrix, the worst mistakes, and a comparison of several runs."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jresnet.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPLITS = {"train": "training", "val": "validation", "test": "test"}
LETTERS = 24  # longer names of classes and runs are abbreviated in the middle
NUMBERED = 25  # confusion matrices of up to so many classes show the counts
TICKS = 100  # largest number of class names beside a confusion matrix


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix: counts ``[classes, classes]`` by true class (row) and predicted class (column)."""
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, predictions), 1)
    return counts


def per_class_accuracy(labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str]) -> dict[str, float | None]:
    """The fraction of each class's images that were classified correctly, 0 to 1; None if a class has no image.

    Args:
        labels: int ``[N]``.
        predictions: int ``[N]``.
        classes: the names in the order of the labels.
    """
    counts = confusion(labels, predictions, len(classes))
    images = counts.sum(1)
    return {name: float(counts[i, i] / images[i]) if images[i] else None for i, name in enumerate(_distinct(classes))}


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Plots loss and accuracy by epoch, for training and every evaluated split.

    Args:
        rows: the rows of ``metrics.jsonl``.
        path: the PNG file.
        title: title of the figure.
    """
    figure = _figure((10, 4))
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for split, name in SPLITS.items():
        for axes, what in ((loss_axes, "loss"), (accuracy_axes, "accuracy")):
            epochs, values = _series(rows, f"{split}_{what}")
            if epochs:
                axes.plot(epochs, values, marker="." if len(epochs) < 50 else None, label=name)
    _dress(loss_axes, "cross-entropy (nats)", log=True)
    _dress(accuracy_axes, "top-1 accuracy (%)")
    for axes in (loss_axes, accuracy_axes):
        if axes.lines:
            axes.legend()
    figure.suptitle(title, parse_math=False)
    save(figure, path)


def plot_confusion(labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str], path: Path, title: str) -> None:
    """Plots the confusion matrix: counts by true class (row) and predicted class (column), coloured by the row's fraction.

    scikit-learn's ``ConfusionMatrixDisplay`` is not used: it colours by count, prints zeros, and names overlap.

    Args:
        labels: int ``[N]``.
        predictions: int ``[N]``.
        classes: the names in the order of the labels.
        path: the PNG file.
        title: title of the figure.
    """
    from matplotlib.colors import PowerNorm

    counts = confusion(labels, predictions, len(classes))
    side = min(20.0, max(7.0, 0.45 * len(classes)))
    figure = _figure((side + 1.2, side))
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # Without numbers, colours must make a mistake of one image in a hundred visible.
    norm = PowerNorm(1 if len(classes) <= NUMBERED else 0.4, 0, 1)
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    if len(classes) <= NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)
    ticks = range(0, len(classes), -(-len(classes) // TICKS))
    names = [short(classes[tick]) for tick in ticks]
    fontsize = 9 if len(classes) <= NUMBERED else 7
    axes.set_xticks(ticks, names, rotation=90, fontsize=fontsize, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=fontsize, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    figure.suptitle(title, parse_math=False)
    figure.colorbar(image, ax=axes, label="share of the true class's images", shrink=0.6)
    save(figure, path)


def plot_worst(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    losses: np.ndarray,
    classes: Sequence[str],
    path: Path,
    title: str,
    count: int = 25,
) -> None:
    """Plots the misclassified images with the highest loss, the worst first, each with "predicted / true" and its loss.

    Args:
        images: uint8 ``[N, H, W, C]``, C being 1 or 3.
        labels: int ``[N]``.
        predictions: int ``[N]``.
        losses: float ``[N]``, in nats; NaN counts as the worst.
        classes: the names in the order of the labels.
        path: the PNG file.
        title: title of the figure.
        count: largest number of images.
    """
    losses = np.asarray(losses, float)
    wrong = np.flatnonzero(np.asarray(labels) != np.asarray(predictions))
    worst = wrong[np.argsort(-np.nan_to_num(losses[wrong], nan=np.inf), kind="stable")][:count]
    columns = max(1, math.ceil(math.sqrt(count)))
    rows = max(1, math.ceil(len(worst) / columns))
    # All in one axes, in inches: a constrained layout of 25 axes takes five times as long.
    across, down = (2 * size / max(images.shape[1:3]) for size in (images.shape[2], images.shape[1]))
    width, height = 2.1 * columns, rows * (down + 0.55) + 0.6
    figure = _figure((width, height), layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for place, index in enumerate(worst):
        row, column = divmod(place, columns)
        middle, top = 2.1 * (column + 0.5), height - 1.1 - row * (down + 0.55)
        axes.imshow(images[index].squeeze(-1) if images.shape[-1] == 1 else images[index], "gray", vmin=0, vmax=255,
                    interpolation="nearest", extent=(middle - across / 2, middle + across / 2, top - down, top))  # fmt: skip
        predicted, true = (short(classes[int(found[index])]) for found in (predictions, labels))
        # On one line if both names are short: a cell has room for about 26 letters.
        names = f"{predicted} / {true}" if len(predicted) + len(true) <= 20 else f"{predicted} /\n{true}"
        caption = f"{names}\nloss {losses[index]:.2f}"
        axes.text(middle, top + 0.05, caption, ha="center", va="bottom", fontsize=8, parse_math=False)
    axes.set(xlim=(0, width), ylim=(0, height), aspect="auto")  # imshow changes them
    if not len(worst):
        axes.text(width / 2, (height - 0.6) / 2, "no image was misclassified", ha="center", va="center")
    shown = f", the {len(worst)} worst" if len(worst) < len(wrong) else ""
    mistakes = f"{len(wrong):,} of {len(labels):,} images misclassified{shown}; predicted / true"
    figure.suptitle(f"{title}\n{mistakes}", y=1 - 0.1 / height, fontsize=10, parse_math=False)
    save(figure, path)


def plot_runs(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Plots training loss and accuracy of several runs by epoch, one colour per run.

    Several seeds are drawn as their mean with a band from the minimum to the maximum, at each epoch over the seeds that have
    it. The accuracy is on validation images if all runs have some, else on test images if all have some; otherwise the
    split may differ between runs, and the legend names it.

    Args:
        runs: by name, the rows of ``metrics.jsonl`` of each seed.
        path: the PNG file.
    """
    import matplotlib
    from matplotlib.lines import Line2D

    def has(name: str, split: str) -> bool:
        return any(_series(rows, f"{split}_accuracy")[0] for rows in runs[name])

    drawn = [name for name in runs if any(runs[name])]
    split = next((split for split in ("val", "test") if drawn and all(has(name, split) for name in drawn)), None)
    figure = _figure((12, 4.6))
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    colormap = matplotlib.colormaps["tab10" if len(runs) <= 10 else "tab20" if len(runs) <= 20 else "turbo"]
    handles, labels = [], []
    for index, (name, seeds) in enumerate(runs.items()):
        color = colormap(index if len(runs) <= 20 else index / (len(runs) - 1))
        own = split or next((split for split in ("val", "test") if has(name, split)), "val")
        for axes, key in ((loss_axes, "train_loss"), (accuracy_axes, f"{own}_accuracy")):
            _plot_seeds(axes, [_series(rows, key) for rows in seeds], color)
        handles.append(Line2D([], [], color=color))
        notes = [f"{len(seeds)} seeds"] if len(seeds) > 1 else []
        notes += [SPLITS[own]] if split is None and name in drawn else []
        notes += [] if name in drawn else ["no epoch yet"]
        labels.append(short(name, 40) + (f" ({', '.join(notes)})" if notes else ""))
    _dress(loss_axes, "training loss (nats)", log=True)
    _dress(accuracy_axes, f"{SPLITS[split]} accuracy (%)" if split else "accuracy (%)")
    # about 150 letters and the lines of the legend fill the width
    columns = max(1, min(5, 150 // max(map(len, labels))))
    figure.set_figheight(4.6 + 0.2 * -(-len(labels) // columns))
    # The texts are set afterwards, because a legend omits names that begin with "_".
    legend = figure.legend(handles, ["run"] * len(labels), loc="outside lower center", ncols=columns, fontsize=8)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)
    save(figure, path)


def _plot_seeds(axes: Axes, seeds: Sequence[tuple[list[int], list[float]]], color: Any) -> None:
    """Plots the mean of a run, and its band if it has several seeds."""
    by_epoch: dict[int, list[float]] = {}
    for epochs, values in seeds:
        for epoch, value in zip(epochs, values, strict=True):
            by_epoch.setdefault(epoch, []).append(value)
    epochs = sorted(by_epoch)
    if not epochs:
        return
    means = [sum(by_epoch[epoch]) / len(by_epoch[epoch]) for epoch in epochs]
    axes.plot(epochs, means, color=color, linewidth=1.5, marker="." if len(epochs) < 20 else None)
    if len(seeds) > 1:
        lowest, highest = ([pick(by_epoch[epoch]) for epoch in epochs] for pick in (min, max))
        axes.fill_between(epochs, lowest, highest, color=color, alpha=0.2, linewidth=0)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The epochs that have a finite value of ``key``, and the values; accuracies in per cent."""
    found = [(row["epoch"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    scale = 100 if key.endswith("accuracy") else 1
    kept = [(epoch, scale * value) for epoch, value in found if math.isfinite(value)]
    return [epoch for epoch, _ in kept], [value for _, value in kept]


def _dress(axes: Axes, ylabel: str, log: bool = False) -> None:
    """Sets labels, grid and integer epochs; with ``log``, a logarithmic axis if every value is above 0."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [np.zeros(1)])
    if log and values.min() > 0:
        axes.set_yscale("log")
        # Less than a decade may contain none of 1, 2 and 5; over many decades LogLocator finds no ticks with them.
        decades = math.log10(values.max() / values.min())
        subs = (1, 2, 5) if decades < 4 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs) if decades > 1 else MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def short(name: str, letters: int = LETTERS) -> str:
    """Abbreviates a name in the middle to at most ``letters``, on one line."""
    name = " ".join(name.split())
    half = (letters - 1) // 2
    return name if len(name) <= letters else f"{name[: letters - 1 - half]}…{name[-half:]}"


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with the index added to those that occur twice, such as ImageNet's crane and maillot."""
    return [f"{name} ({index})" if names.count(name) > 1 else name for index, name in enumerate(names)]


def _figure(size: tuple[float, float], layout: Literal["constrained"] | None = "constrained") -> Figure:
    """A figure of ``size`` in inches without a window, and not registered in pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout=layout)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG atomically."""
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    write_atomically(path, content.getvalue())
