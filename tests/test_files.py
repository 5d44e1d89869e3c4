"""Files are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jresnet import files
from jresnet.errors import InputError


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*No such file or directory"):
        files.write_atomically(tmp_path / "none" / "file", b"new")


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_only_a_file_is_replaced(tmp_path: Path, kind: str) -> None:
    """As root, a device would be gone and a file in its place."""
    path = tmp_path / "special"
    os.mknod(path, stat.S_IFIFO if kind == "pipe" else stat.S_IFSOCK)
    before = path.stat()
    with pytest.raises(InputError, match="it is a device or a pipe"):
        files.write_atomically(path, b"new")
    assert path.stat() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    link.symlink_to(target)
    for content in (b"new", b"newer"):  # at first there is no file
        files.write_atomically(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == content


@pytest.mark.parametrize("target", ["/dev/full", "self"])
def test_links_that_lead_to_no_file(tmp_path: Path, target: str) -> None:
    link = tmp_path / "self"
    link.symlink_to(target)
    with pytest.raises(InputError, match=r"it is a device or a pipe|it is a broken link"):
        files.write_atomically(link, b"new")
    assert link.is_symlink()
    assert list(tmp_path.iterdir()) == [link]


def test_a_path_that_no_file_can_have() -> None:
    with pytest.raises(InputError, match="embedded null"):
        files.write_atomically("a\0b", b"")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large", "none"])
def test_only_ordinary_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "large":
        path.write_bytes(bytes(11))
    with pytest.raises(OSError, match=r"folder, a device or a pipe|it has 11 bytes; expected at most 10|No such file"):
        files.read_ordinary(path, 10)
    if kind in ("pipe", "device", "folder"):
        with pytest.raises(OSError, match="is a folder, a device or a pipe"):
            files.sha256_of(path)


def test_what_is_read_is_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    assert files.read_ordinary(tmp_path / "file", 10) == bytes(10)


def test_messages_for_a_terminal() -> None:
    assert files.shown("größer als 4 €\n  a: b") == "größer als 4 €\n  a: b"
    assert files.shown("a\x1b[2J\x9b\r\udcff\u202e") == r"a\x1b[2J\x9b\r\udcff\u202e"
    assert len(files.shown("x" * 10**6)) < 1.1 * files.LONGEST


def test_the_permissions_are_an_ordinary_files(tmp_path: Path) -> None:
    """Of the umask at the start. To ask for it later is to change it, for other threads' files too."""
    code = (
        "import os, sys; os.umask(0o027); from jresnet import files; os.umask = None;"
        "files.write_atomically(sys.argv[1], b''); open(sys.argv[2], 'w').close()"
    )
    ours, ordinary = tmp_path / "ours", tmp_path / "ordinary"
    subprocess.run([sys.executable, "-c", code, str(ours), str(ordinary)], check=True)
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode) == 0o640


def test_digests_and_names(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 10**6)
    assert files.sha256_of(tmp_path / "x") == hashlib.sha256(b"abc" * 10**6).hexdigest()
    assert files.printable("layer1.0") == "layer1.0"
    assert files.printable("\x1b[2J") == r"'\x1b[2J'"
    assert files.printable("x" * 10**6) == "x" * 200 + "..."
