"""Bar charts as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jresnet.reports import plots


def bars(values: Mapping[str, float], path: Path, unit: str, title: str) -> None:
    """Draws one horizontal bar per name, the first at the top."""
    figure = plots._figure((9, 1.2 + 0.3 * len(values)))
    axes = figure.subplots()
    names = [plots.short(name, 60) for name in values]
    drawn = axes.barh(range(len(names)), list(values.values()))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.margins(x=0.15)
    axes.set_xlabel(unit)
    axes.set_title(title)
    plots.save(figure, path)
