"""Lists of a million images: as few arrays, kept while nothing changes; tar files of images."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jresnet.data import folder, images, index, stream
from jresnet.data.index import Record, Sources
from jresnet.errors import DataError

NAMES = ["a/1.jpg", "a/zweiter Ärger.png", "b/" + os.fsdecode(b"\xff.jpg"), "b/4.jpg"]


def test_paths_come_back_as_they_were() -> None:
    found = Sources.of(NAMES, "root")
    assert list(found) == [os.path.join("root", name) for name in NAMES]
    assert list(found.take([3, 0, 0])) == [f"root/{NAMES[i]}" for i in (3, 0, 0)]
    assert list(found[1:3]) == list(found)[1:3]
    assert found[-1] == "root/b/4.jpg"
    with pytest.raises(IndexError):
        found[4]
    assert list(pickle.loads(pickle.dumps(found))) == list(found)
    assert list(Sources.of([])) == []
    assert found == list(found)
    assert found.take([0, 1]) != found.take([1, 0])


def test_records_come_back_as_they_were() -> None:
    records = [Record("x.tar", 512, 100), Record("y.tar", 0, -1), Record("x.tar", 1024, 7)]
    found = Sources.of(records, "root")
    assert list(found.take([2, 1])) == [Record("root/x.tar", 1024, 7), Record("root/y.tar", 0, -1)]
    assert len(found.ends) == 2  # each file's name once


def test_a_digest_is_of_names_not_of_places() -> None:
    one, other = (Sources.of(NAMES, root).digest() for root in ("here", "there"))
    assert one == other
    assert one != Sources.of(NAMES[::-1], "here").digest()


def test_a_million_names_take_little_memory() -> None:
    found = Sources.of((f"n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG" for i in range(100_000)), "root")
    assert sum(array.nbytes for array in (found.text, found.ends)) < 4.5e6  # as texts of Python's some 9 MB
    assert found[99_999] == "root/n00000076/n00000076_99999.JPEG"


# Listings that are kept.


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of two images, last changed an hour ago, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "RECENT", -(10**12))  # ctime cannot be set back
    root = tmp_path / "photos"
    for name in ("a/1.png", "a/deep/2.png", "b/3.png", "b/4.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)
    return root


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that are walked."""
    seen: list[Path] = []
    monkeypatch.setattr(images, "walk", lambda root, walk=images.walk: seen.append(root) or walk(root))
    return seen


def test_a_folder_is_listed_once(photos: Path, walks: list[Path]) -> None:
    first, second = folder.find(photos), folder.find(photos)
    assert len(walks) == 1
    assert second.classes == first.classes == ("a", "b")
    assert second.train.sources == first.train.sources
    assert second.train.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "class"])
def test_what_changes_a_folder_lists_it_anew(change: str, photos: Path, walks: list[Path]) -> None:
    folder.find(photos)
    if change == "added":
        Image.new("RGB", (4, 4)).save(photos / "a" / "deep" / "5.png")
    elif change == "removed":
        (photos / "b" / "4.png").unlink()
    elif change == "renamed":
        (photos / "b" / "4.png").rename(photos / "b" / "9.png")
    else:
        (photos / "c").mkdir()
        Image.new("RGB", (4, 4)).save(photos / "c" / "1.png")
    found = [os.path.relpath(str(path), photos) for path in folder.find(photos).train.sources]
    assert len(walks) == 2
    assert found == sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))


def test_a_folder_that_is_still_changing_is_not_kept(photos: Path, walks: list[Path], monkeypatch: Any) -> None:
    """A file that is added within the same tick of the clock leaves the folder's times as they are."""
    monkeypatch.setattr(index, "RECENT", 2 * 10**9)
    folder.find(photos)
    folder.find(photos)
    assert len(walks) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_a_damaged_listing_is_made_anew(damage: str, photos: Path, walks: list[Path]) -> None:
    expected = list(folder.find(photos).train.sources)
    (path,) = (photos.parent / "cache/jresnet/listings").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
    path.write_bytes({"cut": bytes(content[:100]), "flipped": bytes(content), "text": b"cos\nsystem"}[damage])
    assert list(folder.find(photos).train.sources) == expected
    assert len(walks) == 2


def test_a_cache_that_cannot_be_written_is_none(photos: Path, walks: list[Path], monkeypatch: Any) -> None:
    (photos.parent / "cache").write_text("a file")
    assert len(folder.find(photos).train.sources) == 4


# Tar files.


def tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def encoded(seed: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(content, "JPEG")
    return content.getvalue()


@pytest.mark.parametrize("layout", ["train/{}.tar", "set-train-{}.tar"])
def test_shards_are_read_where_they_lie(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, number = tmp_path / "shards", 0
    for shard in range(2):
        members: list[tuple[str, bytes]] = []
        for _ in range(3):
            members += [(f"x/{number}.v2.cls", b"7"), (f"x/{number:05d}.jpg", encoded(number))]
            members[-2] = (f"x/{number:05d}.cls", str(number % 3).encode())
            members.append((f"x/{number:05d}.json", b"{}"))
            number += 1
        tar(root / layout.format(shard), members)
    tar(root / layout.replace("train", "validation").format(0), [("1.jpg", encoded(9)), ("1.cls", b"2\n")])
    found = folder.find(root)
    assert found.classes == ("0", "1", "2")
    assert found.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert [stream.read(source) for source in found.train.sources] == [encoded(i) for i in range(6)]
    assert found.held is not None
    assert (found.held.labels.tolist(), stream.read(found.held.sources[0])) == ([2], encoded(9))
    (root / "classes.txt").write_text("ant\nbee\ncat\n")
    assert folder.find(root).classes == ("ant", "bee", "cat")
    (root / "classes.txt").write_text("ant\nant\ncat\n")
    with pytest.raises(DataError, match="must contain at least 3 names"):
        folder.find(root)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.jpg", b"x")], r"1 images have no class beside them \(KEY.cls\): 1"),
        ([("1.jpg", b"x"), ("1.cls", b"cat")], "1.cls must contain the number of a class, found b'cat'"),
        ([("1.txt", b"x")], "it contains no image"),
    ],
)
def test_shards_of_another_form_are_told(members: list[tuple[str, bytes]], message: str, tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", members)
    with pytest.raises(DataError, match=rf"the shard .*train-0.tar cannot be used: {message}"):
        folder.find(tmp_path)


def test_a_shard_that_is_cut_short_or_no_shard_is_told(tmp_path: Path) -> None:
    path = tar(tmp_path / "train-0.tar", [("1.cls", b"0"), ("1.jpg", encoded(0) * 20)])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"cannot be used: (it is truncated|unexpected end of data)"):
        folder.find(tmp_path)
    path.write_bytes(b"no tar" * 1000)
    with pytest.raises(DataError, match=r"train-0\.tar cannot be used"):
        folder.find(tmp_path)
    path.rename(tmp_path / "val-0.tar")
    with pytest.raises(DataError, match="none with train in its name"):
        folder.find(tmp_path)
