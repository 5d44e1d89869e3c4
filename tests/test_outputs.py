"""A run's folder: one run at a time, nothing of another run, nothing that a killed one left half-written."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, command

from jresnet.errors import InputError
from jresnet.training import outputs
from jresnet.training.config import default_config
from jresnet.training.outputs import Lock

HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from jresnet.training.outputs import Lock
with Lock(Path(sys.argv[1])):
    if sys.argv[2] == "with a child":
        subprocess.Popen(["sleep", "60"], close_fds=False)
    if sys.argv[2] == "with a fork" and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["alone", "with a child", "with a fork"])
def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path, how: str) -> None:
    """By SIGKILL too, and while a child of it lives on."""
    holder = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLDER, str(tmp_path), how],  # JAX warns of forks
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == f"{holder.pid}\n"
        expected = (
            rf"another run is using {tmp_path} \(process {holder.pid} on {socket.gethostname()} since \d{{4}}-\d\d-\d\d "
            r"\d\d:\d\d:\d\d\): wait for it, stop it, or choose another `out`"
        )
        with pytest.raises(InputError, match=expected), Lock(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with Lock(tmp_path) as lock:
            assert lock.note is None
    finally:
        os.killpg(holder.pid, signal.SIGKILL) if how != "alone" else holder.kill()  # the child too
        holder.stdout.close()
        holder.wait()


def test_a_lock_is_released_and_names_its_holder(tmp_path: Path) -> None:
    for lock in [Lock(tmp_path), Lock(tmp_path)]:
        with lock:
            with pytest.raises(InputError, match=f"process {os.getpid()} on "), Lock(tmp_path):
                pass
            done = command("-c", HOLDER, tmp_path, "alone")
            assert f"process {os.getpid()} on " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_garbled_lock_file(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"\xff\x1b[31m" + b"x" * 10_000)
    with Lock(tmp_path):
        (tmp_path / "lock").write_bytes(b"\xff\x1b[31m" + b"x" * 10_000)
        with pytest.raises(InputError) as info, Lock(tmp_path):
            pass
        assert str(info.value).isprintable()
        assert len(str(info.value)) < 500
        (tmp_path / "lock").write_bytes(b"")
        with pytest.raises(InputError, match="of an unknown process"), Lock(tmp_path):
            pass


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(InputError, match=f"cannot use `out` {tmp_path}: Is a directory"), Lock(tmp_path):
        pass


def test_a_filesystem_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some cluster filesystems have none: the run goes on and can say so."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Lock(tmp_path) as lock:
        assert lock.note == f"the file system of {tmp_path} has no locks: do not start a second run in this folder"


SUMMARY = {"seed": 0, "final": {"test_accuracy": 0.5, "test_loss": None}, "best": {}, "seconds": 1.5}


def test_a_summary_comes_back(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert outputs.read_summary(tmp_path / "summary.json") == SUMMARY


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("{", "Expecting property name"), ("[]", "not a JSON object"), ("[" * 10**5, "recursion"),
        ("\x00", "Expecting value"),
        ({"final": None}, "the objects final and best"), ({"best": []}, "the objects final and best"),
        ({"seed": "0"}, "invalid value of seed"), ({"seed": True}, "invalid value of seed"),
        ({"final": {"test_accuracy": "x"}}, "invalid value of test_accuracy"),
        ({"final": {"test_accuracy": 2}}, "invalid value of test_accuracy"),
        ({"best": {"val_loss": -1}}, "invalid value of val_loss"),
        ({"seconds": 10**400}, "invalid value of seconds"),
        (None, "it is a folder, a device or a pipe"),
    ],
)  # fmt: skip
def test_a_damaged_summary(tmp_path: Path, damage: Any, match: str) -> None:
    path = tmp_path / "summary.json"
    if damage is None:
        os.mkfifo(path)
    else:
        path.write_text(damage if isinstance(damage, str) else json.dumps(SUMMARY | damage))
    with pytest.raises(InputError, match=rf"summary\.json cannot be used \(.*{match}.*\): delete it"):
        outputs.read_summary(path)


def test_a_folder_that_cannot_be_made_is_told_before_the_data_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name, why in (("file", "is not a folder"), ("file/x/y", "Not a directory"), ("link", "a broken link"),
                      ("x" * 300, "File name too long"), ("a\0b", "embedded null byte")):  # fmt: skip
        with pytest.raises(InputError, match=rf"cannot use `out` .*{why}; choose another folder"):
            outputs.check(default_config(), tmp_path / name, False)
    outputs.check(default_config(), tmp_path / "new" / "folder", False)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


@pytest.mark.parametrize("name", ["curves.png", "metrics.jsonl"])
def test_files_of_others_are_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"already contains a run \\({name}\\)"):
        outputs.check(default_config(), tmp_path, False)
