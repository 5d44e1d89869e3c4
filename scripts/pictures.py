"""Draw the images of the site and the README in docs/img: ``python scripts/pictures.py [--run RUN]``.

Blocks are drawn from the models, curves from ``results/``, and the parity plot from the table of docs/log/2026-11-parity.md.
``--run`` (of ``jresnet train --depth 20 --dataset digits``) adds the confusion matrix and the gallery of digits. The colours
are those of Okabe and Ito, which colour-blind readers can distinguish; lines also differ in dashes and markers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import jresnet
from convert.verify import ALLOWED_OVERALL
from jresnet import commands
from jresnet.commands.flags import Parser, folder
from jresnet.data.digits import load_digits
from jresnet.models import zoo
from jresnet.models.layers import BatchNorm, Conv
from jresnet.reports.plots import save

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "img"
BLUE, ORANGE, GREEN, RED, SKY, INK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#1f2933"
LEFT, RIGHT = 3.0, 8.0  # x coordinates of the layers and of the shortcut
FAMILIES = {  # title of each block, by the architecture that it is drawn from
    "resnet18": "BasicBlock",
    "resnet50": "Bottleneck",
    "resnext50_32x4d": "ResNeXt: 32 groups",
    "wide_resnet50_2": "Wide ResNet: wide 3×3",
    "resnet20_cifar": "CIFAR: no parameters in shortcuts",
}


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(description="Draw the images of docs/img.")
    parser.add_argument(
        "--run", type=folder, metavar="RUN", help="a run on the digits: also draw its confusion matrix and a gallery"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Draws the images; returns the exit code."""
    args = parser().parse_args(argv)
    blocks(OUT / "blocks.png")
    training_curves(OUT / "training-curves.png")
    parity(OUT / "parity.png")
    if args.run:
        shutil.copyfile(args.run / "confusion.png", OUT / "confusion.png")
        digits(args.run / "last.safetensors", OUT / "gallery.png")
    for picture in ("blocks", "training-curves", "parity", *(("confusion",) if args.run else ())):
        smaller(OUT / f"{picture}.png")
    return 0


def smaller(path: Path) -> None:
    """Reduces an image to 256 colours, which saves two thirds of the bytes."""
    from PIL import Image

    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(256)
    few.save(path, optimize=True)


def blocks(path: Path) -> None:
    """Draws the first block of the second stage of each family, which halves height and width, with its layers' shapes."""
    figure = Figure(figsize=(9, 9.4), facecolor="white", layout="constrained")
    places = figure.subplots(2, 3).ravel()
    for axes, (arch, title) in zip(places, FAMILIES.items(), strict=False):
        block(axes, arch, title)
    legend(places[-1])
    save(figure, path)


def block(axes: Axes, arch: str, title: str) -> None:
    """Draws a block: its layers from top to bottom with the shapes between them, and the shortcut on the right."""
    row = zoo.find(arch)
    model = jresnet.create(arch)
    size = row.image_size
    shapes = jax.eval_shape(
        lambda x: model.features(x, names=["layer1", "layer2.0"]), jnp.zeros((1, size, size, row.config.in_channels))
    )
    module = model.layer2[0]
    shape = shapes["layer1"].shape[1:]
    count = sum(hasattr(module, f"conv{i}") for i in (1, 2, 3))
    axes.set(xlim=(0, 10), ylim=(12.4, -2.4))
    axes.axis("off")
    axes.set_title(title, fontsize=11, color=INK, pad=0)
    depths = "-".join(map(str, row.config.depths))
    axes.text(
        5, -1.75, f"layer2.0 of {arch}\n(stages of {depths} blocks)", ha="center", va="center", fontsize=8.5, color=INK
    )
    said(axes, LEFT, -0.4, shape)
    y = 1.2  # y coordinate of the middle of a box
    step = 3.0 if count == 3 else 4.2
    for i in range(1, count + 1):
        conv: Conv = getattr(module, f"conv{i}")
        arrow(axes, (LEFT, -0.1 if i == 1 else y - step + 1.8), (LEFT, y - 0.8))
        box(axes, LEFT, y, 5.4, [*words(conv), "BatchNorm, ReLU" if i < count else "BatchNorm"], SKY, 1.6)
        shape = output(conv, shape)
        if i < count:
            said(axes, LEFT, y + 1.3, shape)
        y += step
    assert shape == shapes["layer2.0"].shape[1:], (arch, shape)
    end = y - step + 2.2  # y coordinate of the sum
    arrow(axes, (LEFT, y - step + 0.8), (LEFT, end - 0.35))
    middle = (end - 0.4) / 2
    if module.downsample:
        text = words(module.downsample[0])
        text += ["BatchNorm"] if any(isinstance(part, BatchNorm) for part in module.downsample) else []
    else:
        text = ["every second", "pixel; zeros for", "new channels"]
    axes.plot([5.0, RIGHT, RIGHT], [-0.4, -0.4, middle - 1.0], color=INK, linewidth=1.2)
    box(axes, RIGHT, middle, 3.6, text, ORANGE, 2.0)
    axes.plot([RIGHT, RIGHT], [middle + 1.0, end], color=INK, linewidth=1.2)
    arrow(axes, (RIGHT, end), (LEFT + 0.5, end))
    axes.text(LEFT, end, "+", ha="center", va="center", fontsize=11,
              bbox={"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": INK})  # fmt: skip
    arrow(axes, (LEFT, end + 0.4), (LEFT, end + 1.0))
    said(axes, LEFT, end + 1.4, shape, "ReLU, ")


def words(conv: Conv) -> list[str]:
    """Describes a convolution: ``3×3, 64 → 128``, and its stride and groups if they are not 1."""
    height, width, within, out = conv.kernel.shape
    more = ([f"stride {conv.stride}"] if conv.stride > 1 else []) + (
        [f"{conv.groups} groups"] if conv.groups > 1 else []
    )
    return [f"{height}×{width}, {within * conv.groups} → {out}"] + ([", ".join(more)] if more else [])


def output(conv: Conv, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The output shape of a convolution."""
    side = [
        (n + 2 * conv.padding - conv.dilation * (conv.kernel.shape[0] - 1) - 1) // conv.stride + 1 for n in shape[:2]
    ]
    return (*side, conv.kernel.shape[-1])


def box(axes: Axes, x: float, y: float, width: float, lines: list[str], color: str, height: float = 1.0) -> None:
    """Draws a layer."""
    place = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(place, width, height, boxstyle="round,pad=0.02,rounding_size=0.12", facecolor=color, alpha=0.35)
    )
    axes.add_patch(
        FancyBboxPatch(place, width, height, boxstyle="round,pad=0.02,rounding_size=0.12", fill=False, edgecolor=INK)
    )
    axes.text(x, y, "\n".join(lines), ha="center", va="center", fontsize=8.5, color=INK, linespacing=1.05)


def said(axes: Axes, x: float, y: float, shape: tuple[int, ...], before: str = "") -> None:
    """Writes a shape."""
    text = before + " × ".join(map(str, shape))
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=BLUE, backgroundcolor="white",
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip


def arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    """Draws an arrow."""
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=9, color=INK, shrinkA=0, shrinkB=0))


def legend(axes: Axes) -> None:
    """Explains the symbols."""
    axes.set(xlim=(0, 10), ylim=(12.4, -2.4))
    axes.axis("off")
    box(axes, 2.2, 1.0, 3.4, ["layer"], SKY)
    axes.text(4.3, 1.0, "convolution, BatchNorm,\nReLU", va="center", fontsize=9)
    box(axes, 2.2, 3.0, 3.4, ["shortcut"], ORANGE)
    axes.text(4.3, 3.0, "of the block's input", va="center", fontsize=9)
    said(axes, 3.1, 5.0, ("height", "width", "channels"))
    axes.text(0.5, 5.7, "of the image between layers", va="center", fontsize=9)
    note = "Drawn from the models. The other blocks\nof a stage have stride 1 and add their\ninput unchanged."
    axes.text(0.5, 8.0, note, va="center", fontsize=9)


def training_curves(path: Path) -> None:
    """Draws loss and validation accuracy of ResNet-20 in both frameworks: each of three seeds, and their mean."""
    figure = Figure(figsize=(9, 3.6), facecolor="white", layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for name, label, color, style in (
        ("resnet20-fast", "jresnet", BLUE, "o-"),
        ("resnet20-fast-torch", "PyTorch", RED, "s--"),
    ):
        seeds = [
            [json.loads(line) for line in file.read_text().splitlines()]
            for file in sorted((ROOT / "results" / name).glob("seed-*/metrics.jsonl"))
        ]
        epochs = [row["epoch"] for row in seeds[0]]
        for axes, key, factor in ((loss, "train_loss", 1), (accuracy, "val_accuracy", 100)):
            values = factor * np.array([[row[key] for row in rows] for rows in seeds])
            axes.plot(epochs, values.T, color=color, linewidth=0.7, alpha=0.45)
            axes.plot(epochs, values.mean(0), style, color=color, label=label, markersize=4)
    for axes, what in ((loss, "training loss (nats)"), (accuracy, "validation accuracy (%)")):
        axes.set(xlabel="epoch", ylabel=what)
        axes.grid(alpha=0.3)
        axes.legend(title="mean of 3 seeds")
        axes.set_xticks(epochs)
    figure.suptitle("ResNet-20 on CIFAR-10, recipe fast, 10 epochs; thin lines are the seeds", fontsize=11)
    save(figure, path)


def parity(path: Path) -> None:
    """Draws the float32 errors of jresnet and PyTorch, one point per architecture."""
    page = (ROOT / "docs" / "log" / "2026-11-parity.md").read_text()
    lines = page[page.index("| architecture | float64 |") :].split("\n\n")[0].splitlines()[2:]
    rows: list[list[str]] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    families = {"torchvision and tutorials": ("o", BLUE), "for CIFAR": ("s", RED), "timm": ("^", GREEN)}
    figure = Figure(figsize=(7, 6.5), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for label, (marker, color) in families.items():
        own = np.array([[float(row[column]) for column in (3, 2)] for row in rows if family(row[0]) == label])
        axes.plot(*own.T, marker, color=color, label=f"{label} ({len(own)})", markersize=6, fillstyle="none")
    ends = np.array([8e-8, 3e-6])
    axes.plot(ends, ends, "-", color="#4a5560", linewidth=1)
    limit = f"{ALLOWED_OVERALL} times PyTorch's: the limit of convert.verify"
    axes.plot(ends, ends * ALLOWED_OVERALL, "--", color="#4a5560", linewidth=1, label=limit)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axes.set_xlabel("PyTorch: relative L2 distance of float32 logits to float64 logits")
    axes.set_ylabel("jresnet: distance of float32 logits to PyTorch's float64 logits")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    axes.set_title(f"Rounding errors of {len(rows)} networks (docs/log/2026-11-parity.md)", fontsize=11)
    save(figure, path)


def family(name: str) -> str:
    """The source of the network in a row of the parity table."""
    arch = name.partition(" ")[0]
    if arch.endswith("_cifar"):
        return "for CIFAR"
    return "timm" if arch in zoo.IN_TIMM and "torchvision" not in zoo.ZOO[arch].source else "torchvision and tutorials"


def digits(weights: Path, path: Path) -> None:
    """Draws a gallery of digits with heat maps, by ``jresnet predict``."""
    from PIL import Image

    data: Any = load_digits().test
    with tempfile.TemporaryDirectory() as place:
        for label in (0, 2, 3, 5, 7, 8):
            number = int(np.argmax(data.labels == label))
            Image.fromarray(data.images[number]).resize((96, 96)).save(Path(place) / f"a {label}.png")
        given = [place, "--weights", str(weights), "--gallery", str(path), "--cam", "--top", "3", "--force"]
        assert commands.dispatch(["predict", *given]) == 0
    with Image.open(path) as picture:  # 256 colours would be too few for heat maps
        small = picture.convert("RGB").resize(
            (1280, round(1280 * picture.height / picture.width)), Image.Resampling.LANCZOS
        )
    small.save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(commands.guarded(main, "pictures"))
