"""The pictures: what they show, read from matplotlib's own objects, and that odd names and numbers break none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jresnet.errors import InputError
from jresnet.reports import plots

CLASSES = ("cat", "dog", "a very long name of a class, with $maths_{$ and more", "_frog")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were written."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def rows(epochs: int, accuracy: float = 0.5, val: bool = True) -> list[dict[str, Any]]:
    return [
        {"epoch": epoch, "step": 10 * epoch, "train_loss": 2 / epoch, "train_accuracy": 0.4, "test_loss": 2.1,
         "test_accuracy": accuracy} | ({"val_loss": 2.2, "val_accuracy": accuracy + epoch / 100} if val else {})
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and [path] == list(path.parent.iterdir())


def boxes(figure: Figure, texts: list) -> list[tuple[str, Any]]:
    """Where each text stands, in pixels."""
    if not isinstance(figure.canvas, FigureCanvasAgg):
        FigureCanvasAgg(figure).draw()
    return [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]


def overlaps(figure: Figure, texts: list) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes share some area."""
    found = [(text, box.shrunk(0.98, 0.98)) for text, box in boxes(figure, texts)]
    return [
        (a, b) for i, (a, box) in enumerate(found) for b, other in found[:i]
        if min(box.x1, other.x1) > max(box.x0, other.x0) and min(box.y1, other.y1) > max(box.y0, other.y0)
    ]  # fmt: skip


def outside(figure: Figure, texts: list) -> list[str]:
    """Texts that the picture's edge cuts."""
    width, height = figure.bbox.width + 1, figure.bbox.height + 1
    return [
        text for text, box in boxes(figure, texts) if box.x0 < -1 or box.y0 < -1 or box.x1 > width or box.y1 > height
    ]


def test_curves(drawn: list[Figure], tmp_path: Path) -> None:
    found = rows(5)
    found[2]["test_loss"] = None  # was not finite
    plots.plot_curves(found, tmp_path / "x.png", "resnet $20_{$")
    assert is_png(tmp_path / "x.png")
    loss, accuracy = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines.keys() == {"training", "validation", "test"}
    assert lines["training"] == [[epoch, 2 / epoch] for epoch in range(1, 6)]
    assert lines["test"] == [[1, 2.1], [2, 2.1], [4, 2.1], [5, 2.1]]
    assert [line.get_ydata()[0] for line in accuracy.lines] == [40, 51, 50]
    assert loss.get_yscale() == "log"


@pytest.mark.parametrize("found", [[], rows(1), rows(3, val=False), [dict(row, train_loss=0.0) for row in rows(2)]])
def test_curves_of_little(found: list, tmp_path: Path) -> None:
    plots.plot_curves(found, tmp_path / "x.png", "t")
    assert is_png(tmp_path / "x.png")


@pytest.mark.parametrize("values", [(2.3, 2.1), (2.3, 0.2), (2.3, 0.0004), (2.3, 1e-9)])
def test_the_axis_of_losses_can_be_read(drawn: list[Figure], tmp_path: Path, values: tuple[float, float]) -> None:
    found = [{"epoch": epoch, "train_loss": value} for epoch, value in enumerate(values, 1)]
    plots.plot_curves(found, tmp_path / "x.png", "t")
    axes = drawn[0].axes[0]
    labels = [label for label in axes.get_yticklabels() if axes.bbox.y0 <= label.get_window_extent().y1 <= axes.bbox.y1]
    assert len({label.get_text() for label in labels}) >= 2
    assert not overlaps(drawn[0], labels)


def test_confusion(drawn: list[Figure], tmp_path: Path) -> None:
    labels, predictions = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 0, 1, 1, 2, 0])
    counts = plots.confusion(labels, predictions, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    plots.plot_confusion(labels, predictions, CLASSES, tmp_path / "x.png", "t")
    assert is_png(tmp_path / "x.png")
    axes = drawn[0].axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "2", (1, 0): "1", (1, 1): "1", (0, 2): "1", (2, 2): "1"}
    shares = axes.images[0].get_array()
    assert shares[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["cat", "dog", "a very long …{$ and more", "_frog"]


@pytest.mark.parametrize("count", [10, 25, 130])
def test_no_class_names_overlap(drawn: list[Figure], tmp_path: Path, count: int) -> None:
    labels = np.arange(count).repeat(3)
    names = [f"a very long name, which is that of class {index}" for index in range(count)]
    plots.plot_confusion(labels, labels[::-1], names, tmp_path / "x.png", "t")
    axes = drawn[0].axes[0]
    assert len(axes.get_yticklabels()) == (count if count < 100 else 65)
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert not overlaps(drawn[0], ticks)
        assert not outside(drawn[0], ticks)


def test_accuracy_by_class() -> None:
    labels, predictions = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    assert plots.per_class_accuracy(labels, predictions, CLASSES) == {
        "cat": 2 / 3, "dog": 1.0, CLASSES[2]: None, "_frog": None,
    }  # fmt: skip
    assert plots.per_class_accuracy(labels, predictions, ["crane", "crane"]) == {"crane (0)": 2 / 3, "crane (1)": 1.0}


def worst(tmp_path: Path, labels: np.ndarray, predictions: np.ndarray, losses: np.ndarray, **options: Any) -> None:
    channels = options.pop("channels", 3)
    images = (
        np.zeros((len(labels), 4, 4, channels), np.uint8) + np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    )
    plots.plot_worst(images, labels, predictions, losses, CLASSES, tmp_path / "x.png", "$t_{$", **options)
    assert is_png(tmp_path / "x.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_worst_mistakes(drawn: list[Figure], tmp_path: Path, channels: int) -> None:
    labels, predictions = np.array([0, 1, 2, 3, 0, 1]), np.array([0, 0, 0, 3, 1, 2])
    losses = np.array([9.0, 1.0, 3.0, 0.1, np.nan, 2.0])  # the highest loss is of an image classified rightly
    worst(tmp_path, labels, predictions, losses, channels=channels)
    (axes,) = drawn[0].axes
    assert [image.get_array().flat[0] for image in axes.images] == [4, 2, 5, 1]
    assert [text.get_text() for text in axes.texts] == [
        "dog / cat\nloss nan", "cat /\na very long …{$ and more\nloss 3.00", "a very long …{$ and more /\ndog\nloss 2.00",
        "cat / dog\nloss 1.00",
    ]  # fmt: skip
    assert {image.get_interpolation() for image in axes.images} == {"nearest"}
    middles = [sum(image.get_extent()[:2]) / 2 for image in axes.images]
    assert middles == pytest.approx([text.get_position()[0] for text in axes.texts])  # each caption above its image
    assert "4 of 6 images misclassified; predicted / true" in drawn[0].get_suptitle()


def test_the_grid_of_the_worst(drawn: list[Figure], tmp_path: Path) -> None:
    labels, predictions = np.arange(90) % 4, (np.arange(90) + 2) % 4
    worst(tmp_path, labels, predictions, np.linspace(0, 5, 90))
    (axes,) = drawn[0].axes
    corners = [(round(image.get_extent()[0], 3), round(image.get_extent()[2], 3)) for image in axes.images]
    assert [len(set(sides)) for sides in zip(*corners, strict=True)] == [5, 5]
    assert len(set(corners)) == 25
    assert axes.images[0].get_array().flat[0] == 89
    texts = [*axes.texts, drawn[0]._suptitle]
    assert not overlaps(drawn[0], texts)
    assert not outside(drawn[0], texts)
    assert "90 of 90 images misclassified, the 25 worst" in drawn[0].get_suptitle()


def test_no_mistake_at_all(drawn: list[Figure], tmp_path: Path) -> None:
    worst(tmp_path, np.arange(4), np.arange(4), np.ones(4))
    assert not any(axes.images for axes in drawn[0].axes)
    assert any(text.get_text() == "no image was misclassified" for axes in drawn[0].axes for text in axes.texts)


def test_runs_side_by_side(drawn: list[Figure], tmp_path: Path) -> None:
    seeds = [rows(4, 0.4), rows(4, 0.6), rows(2, 0.8)]
    plots.plot_runs({"_several $seeds_{$": seeds, "one": [rows(3)], "none": [[]]}, tmp_path / "x.png")
    assert is_png(tmp_path / "x.png")
    loss, accuracy = drawn[0].axes
    assert accuracy.get_ylabel() == "validation accuracy (%)"
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [
        [[1, pytest.approx(61)], [2, pytest.approx(62)], [3, pytest.approx(53)], [4, pytest.approx(54)]],
        [[1, pytest.approx(51)], [2, pytest.approx(52)], [3, pytest.approx(53)]],
    ]
    (band,) = accuracy.collections
    vertices = band.get_paths()[0].vertices
    assert [vertices[vertices[:, 0] == 1][:, 1].min(), vertices[vertices[:, 0] == 1][:, 1].max()] == [41, 81]
    assert [line.get_color() for line in loss.lines] == [line.get_color() for line in accuracy.lines]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "_several $seeds_{$ (3 seeds)",
        "one",
        "none (no epoch yet)",
    ]


def test_which_accuracy_is_compared(drawn: list[Figure], tmp_path: Path) -> None:
    only_val = [[{"epoch": 1, "step": 1, "train_loss": 1.0, "val_accuracy": 0.1}]]
    plots.plot_runs({"a": [rows(2)], "b": [rows(2, val=False)]}, tmp_path / "x.png")
    plots.plot_runs({"a": only_val * 2, "b": [rows(2, val=False)]}, tmp_path / "x.png")
    plots.plot_runs({"a": [[]]}, tmp_path / "x.png")
    assert [figure.axes[1].get_ylabel() for figure in drawn] == ["test accuracy (%)", "accuracy (%)", "accuracy (%)"]
    assert [text.get_text() for text in drawn[1].legends[0].get_texts()] == ["a (2 seeds, validation)", "b (test)"]


@pytest.mark.parametrize(
    ("count", "beginning"), [(10, ""), (20, "resnet20_cifar-cifar10-with-a-long-name-20261122-"), (40, "run ")]
)
def test_many_runs(drawn: list[Figure], tmp_path: Path, count: int, beginning: str) -> None:
    names = [f"{beginning}{index:06d}" for index in range(count)]
    plots.plot_runs({name: [rows(3), rows(3)] for name in names}, tmp_path / "x.png")
    loss, accuracy = drawn[0].axes
    assert len({tuple(line.get_color()) for line in loss.lines}) == count
    texts = drawn[0].legends[0].get_texts()
    assert len({text.get_text() for text in texts}) == count
    below = [*texts, loss.xaxis.label, accuracy.xaxis.label]
    assert not overlaps(drawn[0], below)
    assert not outside(drawn[0], below)
    assert loss.bbox.height > 250  # the legend leaves room for the curves


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        plots.plot_curves(rows(1), tmp_path / "missing" / "x.png", "t")
