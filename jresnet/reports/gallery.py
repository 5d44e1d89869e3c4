"""Draws a gallery of images with a network's predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jresnet.reports.plots import save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, QUIET, FIRST, REST = "#1f2933", "#7b8794", "#9dc0e6", "#d3dde7"
WIDTH = 2.5  # width of an image in inches
ROW = 0.19  # height of a line of text below it in inches


@dataclass(frozen=True, eq=False)
class Shown:
    """An image with its prediction."""

    title: str  # name of its file
    image: np.ndarray  # uint8 [H, W, 3]
    classes: Sequence[tuple[str, float]]  # names and probabilities, the most probable first
    heat: np.ndarray | None = None  # heat map of the first class, [h, w] from 0 to 1


def draw(shown: Sequence[Shown], path: Path, title: str, note: str = "") -> None:
    """Writes a PNG with each image above its classes and bars of their probabilities, and heat maps beside the images.

    Args:
        shown: one or more images with the same number of classes.
        path: the PNG file.
        title: title of the figure.
        note: smaller text below the title.
    """
    from matplotlib.figure import Figure

    heated = any(item.heat is not None for item in shown)
    columns = min(len(shown), 4 if not heated else 2 if len(shown) < 5 else 3)
    rows = math.ceil(len(shown) / columns)
    wide = WIDTH * (2 if heated else 1)
    below = ROW * (len(shown[0].classes) + 0.35)
    cell = (wide + 0.3, 0.3 + WIDTH + below + 0.12)
    top, left, bottom = 0.72 if note else 0.5, 0.2, 0.1
    size = (columns * cell[0] + 2 * left - 0.3, rows * cell[1] + top + bottom)
    figure = Figure(figsize=size, facecolor="white")

    def axes(x: float, y: float, width: float, height: float) -> Axes:
        """A rectangle in inches, ``y`` from the top."""
        return figure.add_axes((x / size[0], 1 - (y + height) / size[1], width / size[0], height / size[1]))

    letters = int(wide * 13)
    figure.text(
        left / size[0], 1 - 0.24 / size[1], short(title, int((size[0] - 2 * left) * 10)), fontsize=11, color=INK,
        va="center", fontweight="bold", parse_math=False,
    )  # fmt: skip
    figure.text(
        left / size[0], 1 - 0.48 / size[1], short(note, int((size[0] - 2 * left) * 13)), fontsize=8.5, color=QUIET,
        va="center", parse_math=False,
    )  # fmt: skip
    for number, item in enumerate(shown):
        x = left + number % columns * cell[0]
        y = top + number // columns * cell[1]
        figure.text(
            x / size[0], 1 - (y + 0.13) / size[1], short(item.title, letters), fontsize=8, color=QUIET, va="center",
            parse_math=False,
        )  # fmt: skip
        _picture(axes(x, y + 0.27, WIDTH, WIDTH), item.image)
        if item.heat is not None:
            _picture(axes(x + WIDTH, y + 0.27, WIDTH, WIDTH), overlaid(item.image, item.heat))
        _bars(axes(x, y + 0.3 + WIDTH, wide, below), item.classes, letters)
    save(figure, path)


def _picture(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, interpolation="lanczos" if min(image.shape[:2]) > 100 else "nearest", aspect="equal")
    axes.set_axis_off()


def _bars(axes: Axes, classes: Sequence[tuple[str, float]], letters: int) -> None:
    """Draws a line for each class: its name over a bar."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(len(classes) + 0.35, 0))
    for place, (name, share) in enumerate(classes):
        axes.barh(place + 0.6, 1, height=0.86, color="#f2f5f8", linewidth=0)
        axes.barh(place + 0.6, share, height=0.86, color=FIRST if place == 0 else REST, linewidth=0)
        style: dict[str, Any] = {
            "fontsize": 8,
            "color": INK,
            "va": "center",
            "fontweight": "bold" if place == 0 else "normal",
        }
        axes.text(0.015, place + 0.62, short(name, max(12, letters - 9)), ha="left", parse_math=False, **style)
        axes.text(0.985, place + 0.62, f"{100 * share:.1f} %", ha="right", **style)


def overlaid(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The grey image blended with the heat map, whose opacity increases with its value; uint8 ``[H, W, 3]``."""
    import matplotlib
    from PIL import Image

    height, width = image.shape[:2]
    levels = Image.fromarray((255 * np.clip(np.nan_to_num(heat), 0, 1)).astype(np.uint8))
    smooth = np.asarray(levels.resize((width, height), Image.Resampling.BICUBIC), float) / 255
    colours = matplotlib.colormaps["inferno"](smooth)[..., :3] * 255
    grey = image.astype(float).mean(-1, keepdims=True)
    share = (0.15 + 0.6 * smooth)[..., None]
    return ((1 - share) * grey + share * colours).clip(0, 255).astype(np.uint8)
