"""Folders of photos: listed, checked, split, decoded in an order that the seed decides."""

from __future__ import annotations

import io
import multiprocessing
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

import jresnet
from jresnet.data import crops, folder, images, records
from jresnet.data.dataset import from_records
from jresnet.data.stream import Files, Stream
from jresnet.data.tfds import prepare_tfds
from jresnet.errors import DataError
from jresnet.weights.preprocessing import Preprocessing

HOW = Preprocessing(80, 72)


def photo(path: Path, size: tuple[int, int] = (96, 90), seed: int = 0, **options: Any) -> Path:
    """Writes noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 10 sound images, nested, and a damaged one in each."""
    root = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("ant", "bee", "cat")):
        for i in range(10):
            photo(root / name / ("deep/er" if i % 2 else "") / f"{i}.jpg", (96 + i, 90), seed=10 * number + i)
    (root / "ant" / "empty.jpg").write_bytes(b"")
    (root / "bee" / "cut.jpg").write_bytes((root / "bee" / "0.jpg").read_bytes()[:900])
    (root / "cat" / "text.png").write_text("hello")
    photo(root / ".thumbnails" / "x.jpg")
    (root / "cat" / "._0.jpg").write_bytes(b"macOS")
    return root


def names(part: folder.Part) -> set[str]:
    return {Path(str(source)).name for source in part.sources}


# Listing and splitting.


def test_a_folder_of_classes_is_split_by_class(root: Path) -> None:
    found = folder.find(root)
    assert found.classes == ("ant", "bee", "cat")
    train, held, where = folder.split(found, share=0.2, seed=0)
    assert "20 %" in where
    assert np.bincount(train.labels).tolist() == [9, 9, 9]
    assert np.bincount(held.labels).tolist() == [2, 2, 2]
    assert not set(train.sources) & set(held.sources)
    assert folder.split(found, seed=0)[1].sources == held.sources
    assert folder.split(found, seed=1)[1].sources != held.sources


def test_a_class_of_one_image_is_learnt_from(tmp_path: Path) -> None:
    for name in ("a", "b"):
        photo(tmp_path / name / "0.png")
    photo(tmp_path / "b" / "1.png")
    train, held, _ = folder.split(folder.find(tmp_path), share=0.01)
    assert (train.labels.tolist(), held.labels.tolist()) == ([0, 1], [1])
    (tmp_path / "b" / "1.png").unlink()
    with pytest.raises(DataError, match="has no validation image"):
        folder.load(folder.find(tmp_path), HOW)


def test_train_and_val_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        photo(tmp_path / "train" / name / "t.webp")
    photo(tmp_path / "val" / "b" / "v.png")
    train, held, where = folder.split(folder.find(tmp_path))
    assert (names(train), names(held), held.labels.tolist()) == ({"t.webp"}, {"v.png"}, [1])
    assert "validation images" in where
    assert "1 classes have no validation image: a" in folder.load(folder.find(tmp_path), HOW).dataset.notes[0]
    photo(tmp_path / "val" / "z" / "v.png")
    with pytest.raises(DataError, match=r"1 class that .*train does not have \(z\)"):
        folder.find(tmp_path)


def test_classes_may_be_called_train_and_test(tmp_path: Path) -> None:
    for name in ("train", "test", "plane"):
        photo(tmp_path / name / "0.png")
    assert folder.find(tmp_path).classes == ("plane", "test", "train")


def test_a_table_names_paths_and_labels(tmp_path: Path) -> None:
    for name in ("x.png", "y.png"):
        photo(tmp_path / "images" / name)
    table = tmp_path / "table.csv"
    table.write_text('path,label\nimages/x.png,"with, comma"\nimages/y.png,b\n\n')
    found = folder.find(table)
    assert found.classes == ("b", "with, comma")
    assert [Path(str(s)).is_file() for s in found.train.sources] == [True, True]
    assert found.train.labels.tolist() == [1, 0]
    table.write_text("images/x.png;a\n")
    with pytest.raises(DataError, match="line 1 is not of the form path,label"):
        folder.find(table)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "contains no class folders"),
        (["a/0.png"], "has only one class, a: at least two"),
        (["a/0.png", "b/notes.txt"], r"has no training image: b\. .* 1 files of other kinds .*; images end in \.jpg, "),
        (["val/a/0.png"], "has a folder val but no folder for training: expected train or training"),
    ],
)
def test_what_cannot_be_learnt_from_is_told(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        photo(tmp_path / name) if name.endswith("png") else (
            (tmp_path / name).parent.mkdir(parents=True),
            (tmp_path / name).write_text(""),
        )
    with pytest.raises(DataError, match=message):
        folder.find(tmp_path)


def test_a_class_of_damaged_images_is_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(3):
            photo(tmp_path / name / f"{i}.png")
    for i in range(3):
        (tmp_path / "b" / f"{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"has no usable training image \(damaged images: 3; .*\): b\. Add"):
        folder.load(folder.find(tmp_path), HOW)


def test_a_tfds_store_is_read_without_naming_its_classes_twice(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (8, 3073), dtype=np.uint8)
    rows[:, 0] = [0, 1, 0, 1, 2, 2, 0, 1]
    data = from_records("cifar10", ("x", "y", "z"), [rows[:6]], [rows[6:]], "test")
    prepare_tfds(data, tmp_path, progress=False)
    found = folder.find("tfds:cifar10", tmp_path)
    assert found.classes == ("x", "y", "z")
    assert sorted(found.train.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    loaded = folder.load(found, Preprocessing(None, 32)).dataset
    stored = {image.tobytes() for image in data.train.images}
    assert {np.asarray(image).tobytes() for image in loaded.train.images} == stored
    with pytest.raises(DataError, match="no prepared store"):
        folder.find("tfds:flowers", tmp_path)
    with pytest.raises(DataError, match="as tfds:NAME"):
        records.find("../x", tmp_path)


# Images as a person sees them.


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def odd(kind: str) -> bytes:
    """An image whose left half is black and whose right half is (200, 100, 0) or a grey level of 128, 40 x 20 pixels."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 20:] = (200, 100, 0)
    rgb = Image.fromarray(pixels)
    grey = np.zeros((20, 40), np.uint8)
    grey[:, 20:] = 128
    if kind == "16-bit":
        return encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
    if kind == "grey":
        return encoded(Image.fromarray(grey), "PNG")
    if kind == "cmyk":
        return encoded(rgb.convert("CMYK"), "JPEG", quality=100)
    if kind == "palette":
        return encoded(rgb.quantize(4), "PNG")
    if kind == "alpha":  # what is black is transparent
        alpha = Image.fromarray((grey > 0).astype(np.uint8) * 255)
        return encoded(Image.merge("RGBA", (*rgb.split(), alpha)), "WEBP", lossless=True)
    if kind == "palette alpha":
        index = Image.fromarray((grey > 0).astype(np.uint8), "P")
        index.putpalette([0, 0, 0, 200, 100, 0])
        return encoded(index, "PNG", transparency=0)
    if kind == "animated":
        return encoded(rgb, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 20), "white")])
    turned = rgb.transpose(Image.Transpose.ROTATE_90)  # a camera held upright, which says so
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind == "exif tiff":
        return encoded(turned, "TIFF", exif=exif)
    return encoded(turned, "JPEG", quality=100, exif=exif, subsampling=0)


@pytest.mark.parametrize(
    ("kind", "left", "right"),
    [
        ("16-bit", 0, (128, 128, 128)),
        ("grey", 0, (128, 128, 128)),
        ("cmyk", 0, (200, 100, 0)),
        ("palette", 0, (200, 100, 0)),
        ("alpha", 255, (200, 100, 0)),
        ("palette alpha", 255, (200, 100, 0)),
        ("animated", 0, (200, 100, 0)),
        ("exif", 0, (200, 100, 0)),
        ("exif tiff", 0, (200, 100, 0)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*mode.*:DeprecationWarning")
def test_odd_images_look_as_they_should(kind: str, left: int, right: tuple[int, ...]) -> None:
    image = images.photo(odd(kind))
    assert (image.mode, image.size) == ("RGB", (40, 20))
    pixels = np.asarray(image, int)
    assert abs(pixels[10, 5] - left).max() <= 3
    assert abs(pixels[10, 35] - right).max() <= 3
    crop = crops.random_resized_crop(odd(kind), 16, Random(0), 0.9)
    assert abs(np.asarray(crop, int)[8, 15] - right).max() <= 3  # and so in a training view


def test_floats_and_bombs_are_bad_images(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(images.BadImage, match="NaN"):
        images.photo(encoded(Image.new("F", (4, 4), float("nan")), "TIFF"))
    content = encoded(Image.new("RGB", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    with pytest.raises(images.BadImage, match="pixels"):
        images.photo(content)


def test_damaged_images_are_named_and_left_out(root: Path) -> None:
    data = folder.load(folder.find(root), HOW).dataset
    assert {Path(file).name: reason.split(":")[0].split(" (")[0] for file, reason in data.skipped} == {
        "empty.jpg": "empty",
        "cut.jpg": "image file is truncated",
        "text.png": "not an image",
    }
    assert len(data.train.labels) + len(data.test.labels) == 30
    assert any("3 damaged images are skipped" in note for note in data.notes)


def test_the_digest_is_of_what_is_in_the_files(root: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(3):
            photo(tmp_path / name / f"{i}.png", seed=i)
    before = folder.load(folder.find(tmp_path), HOW).dataset.digest
    assert folder.load(folder.find(tmp_path), HOW).dataset.digest == before
    photo(tmp_path / "b" / "1.png", seed=9)
    assert folder.load(folder.find(tmp_path), HOW).dataset.digest != before


# Views and their order.


def test_copies_on_both_sides_are_told(root: Path, tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        for part in ("train", "val"):
            photo(tmp_path / part / name / f"{part}.png", seed=len(name + part))
    (tmp_path / "val" / "ant" / "copy.png").write_bytes((tmp_path / "train" / "ant" / "train.png").read_bytes())
    (tmp_path / "train" / "ant" / "empty.png").write_bytes(b"")
    (tmp_path / "val" / "bee" / "empty.png").write_bytes(b"")
    notes = folder.load(folder.find(tmp_path), HOW).dataset.notes
    assert any(note.startswith("1 of 4 validation images are also training images") for note in notes), notes
    assert not any("also training images" in note for note in folder.load(folder.find(root), HOW).dataset.notes)


def test_evaluation_views_are_those_of_the_weights(root: Path, native_file: Path) -> None:
    weights = jresnet.get_weights(native_file)
    object.__setattr__(weights, "metadata", dict(weights.metadata) | {"preprocessing": HOW.to_json()})
    data = folder.load(folder.find(root), HOW).dataset
    files: Any = data.train.images
    for index in (0, 5):
        ours = (files[index] / np.float32(255) - np.float32(HOW.mean)) / np.float32(HOW.std)
        theirs = weights.preprocess(Image.open(str(files.sources[index])))
        np.testing.assert_allclose(ours, np.asarray(theirs)[0], atol=1e-6)
    batches = list(files.batches(7))
    assert [batch.shape for batch in batches] == [(7, 72, 72, 3)] * 4
    assert (batches[1][2] == files[9]).all()
    assert (batches[-1][-1] == files[len(files) - 1]).all()


@pytest.fixture(scope="module")
def files(root: Path) -> Any:
    return folder.load(folder.find(root), HOW).dataset.train.images


def test_every_epoch_is_another_order_of_all_images(files: Any) -> None:
    stream = Stream(files, batch_size=8, epochs=4, seed=3, size=40)
    seen = [stream.batch(number) for number in range(len(stream))]
    stream.close()
    assert len(seen) == 4 * 3
    epochs = [np.concatenate([index for _, index in seen[3 * e : 3 * e + 3]]) for e in range(4)]
    assert all(len(set(epoch.tolist())) == 24 for epoch in epochs)  # 27 images: three sit out
    assert len({tuple(epoch) for epoch in epochs}) == 4
    first, again = (next(pixels[list(index).index(7)] for pixels, index in seen[3 * e : 3 * e + 3] if 7 in index)
                    for e in [e for e in range(4) if 7 in epochs[e]][:2])  # fmt: skip
    assert (first != again).any()  # an image is cropped anew


def test_a_batch_is_the_same_wherever_the_stream_begins(files: Any) -> None:
    def stream(seed: int, workers: int = 0) -> Stream:
        return Stream(files, batch_size=4, epochs=2, seed=seed, size=40, workers=workers)

    whole, later, other = stream(5), stream(5), stream(6)
    batches = [whole.batch(number) for number in range(9)]
    assert (later.batch(7)[0] == batches[7][0]).all()
    assert (later.batch(8)[1] == batches[8][1]).all()
    assert (later.again(2)[0] == batches[2][0]).all()
    assert (whole.batch(3)[0] == batches[3][0]).all()  # back, as after a rollback
    assert (other.batch(0)[1] != batches[0][1]).any()
    for one in (whole, later, other):
        one.close()


def test_workers_give_the_same_batches(files: Any) -> None:
    threads = Stream(files, batch_size=4, epochs=2, seed=5, size=40)
    workers = Stream(files, batch_size=4, epochs=2, seed=5, size=40, workers=2)
    for number in (5, 6, 7):  # over the end of an epoch
        for one, other in zip(threads.batch(number), workers.batch(number), strict=True):
            assert (one == other).all()
    threads.close()
    workers.close()


def test_an_image_that_is_gone_ends_the_stream_by_name(tmp_path: Path) -> None:
    paths = [str(photo(tmp_path / f"{i}.jpg", seed=i)) for i in range(4)]
    stream = Stream(Files(paths, HOW), batch_size=2, epochs=1, seed=0, size=40)
    Path(paths[2]).unlink()
    for _ in range(2):  # asked again, it does not go on behind it
        with pytest.raises(DataError, match=r"2\.jpg can no longer be decoded: missing"):
            [stream.batch(number) for number in range(2)]
    stream.close()


@pytest.mark.parametrize("form", ["upright", "turned"])
def test_a_large_photo_is_decoded_at_a_reduced_scale(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By OpenCV, and by Pillow where EXIF says that the photo lies on a side."""
    smooth = np.asarray(Image.new("RGB", (8, 8), (90, 160, 30)).resize((1200, 900)))
    path, exif = tmp_path / "large.jpg", Image.Exif()
    exif[0x0112] = 1 if form == "upright" else 6
    Image.fromarray(smooth).save(path, quality=95, exif=exif)
    loaded = []
    decode, seen = cv2.imdecode, images.seen
    monkeypatch.setattr(cv2, "imdecode", lambda *given: loaded.append(found := decode(*given)) or found)
    monkeypatch.setattr(images, "seen", lambda image: loaded.append(np.asarray(image)) or seen(image))
    crop = crops.random_resized_crop(str(path), 64, Random(0), 0.9)
    assert [pixels.shape for pixels in loaded] == [(113, 150, 3)]
    assert abs(crop.astype(int) - (90, 160, 30)).max() <= 2


def test_a_worker_that_dies_is_told(files: Any) -> None:
    stream = Stream(files, batch_size=4, epochs=50, seed=5, size=40, workers=1)
    stream.batch(0)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(DataError, match="a process that decodes images died"):
        [stream.batch(number) for number in range(1, len(stream))]
    stream.close()
