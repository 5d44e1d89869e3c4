"""What is in images: files, folders and stdin, as lines, JSON and CSV, and the picture of it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import jresnet
from jresnet.commands import predict, run
from jresnet.errors import DataError
from jresnet.models.resnet import ResNet, ResNetConfig
from jresnet.reports import gallery
from jresnet.weights import native
from jresnet.weights.preprocessing import Preprocessing

NAMES = ["ant", "bee", "c,at"]
HOW = Preprocessing(36, 32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    model = ResNet(ResNetConfig("basic", (1, 1), (4, 8), num_classes=3), rngs=nnx.Rngs(0))
    native.save(path, model, preprocessing=HOW, categories=NAMES)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos, one of them on its side, and one that is none."""
    root = tmp_path_factory.mktemp("photos")
    draws = np.random.default_rng(0)
    (root / "deep").mkdir()
    for i, name in enumerate(("a.png", "deep/b.jpg", "c.webp")):
        pixels = draws.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60 + i, 50)).save(root / name)
    (root / "d.png").write_text("none")
    return root


def expected(weights: Path, path: Path) -> np.ndarray:
    found = jresnet.get_weights(weights)
    logits = np.asarray(jresnet.load(weights)(found.preprocess(Image.open(path))), np.float64)[0]
    return np.exp(logits) / np.exp(logits).sum()


def test_json_says_names_and_probabilities(weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("predict", ["--weights", str(weights), str(photos), "--json", "--top", "9", "--batch-size", "2"], "x") == 1
    )
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert [Path(image["file"]).name for image in report["images"]] == ["a.png", "c.webp", "b.jpg"]
    for image in report["images"]:
        right = expected(weights, Path(image["file"]))
        assert [entry["index"] for entry in image["classes"]] == np.argsort(-right).tolist()  # three classes, not nine
        np.testing.assert_allclose(
            [entry["probability"] for entry in image["classes"]], np.sort(right)[::-1], rtol=1e-4
        )
        assert all(entry["class"] == NAMES[entry["index"]] for entry in image["classes"])
    assert "d.png" in report["bad"][0]["file"]
    assert "error: 1 of 4 images are bad and were skipped; use --skip-bad to accept this" in err


def test_csv_and_lines(weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("predict", ["--weights", str(weights), str(photos / "a.png"), "--csv", "--top", "2"], "x") == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0] == ["file", "rank", "class", "index", "probability"]
    assert [row[1] for row in rows[1:]] == ["1", "2"]
    assert {row[2] for row in rows[1:]} <= set(NAMES)
    assert run("predict", ["--weights", str(weights), str(photos / "a.png")], "x") == 0
    line = capsys.readouterr().out
    assert f"\n{photos / 'a.png'}: " in line
    assert line.count(" %") == 3


def test_an_image_may_come_on_stdin(
    weights: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stdin:
        buffer = io.BytesIO((photos / "a.png").read_bytes())

    monkeypatch.setattr("sys.stdin", Stdin)
    assert run("predict", ["--weights", str(weights), "-", "--json"], "x") == 0
    (image,) = json.loads(capsys.readouterr().out)["images"]
    assert image["file"] == "stdin"
    assert image["classes"][0]["probability"] == pytest.approx(expected(weights, photos / "a.png").max(), rel=1e-4)


def test_of_a_folder_hidden_copies_are_left_out_and_other_files_counted(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("a.png", ".ipynb_checkpoints/a-checkpoint.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    (tmp_path / "phone.heic").write_bytes(b"x")
    assert run("predict", ["--weights", str(weights), str(tmp_path), "--csv", "--top", "1"], "x") == 0
    out, err = capsys.readouterr()
    assert [row["file"] for row in csv.DictReader(io.StringIO(out))] == [str(tmp_path / "a.png")]
    assert f"note: 1 other files in {tmp_path} are ignored; images end in .jpg" in err


def test_a_guessed_preprocessing_is_said(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "predict", lambda *arguments: iter(()))
    silent = tmp_path / "w.safetensors"
    native.save(silent, ResNet(ResNetConfig("basic", (1,), (4,), num_classes=3), rngs=nnx.Rngs(0)))
    for path, said in ((weights, False), (silent, True)):
        assert run("predict", ["--weights", str(path), str(photos / "a.png"), "--csv"], "x") == 0
        err = capsys.readouterr().err
        assert ("note: images shorter side 256" in err and "; a guess: the weights do not say" in err) == said


def test_what_there_is_not(weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, message in (
        ([str(photos / "x.jpg")], 1, "there is no image"),
        ([str(tmp_path)], 1, "contains no image; images end in .jpg"),
        (["--cam", str(photos)], 2, "--cam needs --gallery, into which it draws heat maps"),
        (["--gallery", "x.jpg", str(photos)], 2, "that ends in .png"),
    ):
        assert run("predict", ["--weights", str(weights), *arguments], "x") == code
        assert message in capsys.readouterr().err
    native.save(tmp_path / "w.safetensors", ResNet(ResNetConfig("basic", (1,), (4,), num_classes=0), rngs=nnx.Rngs(0)))
    assert run("predict", ["--weights", str(tmp_path / "w.safetensors"), str(photos)], "x") == 1
    assert "have no head" in capsys.readouterr().err


def test_the_gallery_shows_what_the_network_sees(
    weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(gallery, "draw", lambda shown, *rest: drawn.extend(shown))
    found = predict.sources([str(photos / "a.png")])
    model = jresnet.load(weights)
    kept = list(predict.predict(model, HOW, found, NAMES, 2, 4, []))
    predict.draw(kept, model, HOW, tmp_path / "g.png", "x", cam=True)
    (one,) = drawn
    assert one.image.shape == (320, 320, 3)  # the same part of the image, ten times as large
    assert one.heat.shape == (32, 32)
    inputs = jresnet.get_weights(weights).preprocess(Image.open(photos / "a.png"))
    heat = jresnet.explain.grad_cam(model, jnp.asarray(inputs), kept[0].classes[0][0])
    np.testing.assert_allclose(one.heat, np.asarray(heat)[0], atol=1e-5)
    small = Image.fromarray(one.image).resize((32, 32), Image.Resampling.BOX)
    own = np.asarray(predict.images.load(photos / "a.png", HOW, predict.images.photo), float)
    assert abs(np.asarray(small, float) - own).mean() < 12  # another part of the image: 50


def test_the_picture_is_written_whatever_the_names_are(weights: Path, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "g.png"
    arguments = ["--weights", str(weights), str(photos), "--gallery", str(path), "--cam", "--skip-bad"]
    assert run("predict", arguments, "x") == 0
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
    pixels = np.zeros((20, 20, 3), np.uint8)
    shown = [gallery.Shown("$x_1^{", pixels, [("$\\frac", 0.7), ("b" * 300, 0.3)], np.full((4, 4), np.nan))]
    gallery.draw(shown * 9, path, "_title $")
    with Image.open(path) as image:
        assert image.width > image.height / 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["p/a.png"], ["a.png"]),
        (["p/q/cat/1.png", "p/q/dog/1.png"], ["cat/1.png", "dog/1.png"]),
        (["p/a.png", "stdin"], ["p/a.png", "stdin"]),
        (["/p/a.png", "b.png"], ["/p/a.png", "b.png"]),
    ],
)
def test_images_of_the_same_name_are_told_apart(files: list[str], expected: list[str]) -> None:
    assert predict.titles(files) == expected


def test_a_heat_map_colours_what_is_hot() -> None:
    heat = np.zeros((2, 2))
    heat[0, 0] = 1
    found = gallery.overlaid(np.full((16, 16, 3), 128, np.uint8), heat).astype(int)
    assert np.ptp(found[1, 1]) > 60  # coloured
    assert np.ptp(found[-2, -2]) < 30  # nearly grey


def test_too_much_on_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b"x" * 11)

    monkeypatch.setattr("sys.stdin", Stdin)
    monkeypatch.setattr(predict, "MAX_STDIN", 10)
    with pytest.raises(DataError, match="at most 10 bytes"):
        predict.sources(["-"])
