"""Image folders, decoding, preprocessing and batching; tests/parity/test_images_torch.py compares with torchvision."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jresnet.data import images
from jresnet.errors import DataError
from jresnet.weights.preprocessing import Preprocessing

GREY = {"mean": (0.5,), "std": (0.5,)}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG file whose header claims this size, whatever the data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# A folder's images ---------------------------------------------------------------------------------------------------


def test_a_folder_is_listed_in_order(tmp_path: Path) -> None:
    names = ("b/2.jpg", "b/10.JPEG", "a/x.PnG", "a/sub/0.webp", "B/1.tiff", "a/notes.txt", "b/.DS_Store", "readme.md")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "c").mkdir()
    found = images.list_folder(tmp_path)
    assert found.classes == ("B", "a", "b", "c")
    relative = [path.relative_to(tmp_path).as_posix() for path in found.paths]
    assert relative == ["B/1.tiff", "a/x.PnG", "a/sub/0.webp", "b/10.JPEG", "b/2.jpg"]
    assert found.labels == (0, 1, 1, 2, 2)
    assert found.ignored == 3


def test_links_are_followed_one_level_deep(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.jpg").touch()
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "2.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    (root / "a" / "circle").symlink_to(root)
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "itself").symlink_to("itself")
    found = images.list_folder(root)
    assert (found.classes, found.labels) == (("a", "b"), (0, 1))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "there is no folder .*nowhere: expected FOLDER/CLASS/"),
        (("flat.jpg",), "contains no class folders .files: 1.: expected FOLDER/CLASS/"),
        (("a/1.txt", "b/2.gif"), "contains no images .class folders: 2.: .* images end in .jpg"),
    ],
)
def test_folders_without_images(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        images.list_folder(tmp_path if files else tmp_path / "nowhere")


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    (tmp_path / "b").mkdir()
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"cannot list the images in .*Permission denied.*b'"):
        images.list_folder(tmp_path)


def test_the_classes_take_turns() -> None:
    assert images.in_turn([0, 0, 0, 2, 2, 1]) == [0, 5, 3, 1, 4, 2]


@given(st.lists(st.integers(0, 4), max_size=40).map(sorted))
def test_any_beginning_is_spread_evenly(labels: list[int]) -> None:
    order = images.in_turn(labels)
    assert sorted(order) == list(range(len(labels)))
    for n in range(len(labels) + 1):
        taken = [labels[i] for i in order[:n]]
        counts = {label: taken.count(label) for label in set(labels)}
        unfinished = [counts[label] for label in counts if counts[label] < labels.count(label)]
        assert not unfinished or max(counts.values()) <= min(unfinished) + 1


# Decoding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P", "I;16", "1", "LA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 30), 200 * 257, np.uint16))
    else:
        image = Image.new("RGB", (30, 20), (255, 255, 255)).convert(mode)
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    found = images.read(path)
    assert (found.mode, found.size) == ("RGB", (30, 20))
    assert np.asarray(found).min() >= 198


def test_orientation_is_not_looked_at_and_content_goes_before_the_name(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    noise(30, 20).save(tmp_path / "turned.jpg", exif=exif)
    assert images.read(tmp_path / "turned.jpg").size == (30, 20)
    noise(30, 20).save(tmp_path / "really-png.JPEG", format="PNG")
    assert np.array_equal(images.read(tmp_path / "really-png.JPEG"), noise(30, 20))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def jpeg() -> bytes:
    out = io.BytesIO()
    noise(64, 64).save(out, "JPEG")
    return out.getvalue()


BAD = {
    "empty.jpg": (b"", "empty"),
    "text.png": (b"no image", "not an image: expected one of JPEG, PNG"),
    "cut.jpg": (jpeg()[:2000], "truncated"),
    "header-only.jpg": (jpeg()[:20], "truncated|not an image"),
    "program.jpg": (EPS, "not an image: expected one of JPEG"),
    "lie.png": (png(5000, 5000, b"\0" * 100), "truncated"),
    "big.png": (png(10_000, 10_000), "10000 x 10000 pixels are more than 89,478,485"),
    "bomb.png": (png(65_000, 65_000), "bomb"),
    "no-size.png": (png(0, 0), "not an image"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images(tmp_path: Path, name: str) -> None:
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(images.BadImage, match=reason) as caught:
        images.read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert "<_io" not in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    for name, reason in ((".", "not a regular file"), ("pipe.jpg", "not a regular file"), ("link.jpg", "missing")):
        with pytest.raises(images.BadImage, match=reason):
            images.read(tmp_path / name)


# Preprocessing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [((500, 375), 256, (341, 256)), ((375, 640), 232, (232, 395)), ((3, 1), 10, (30, 10)), ((7, 3), 4, (9, 4))],
)
def test_the_longer_side_is_cut_to_a_whole_number(
    size: tuple[int, int], resize: int, expected: tuple[int, int]
) -> None:
    crop = max(expected) + 4
    found = images.preprocess(Image.new("RGB", size, (255, 255, 255)), Preprocessing(resize, crop))
    columns, rows = (found[..., 0] > 0).any(0), (found[..., 0] > 0).any(1)
    assert (int(columns.sum()), int(rows.sum())) == expected


@pytest.mark.parametrize(("width", "left"), [(10, 0), (13, 2), (15, 2), (17, 4), (21, 6)])
def test_the_centre_is_where_torchvision_cuts(width: int, left: int) -> None:
    """Half a pixel goes to the even side: 1.5 and 2.5 are both 2."""
    ramp = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (12, width, 3)).copy()
    found = images.preprocess(Image.fromarray(ramp), Preprocessing(None, 10))
    assert found.shape == (10, 10, 3)
    assert found[0, :, 0].tolist() == list(range(left, left + 10))


def test_black_around_what_is_too_small() -> None:
    found = images.preprocess(Image.new("RGB", (3, 20), (9, 9, 9)), Preprocessing(None, 8))
    assert found[..., 0].tolist() == [[0, 0, 9, 9, 9, 0, 0, 0]] * 8


def test_interpolation_is_antialiased_and_as_asked_for() -> None:
    board = np.indices((64, 64)).sum(0) % 2 * 255
    image = Image.fromarray(np.repeat(board[..., None], 3, 2).astype(np.uint8))
    found = images.preprocess(image, Preprocessing(9, 9))
    assert abs(found[2:7, 2:7].astype(int) - 127).max() <= 12  # without antialiasing, 0 and 255 alternate
    photo = noise(50, 40)
    for name, kernel in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        found = images.preprocess(photo, Preprocessing(20, 20, interpolation=name))
        assert np.array_equal(found, np.asarray(photo.resize((25, 20), kernel))[:, 2:22])


def test_grey() -> None:
    found = images.preprocess(Image.new("RGB", (40, 30), (255, 0, 0)), Preprocessing(20, 16, **GREY))
    assert found.shape == (16, 16, 1)
    assert (found == 76).all()  # ITU-R 601: 0.299 of red


def test_a_line_is_not_blown_up_to_gigabytes() -> None:
    with pytest.raises(images.BadImage, match="1 x 60000 pixels are too narrow to resize the shorter side to 256"):
        images.preprocess(Image.new("RGB", (1, 60_000)), Preprocessing(256, 224))


# Batches -------------------------------------------------------------------------------------------------------------


def test_every_good_image_comes_once_and_in_order(tmp_path: Path) -> None:
    sources = []
    for i in range(11):
        path = tmp_path / f"{i}.png"
        path.write_bytes(b"") if i in (0, 5, 10) else Image.new("RGB", (9 + i, 9), (i, i, i)).save(path)
        sources.append(path)
    found = list(images.batches(sources, Preprocessing(None, 8), 3))
    assert [batch.positions.tolist() for batch in found] == [[1, 2, 3], [4, 6, 7], [8, 9]]
    assert [[bad.position for bad in batch.bad] for batch in found] == [[0], [5], [10]]
    assert {bad.reason for batch in found for bad in batch.bad} == {"empty"}
    assert {batch.images.shape for batch in found} == {(3, 8, 8, 3)}
    for batch in found:
        shown = [*batch.positions, *[0] * (3 - len(batch.positions))]
        assert batch.images[:, 0, 0, 0].tolist() == shown


@pytest.mark.parametrize(("count", "batch_size", "lengths"), [(6, 3, [3, 3]), (1, 1, [1]), (0, 4, []), (5, 8, [5])])
def test_arrays_and_even_sizes(count: int, batch_size: int, lengths: list[int]) -> None:
    pixels = np.arange(count * 48, dtype=np.uint8).reshape(count, 4, 4, 3)
    found = list(images.batches(pixels, Preprocessing(None, 4), batch_size))
    assert [len(batch.positions) for batch in found] == lengths
    for batch in found:
        assert np.array_equal(batch.images[: len(batch.positions)], pixels[batch.positions])


def test_only_bad_ones(tmp_path: Path) -> None:
    (batch,) = images.batches([tmp_path / "nowhere.jpg"] * 2, Preprocessing(None, 4), 2)
    assert batch.positions.tolist() == []
    assert batch.bad == [(0, "missing"), (1, "missing")]


def test_damaged_exif_is_no_damage(tmp_path: Path) -> None:
    """Pillow warns about it, which would be a line on stderr, or an error here."""
    path = tmp_path / "x.jpg"
    broken = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x0e\x01\x02\0\xff\xff\0\0\xff\0\0\0"
    noise(8, 8).save(path, exif=broken)
    with pytest.warns(UserWarning, match="Corrupt EXIF data|Tag data larger"):
        images.read(path)
    (batch,) = images.batches([path], Preprocessing(None, 8), 1)
    assert batch.bad == []


def test_leaving_early_ends_the_threads() -> None:
    before = threading.active_count()
    pixels = np.zeros((200, 4, 4, 3), np.uint8)
    found = images.batches(pixels, Preprocessing(None, 4), 2)
    next(found)
    found.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", ["png", "pgm", "tif", "float", "float 255", "range", "integers"])
def test_grey_levels_of_many_bits_are_scaled_and_not_cut_off(tmp_path: Path, kind: str) -> None:
    """A ramp from black to white is one whatever the depth in which it is stored."""
    ramp = np.linspace(0, 1, 256)[None].repeat(4, 0)
    levels = {
        "png": (ramp * 65535).round().astype(np.uint16),
        "pgm": (ramp * 65535).round().astype(np.uint16),
        "tif": (ramp * 65535).round().astype(np.uint16),
        "float": ramp.astype(np.float32),
        "float 255": (255 * ramp).astype(np.float32),
        "range": (2e5 * ramp - 1e5).astype(np.float32),
        "integers": (2e9 * ramp - 1e9).astype(np.int32),
    }[kind]
    path = tmp_path / f"x.{kind if kind in ('png', 'pgm') else 'tif'}"
    Image.fromarray(levels).save(path)
    found = np.asarray(images.read(path))
    assert (found == np.arange(256)[None, :, None]).all()


def test_levels_that_are_no_numbers(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(images.BadImage, match="NaN or infinite"):
        images.read(tmp_path / "x.tif")
    flat = images.as_rgb(Image.fromarray(np.full((4, 4), 1000, np.int32)))
    assert np.asarray(flat).max() == 4  # 1000 of 65535


def test_what_lies_aside_is_no_class(tmp_path: Path) -> None:
    for name in ("cat", ".ipynb_checkpoints", "__pycache__", ".hidden", "cat/.ipynb_checkpoints", "cat/young"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        noise(8, 8).save(tmp_path / name / "a.png")
    found = images.list_folder(tmp_path)
    assert found.classes == ("cat",)
    assert [str(path.relative_to(tmp_path)) for path in found.paths] == ["cat/a.png", "cat/young/a.png"]
    assert found.ignored == 0
