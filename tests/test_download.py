"""Downloads from a server on this machine: mirrors, resuming, damage, silence, and two at once."""

import contextlib
import errno
import hashlib
import http.server
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import pytest

from jresnet import download, files
from jresnet.errors import DownloadError

BODY = bytes(range(256)) * 4096  # 1 MiB
HALF = len(BODY) // 2 + 1234  # not a whole number of any reader's pieces
SHA256 = hashlib.sha256(BODY).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Does what the address says: /good, /plain (knows no ranges), /cut (breaks off in the middle of a whole)..."""

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        what, wanted = self.path.rpartition("/")[2], self.headers.get("Range")
        self.server.log.append((what, wanted))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and what != "plain" else 0
        body = bytes(len(BODY)) if what == "wrong" else BODY
        if what == "missing":
            self.send_error(404)
        elif what in RAW:
            self.raw(*RAW[what])
        elif what == "redirect":
            self.send_response(302)
            self.send_header("Location", self.server.target)
            self.end_headers()
        elif start >= len(body):
            self.send_error(416)
        else:
            if what == "late":
                self.server.over.wait(0.5)
            self.send_response(206 if start else 200)
            if start:
                first = start + 1 if what == "shifted" else start
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            if what != "endless":
                self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            stop = HALF if what == "stall" or (what == "cut" and not start) else len(body)
            self.wfile.write(body[start : stop if what != "slow" else HALF])
            if what == "slow":
                self.server.over.wait(0.5)
                self.wfile.write(body[HALF:])
            if what == "stall":
                self.server.over.wait(10)

    def raw(self, head: bytes, again: bytes, seconds: float) -> None:
        """Sends bytes, then others again and again, until the client is gone."""
        with contextlib.suppress(OSError):
            self.wfile.write(head)
            while again and not self.server.over.wait(seconds):
                self.wfile.write(again)

    def log_message(self, format: str, *args: object) -> None:
        pass


# What a server sends that is up to no good: at first, then again and again, every so many seconds.
_OK = b"HTTP/1.1 200 OK\r\n"
_CHUNKED = _OK + b"Transfer-Encoding: chunked\r\n\r\n"
RAW = {
    "flood": (_OK + b"\r\n", bytes(1 << 16), 0.0),  # no length, no end
    "flood-of-chunks": (_CHUNKED, b"10000\r\n" + bytes(1 << 16) + b"\r\n", 0.0),
    "chunks-beyond-the-length": (_OK + b"Content-Length: 9\r\n" + _CHUNKED[len(_OK) :], b"a\r\n0123456789\r\n", 0.0),
    "liar": (_OK + b"Content-Length: 1000000000000\r\n\r\n", bytes(1 << 16), 0.0),
    "digits": (_OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", bytes(1 << 16), 0.0),
    "drip": (_OK + b"\r\n", b"x", 0.02),
    "drip-of-a-chunk-head": (_CHUNKED, b"0", 0.02),
    "trailers": (_CHUNKED + b"0\r\n", b"a: b\r\n", 0.02),
    "codes": (b"HTTP/1.1 404 \x1b[2Jgone\x9b\x07\r\n\r\n", b"", 0.0),
    "no-status": (b"\x1b[2J" + b"x" * 5000 + b"\r\n\r\n", b"", 0.0),
    "elsewhere": (b"HTTP/1.1 302 Found\r\nLocation: https://[::1/x\r\n\r\n", b"", 0.0),
}  # fmt: skip


class _Server(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.log: list[tuple[str, str | None]] = []  # the end of the address and the Range header of each request
        self.over = threading.Event()
        self.target = ""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that has gone away is what some tests want


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def silent():
    """Addresses on a socket that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield [f"http://127.0.0.1:{listener.getsockname()[1]}/{i}" for i in range(6)]


def fetch(urls, path, sha256=SHA256, progress=False):
    return download.fetch([urls] if isinstance(urls, str) else urls, path, sha256=sha256, progress=progress)


def left(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent))


def test_file_arrives_whole_and_alone(server, tmp_path):
    path = tmp_path / "new" / "folder" / "file.bin"
    assert fetch(f"{server.url}/good", path) == path
    assert path.read_bytes() == BODY
    assert files.sha256_of(path) == SHA256
    assert left(path) == ["file.bin"]
    assert fetch(f"{server.url}/good", path) == path
    assert server.log == [("good", None)]  # the second call found it


@pytest.mark.parametrize("what", ["endless", "slow", "late"])
def test_unknown_length_and_slow_servers(server, tmp_path, what):
    assert fetch(f"{server.url}/{what}", tmp_path / "f").read_bytes() == BODY


def test_digest_prefix_as_torchvision_publishes_it(server, tmp_path):
    assert fetch(f"{server.url}/good", tmp_path / "f", SHA256[:8].upper()).read_bytes() == BODY
    with pytest.raises(DownloadError, match="8 to 64 hex digits"):
        fetch(f"{server.url}/good", tmp_path / "g", SHA256[:7])


@pytest.mark.parametrize("first", ["wrong", "missing", "cut"])
def test_next_mirror_takes_over(server, tmp_path, first):
    path = tmp_path / "f"
    assert fetch([f"{server.url}/{first}", f"{server.url}/good"], path).read_bytes() == BODY
    assert server.log == [(first, None), ("good", f"bytes={HALF}-" if first == "cut" else None)]
    assert left(path) == ["f"]


def test_cut_connection_goes_on_where_it_broke(server, tmp_path):
    assert fetch(f"{server.url}/cut", tmp_path / "f").read_bytes() == BODY
    assert server.log == [("cut", None), ("cut", f"bytes={HALF}-")]


def test_later_run_goes_on_where_it_broke(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TURNS", 1)
    path = tmp_path / "f"
    with pytest.raises(DownloadError, match=f"cut after {HALF:,} of {len(BODY):,} bytes(.|\n)*kept in .*f.part"):
        fetch(f"{server.url}/cut", path)
    assert left(path) == ["f.part"]
    assert fetch(f"{server.url}/good", path).read_bytes() == BODY
    assert server.log[1:] == [("good", f"bytes={HALF}-")]
    assert left(path) == ["f"]


@pytest.mark.parametrize(
    ("kept", "what", "requests"),
    [
        (BODY[:1000], "plain", 1),  # the server knows no ranges and sends the whole
        (BODY[:1000], "shifted", 2),  # it sends another range than asked for
        (BODY, "good", 1),  # 416: all is there already
        (BODY + b"more", "good", 2),  # 416: the partial file is not of this one
        (bytes(1000), "good", 2),  # the file has changed, or the partial one was damaged
    ],
)
def test_partial_file_that_does_not_fit_is_started_over(server, tmp_path, kept, what, requests):
    path = tmp_path / "f"
    path.with_name("f.part").write_bytes(kept)
    assert fetch(f"{server.url}/{what}", path).read_bytes() == BODY
    assert len(server.log) == requests
    assert left(path) == ["f"]


def test_stalled_transfer_goes_to_the_next_mirror(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
    start = time.monotonic()
    assert fetch([f"{server.url}/stall", f"{server.url}/good"], tmp_path / "f").read_bytes() == BODY
    assert time.monotonic() - start < 5
    assert server.log == [("stall", None), ("good", f"bytes={HALF}-")]  # nothing that had arrived was lost
    with pytest.raises(DownloadError, match=r"/stall: no byte for 0\.3 s"):
        fetch(f"{server.url}/stall", tmp_path / "g")


MOST = 4 << 20  # bytes


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("flood", "the server sent more than 4,194,304 bytes"),
        ("flood-of-chunks", "the server sent more than 4,194,304 bytes"),
        ("chunks-beyond-the-length", "the server sent more than 9 bytes"),
        ("liar", "the server announced more than 4,194,304 bytes, the largest possible size of f"),
        ("digits", "the server announced more than 4,194,304 bytes, the largest possible size of f"),
        ("drip", r"only \d+ bytes? in 0\.3 s"),
        ("drip-of-a-chunk-head", "no byte for 0\\.3 s"),
        ("trailers", "no byte for 0\\.3 s"),
        ("codes", r"HTTP 404 '\\x1b\[2Jgone"),
        ("no-status", r"'\\x1b\[2Jx+"),
        ("elsewhere", "/elsewhere: Invalid IPv6 URL"),
    ],
)
def test_servers_that_mean_no_good(server, tmp_path, monkeypatch, what, reason):
    """Neither the disk nor a day is used up, and nothing but words reaches the terminal."""
    monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
    written = 0
    write = os.write

    def count(descriptor: int, piece: bytes) -> int:
        nonlocal written
        written += len(piece)
        return write(descriptor, piece)

    monkeypatch.setattr(download.os, "write", count)
    with pytest.raises(DownloadError, match=reason) as caught:
        download.fetch([f"{server.url}/{what}"], tmp_path / "f", sha256=SHA256, most=MOST, progress=False)
    assert written <= MOST
    message = str(caught.value)
    assert len(message) < 1500
    assert message.replace("\n", "").isprintable()
    assert left(tmp_path / "f") == (["f.part"] if what == "drip" else [])


def test_a_file_of_the_size_that_is_known(server, tmp_path):
    for what in ("good", "endless"):
        assert download.fetch([f"{server.url}/{what}"], tmp_path / what, sha256=SHA256, most=len(BODY)).exists()
        with pytest.raises(DownloadError, match=f"more than {len(BODY) - 1:,} bytes"):
            download.fetch([f"{server.url}/{what}"], tmp_path / "f", sha256=SHA256, most=len(BODY) - 1)
    assert not (tmp_path / "f.part").exists()


def test_an_address_that_is_none(tmp_path):
    with pytest.raises(DownloadError, match=r"^https://\[::1/x is not a valid address: Invalid IPv6 URL$"):
        fetch("https://[::1/x", tmp_path / "f")
    assert left(tmp_path / "f") == []


@pytest.mark.parametrize("name", ["f", "f.part"])
def test_pipes_in_the_place_of_files(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DownloadError, match=f"{name} is not a regular file: move or delete it"):
        fetch("https://a.invalid/f", tmp_path / "f")
    assert left(tmp_path / "f") == [name]


def test_ctrl_c_is_heard_in_a_stalled_transfer(server, tmp_path, monkeypatch):
    """At once: the main thread waits for nothing but a queue."""
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    write = os.write

    def begin(descriptor: int, piece: bytes) -> int:
        if not timer.is_alive():
            timer.start()
        return write(descriptor, piece)

    monkeypatch.setattr(download.os, "write", begin)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            fetch(f"{server.url}/stall", tmp_path / "f")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 5  # where the server would go on after 10


def test_failure_lists_every_address_with_its_reason(server, tmp_path):
    path = tmp_path / "f"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}/closed"
    with pytest.raises(DownloadError) as caught:
        fetch([f"{server.url}/wrong", f"{server.url}/missing", closed], path)
    message = str(caught.value)
    zeros = hashlib.sha256(bytes(len(BODY))).hexdigest()
    assert f"{server.url}/wrong: the file received has {len(BODY):,} bytes and SHA-256 {zeros}" in message
    assert f"{server.url}/missing: HTTP 404 Not Found" in message
    assert f"{closed}: " in message
    assert "refused" in message
    assert SHA256 in message
    assert f"put it at {path}" in message
    assert left(path) == []


def test_silent_servers_end_within_the_budget_however_many(silent, tmp_path, monkeypatch):
    assert download.CONNECT_SECONDS <= 4  # a command has 5 s in all; a shorter budget here saves the tests' time
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "CONNECT_SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(DownloadError, match="no answer within 1 s") as caught:
        fetch(silent, tmp_path / "f")
    assert time.monotonic() - start < 2.5
    assert all(url in str(caught.value) for url in silent)
    assert left(tmp_path / "f") == []


def test_name_lookup_that_hangs_ends_within_the_budget(tmp_path, monkeypatch):
    over = threading.Event()

    def hang(*args: object, **kwargs: object) -> None:
        over.wait(10)
        raise socket.gaierror("over")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.4)
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"no answer within 0\.4 s"):
        fetch(["https://a.invalid/f", "https://b.invalid/f"], tmp_path / "f")
    assert time.monotonic() - start < 3
    over.set()


def test_silent_mirror_does_not_cost_the_next_its_chance(server, silent, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CONNECT_SECONDS", 1.0)
    assert fetch([silent[0], f"{server.url}/good"], tmp_path / "f").read_bytes() == BODY


def test_many_mirrors_do_not_cut_a_slow_one_short(server, silent, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CONNECT_SECONDS", 1.2)  # 0.2 s each, while the first takes 0.5 s to answer
    assert fetch([f"{server.url}/late", *silent[:5]], tmp_path / "f").read_bytes() == BODY


def test_the_losers_of_the_race_are_closed(monkeypatch):
    answers = [io.BytesIO() for _ in range(3)]
    asked: list[futures.Future[io.BytesIO]] = []

    def ask(url: str, offset: int) -> "futures.Future[io.BytesIO]":
        asked.append(futures.Future())
        if len(asked) == 3:  # then the first two answer at once, the third later
            for future, answer in zip(asked[:2], answers[:2], strict=True):
                future.set_result(answer)
        return asked[-1]

    monkeypatch.setattr(download, "_ask", ask)
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.2)
    assert download._first_answer(["a", "b", "c"], 0) == ("a", answers[0], {})
    asked[2].set_result(answers[2])
    assert [answer.closed for answer in answers] == [False, True, True]


def test_only_trusted_connections(server, tmp_path):
    for url in ("http://example.org/f", "ftp://example.org/f", "file://example.org/f"):
        with pytest.raises(DownloadError, match="expected an https address"):
            fetch([f"{server.url}/good", url], tmp_path / "f")
    assert server.log == []
    server.target = "http://example.org/f"
    with pytest.raises(DownloadError, match=r"expected an https address, got http://example.org/f"):
        fetch(f"{server.url}/redirect", tmp_path / "f")
    server.target = f"{server.url}/good"
    assert fetch(f"{server.url}/redirect", tmp_path / "f").read_bytes() == BODY
    with pytest.raises(DownloadError, match="expected an https address"):
        download._check_address(server.target, loopback=False)  # as for a redirection that leaves https


def test_file_address_and_no_address(tmp_path):
    (tmp_path / "source").write_bytes(BODY)
    assert fetch((tmp_path / "source").as_uri(), tmp_path / "f").read_bytes() == BODY
    with pytest.raises(DownloadError, match="no address is known"):
        fetch([], tmp_path / "g")


def test_proxy_from_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    assert fetch("http://127.0.0.1:9/good", tmp_path / "f").read_bytes() == BODY  # nothing listens at port 9


def test_other_file_in_the_place_is_left_alone(server, tmp_path):
    path = tmp_path / "f"
    path.write_text("mine")
    with pytest.raises(DownloadError, match="exists, but its SHA-256"):
        fetch(f"{server.url}/good", path)
    assert path.read_text() == "mine"
    assert server.log == []


def test_file_that_is_there_needs_no_folder_to_write_in(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(download, "_open_part", refuse)
    (tmp_path / "f").write_bytes(BODY)
    assert fetch("https://a.invalid/f", tmp_path / "f") == tmp_path / "f"
    with pytest.raises(DownloadError, match=r"cannot write .*g: Permission denied; choose another folder"):
        fetch("https://a.invalid/f", tmp_path / "g")


def test_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match=r"cannot write .*file/f: (Not a directory|File exists)"):
        fetch(f"{server.url}/good", tmp_path / "file" / "f")
    assert server.log == []


def test_full_disk(server, tmp_path, monkeypatch):
    path = tmp_path / "f"

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download.os, "write", full)
    with pytest.raises(DownloadError, match="No space left on device; free some space"):
        fetch(f"{server.url}/good", path)
    assert not path.exists()


def _both(server: _Server, path: Path) -> list[BaseException | Path]:
    results: list[BaseException | Path] = []

    def run() -> None:
        try:
            results.append(fetch(f"{server.url}/slow", path))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.skipif(download.fcntl is None, reason="this system has no fcntl, so nothing waits")
def test_two_threads_at_once_fetch_it_once(server, tmp_path):
    path = tmp_path / "f"
    assert _both(server, path) == [path, path]
    assert path.read_bytes() == BODY
    assert server.log == [("slow", None)]
    assert left(path) == ["f"]


@pytest.mark.parametrize("broken", ["no fcntl", "no locks"])
def test_two_at_once_without_locks(server, tmp_path, monkeypatch, broken):
    if broken == "no fcntl":
        monkeypatch.setattr(download, "fcntl", None)
    else:

        def refuse(*args: object) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(download.fcntl, "flock", refuse)
    path = tmp_path / "f"
    assert _both(server, path) == [path, path]
    assert path.read_bytes() == BODY
    assert [name for name in left(path) if name != "f.part"] == ["f"]


@pytest.mark.skipif(download.fcntl is None, reason="this system has no fcntl, so nothing waits")
def test_two_processes_at_once_fetch_it_once(server, tmp_path):
    code = (
        "import pathlib, sys; from jresnet import download;"
        "download.fetch([sys.argv[1]], pathlib.Path(sys.argv[2]), sha256=sys.argv[3])"
    )
    command = [sys.executable, "-c", code, f"{server.url}/slow", str(tmp_path / "f"), SHA256]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=20)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert (tmp_path / "f").read_bytes() == BODY
    assert server.log == [("slow", None)]


@pytest.mark.skipif(download.fcntl is None, reason="this system has no fcntl")
def test_partial_file_removed_while_waiting_for_its_lock(server, tmp_path):
    part = tmp_path / "f.part"
    with open(part, "wb") as other:
        download.fcntl.flock(other, download.fcntl.LOCK_EX)
        results: list[Path] = []
        thread = threading.Thread(target=lambda: results.append(fetch(f"{server.url}/good", tmp_path / "f")))
        thread.start()
        time.sleep(0.2)
        assert server.log == []  # it waits
        part.unlink()
    thread.join()
    assert results == [tmp_path / "f"]
    assert (tmp_path / "f").read_bytes() == BODY


def test_progress_as_lines(server, tmp_path, capsys):
    fetch(f"{server.url}/slow", tmp_path / "file.bin", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"downloading {server.url}/slow"
    assert lines[1] == "file.bin: 0.0 MB of 1.0 MB (0 %)"
    assert "file.bin: 1.0 MB of 1.0 MB (100 %), " in lines[-1]
    assert "MB/s, 0 s left" in lines[-1]
    assert len(lines) <= 13
    fetch(f"{server.url}/good", tmp_path / "quiet.bin")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("total", "count"), [(10**9, 11), (None, 21)])
def test_lines_are_few(capsys, total, count):
    bar = download._Lines("f", total, 0, True)
    for _ in range(1000):
        bar.update(10**6)
    assert len(capsys.readouterr().err.splitlines()) == count


def test_a_slow_download_is_told_of_every_minute(capsys, monkeypatch):
    clock = iter(range(0, 10**6, 40))
    monkeypatch.setattr(download.time, "monotonic", lambda: next(clock))
    bar = download._Lines("f", 10**9, 0, True)
    capsys.readouterr()
    for _ in range(6):  # every 40 seconds
        bar.update(1)
    assert len(capsys.readouterr().err.splitlines()) == 3


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("installed", [True, False])
def test_progress_on_a_terminal(server, tmp_path, monkeypatch, installed):
    if installed:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fetch(f"{server.url}/good", tmp_path / "file.bin", progress=True)
    said = terminal.getvalue()
    assert ("1.05M/1.05M" in said) == installed
    assert ("1.0 MB of 1.0 MB (100 %)" in said) == (not installed)
