"""Downloads one file: tries mirrors in order, resumes, checks the SHA-256 and moves the file into place atomically.

Servers are untrusted: size (``most``) and duration (``SLOWEST``) of a transfer are limited, whatever the server announces.

Needs only the standard library; tqdm draws a progress bar if it is installed and the output is a terminal.
"""

import contextlib
import errno
import hashlib
import io
import os
import queue
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from jresnet.errors import DownloadError
from jresnet.files import printable, sha256_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONNECT_SECONDS = 2.5  # time limit for the first answer of any mirror; without network a command must end within 5 s
STALL_SECONDS = 30.0  # after so long without data, or with data slower than SLOWEST, the next mirror continues
SLOWEST = 4096  # least rate in bytes per second, averaged over STALL_SECONDS; CIFAR-10's server gives 50,000
MOST = 1 << 30  # largest size in bytes of a file of unknown size; torchvision's largest ResNet has 0.5 GB
TURNS = 3  # number of attempts per address, each continuing an interrupted transfer
_CHUNK = 1 << 18  # largest number of bytes per read
_LOOPBACK = {None, "", "localhost", "127.0.0.1", "::1"}


def fetch(urls: Sequence[str], path: Path, *, sha256: str, most: int = MOST, progress: bool = True) -> Path:
    """Downloads a file from the first address that provides it, unless ``path`` already exists.

    Data is written to ``path`` + ``.part``, which a later call or another mirror resumes. The file gets its own name only
    after its digest was checked. Proxies are taken from the environment, as in urllib. If several processes download the
    same file at once, one does and the others wait.

    Args:
        urls: addresses of the same file, best first; only https (see ``_check_address``).
        path: destination; missing folders are created.
        sha256: the expected digest: 64 hex digits, or at least the first 8, as torchvision publishes them.
        most: the size in bytes if known, else an upper bound.
        progress: show bytes, rate and time left on stderr.

    Returns:
        ``path``.

    Raises:
        DownloadError: no address provided the file (the message lists the reason for each; without network this takes at
            most ``CONNECT_SECONDS``), the disk is full, the folder is not writable, a file with another digest exists at
            ``path``, or ``path`` or the partial file is not a regular file.
    """
    path, digest = Path(path), sha256.lower()
    if not re.fullmatch("[0-9a-f]{8,64}", digest):
        raise DownloadError(f"the SHA-256 of {path.name} must have 8 to 64 hex digits, got {sha256!r}")
    if not urls:
        raise DownloadError(f"no address is known for {path.name}: put the file at {path}")
    for url in urls:
        _check_address(url)
    try:
        for place in (path, path.with_name(path.name + ".part")):
            if place.exists() and not place.is_file():  # opening a pipe would block
                raise DownloadError(f"{place} is not a regular file: move or delete it")
        if path.exists():
            return _checked(path, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        part, part_path, locked = _open_part(path, progress)
        with part:
            # Another process may have downloaded the file while this one waited for the lock.
            failures = {} if path.exists() else _collect(urls, part, path.name, digest, most, progress)
            # without a lock the part's name is unique: it is not resumed
            kept = _size(part) if failures and locked else 0
            # Windows can rename and remove only closed files; elsewhere the lock is kept until the end
            if os.name == "nt":
                part.close()
            if not failures and not path.exists():
                os.replace(part_path, path)
            elif not kept:
                part_path.unlink()
        if not failures:
            return _checked(path, digest)
    except DownloadError:  # is a subclass of OSError
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space and run this again; it resumes the download" if full else "choose another folder"
        raise DownloadError(f"cannot write {path}: {error.strerror or error}; {advice}") from error
    lines = "".join(f"\n  {url}: {reason}" for url, reason in failures.items())
    resume = f"\n{kept:,} bytes are kept in {part_path}: run this again to resume." if kept else ""
    raise DownloadError(
        f"could not download {path.name} (expected SHA-256 {digest}{'' if len(digest) == 64 else '...'}):{lines}\n"
        f"Without network, download it on another machine from one of these addresses and put it at {path}{resume}"
    )


def _check_address(url: str, loopback: bool = True) -> None:
    """Refuses unencrypted connections, which could be tampered with: a file with the same first 8 digits of its SHA-256 can
    be found within minutes. Plain http and files on this machine are allowed for the tests."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:  # "https://[::1/x"
        raise DownloadError(f"{printable(url)} is not a valid address: {error}") from error
    local = loopback and parts.scheme in ("http", "file") and parts.hostname in _LOOPBACK
    if parts.scheme != "https" and not local:
        raise DownloadError(f"expected an https address, got {printable(url)}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections only to addresses that ``_check_address`` accepts."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_address(newurl, loopback=req.type != "https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except BaseException:
            fp.close()  # urllib leaves the connection open
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _checked(path: Path, digest: str) -> Path:
    """Returns ``path`` if its digest is right. An existing file is never overwritten."""
    if not (actual := sha256_of(path)).startswith(digest):
        raise DownloadError(f"{path} exists, but its SHA-256 is {actual} instead of {digest}: move or delete it")
    return path


def _size(part: io.FileIO) -> int:
    return os.fstat(part.fileno()).st_size


def _open_part(path: Path, progress: bool) -> tuple[io.FileIO, Path, bool]:
    """The partial file, open for appending, its path, and whether it is locked. If the file system has no locks, the file
    has a name that is unique to this thread."""
    part = path.with_name(path.name + ".part")
    while fcntl is not None:
        file = open(part, "ab+", buffering=0)  # noqa: SIM115 - unbuffered, so that the file's size is what was received
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress:
                    print(f"another process is downloading {path.name}: waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            # The previous owner may have moved or removed the file during the wait: then this lock is on another file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                    return file, part, True
            file.close()
        except OSError:  # some network file systems do not support locks
            file.close()
            break
        except BaseException:
            file.close()
            raise
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    return open(part, "wb+", buffering=0), part, False


def _collect(urls: Sequence[str], part: io.FileIO, name: str, digest: str, most: int, progress: bool) -> dict[str, str]:
    """Fills ``part`` until its digest is right; otherwise returns the reason of failure for each address."""
    failures: dict[str, str] = {}
    waiting = list(dict.fromkeys(urls))
    turns = dict.fromkeys(waiting, TURNS)
    while waiting:
        resumed = _size(part)
        url, response, silent = _first_answer(waiting, resumed)
        failures |= silent
        waiting = [other for other in waiting if other != url and other not in silent]
        if response is None:
            continue
        if progress:
            print(f"downloading {url}", file=sys.stderr)
        try:
            fits = _receive(response, part, name, most, progress)
        except _BrokenError as error:
            failures[url] = str(error)
            turns[url] -= 1
            if _size(part) > resumed and turns[url]:
                waiting.append(url)  # retry after the other mirrors
            continue
        part.seek(0)
        actual = hashlib.file_digest(part, "sha256").hexdigest()
        if actual.startswith(digest):
            return {}
        failures[url] = f"the file received has {_size(part):,} bytes and SHA-256 {actual}"
        part.truncate(0)
        if resumed and (not fits or response.status == 206):
            waiting.insert(0, url)  # the resumed bytes may be the wrong ones: retry once from the start
    return failures


def _first_answer(urls: list[str], offset: int) -> tuple[str, Any, dict[str, str]]:
    """Requests the addresses one after the other until one answers, within ``CONNECT_SECONDS`` in total.

    The time is divided among the addresses. After its share of the time the next address is requested as well, but earlier
    requests stay open. So an unresponsive mirror does not use up the time of the next one, and a slow connection is not cut
    off because there are many mirrors.

    Returns:
        The address and the response of the first that answered ("" and None if none did), and a reason for each failure.
    """
    waiting, failures = list(urls), {}
    asked: dict[futures.Future[Any], str] = {}
    winner, response = "", None
    end = time.monotonic() + CONNECT_SECONDS
    while response is None and (waiting or asked) and time.monotonic() < end:
        if waiting:
            url = waiting.pop(0)
            asked[_ask(url, offset)] = url
        share = (end - time.monotonic()) / (len(waiting) + 1)
        done, _ = futures.wait(asked, max(share, 0), futures.FIRST_COMPLETED)
        for future in [future for future in asked if future in done]:
            if response is None:  # if two answer at once, the earlier address wins
                url = asked.pop(future)
                if error := future.exception():
                    failures[url] = _reason(error)
                else:
                    winner, response = url, future.result()
    for future in asked:
        future.add_done_callback(_close)
    if response is None:
        failures |= dict.fromkeys([*asked.values(), *waiting], f"no answer within {CONNECT_SECONDS:g} s")
    return winner, response, failures


def _ask(url: str, offset: int) -> "futures.Future[Any]":
    """Requests a file from byte ``offset`` on, in a daemon thread: socket timeouts do not apply to name look-ups, which may
    hang, and a daemon thread does not keep the program from exiting."""
    future: futures.Future[Any] = futures.Future()
    headers = {"User-Agent": "jresnet"} | ({"Range": f"bytes={offset}-"} if offset else {})

    def run() -> None:
        try:
            opener = urllib.request.build_opener(_Redirects)
            future.set_result(opener.open(urllib.request.Request(url, headers=headers), timeout=STALL_SECONDS))
        except urllib.error.HTTPError as error:
            if error.code == 416 and offset:  # the file has no bytes after the offset: a valid answer
                future.set_result(error)
            else:
                error.close()
                future.set_exception(error)
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _close(future: "futures.Future[Any]") -> None:
    if not future.exception():
        future.result().close()


class _BrokenError(Exception):
    """A transfer was interrupted; the data received so far is kept unless stated otherwise."""


def _receive(response: Any, part: io.FileIO, name: str, most: int, progress: bool) -> bool:
    """Appends a response to ``part``, or writes it from the start if the server does not resume; closes the response.

    Returns:
        Whether the answer fits the request; if not, nothing was written.

    Raises:
        _BrokenError: the transfer was interrupted or too slow; or it exceeded the announced size or ``most``, and then
            nothing is kept.
    """
    offset = _size(part)
    misfit = response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
    if response.status == 416 or misfit:
        response.close()
        return False
    if response.status != 206 and offset:
        part.truncate(0)
        offset = 0
    length = response.headers.get("Content-Length", "")
    total = offset + int(length[:20]) if length.isascii() and length.isdecimal() else None  # 20 digits exceed any limit
    if (total or 0) > most:
        response.close()
        part.truncate(0)
        raise _BrokenError(f"the server announced more than {most:,} bytes, the largest possible size of {name}")
    bar = _bar(name, total, offset, progress)
    limit = most if total is None else total
    pieces = _pieces(response)
    try:
        for piece in pieces:
            if _size(part) + len(piece) > limit:
                part.truncate(0)
                raise _BrokenError(f"the server sent more than {limit:,} bytes, the largest possible size of {name}")
            bar.update(len(piece))
            while piece:  # a write to a nearly full disk may be partial
                piece = piece[os.write(part.fileno(), piece) :]
    finally:
        pieces.close()
        bar.close()
    if total is not None and _size(part) < total:
        raise _BrokenError(f"the connection was cut after {_size(part):,} of {total:,} bytes")
    return True


def _pieces(response: Any) -> Generator[memoryview]:
    """Yields the body of a response as it arrives, and closes the response at the end.

    A separate thread reads the response: a server that sends the header of a chunk or a trailer byte by byte defeats any
    socket timeout, and a main thread that waits for a queue can be interrupted by Ctrl-C.
    """
    arrived: queue.Queue[bytes | Exception] = queue.Queue(4)
    over = threading.Event()

    def read() -> None:
        with response:
            try:
                # read1, because read would lose data that arrived before a stall
                while (piece := response.read1(_CHUNK)) and not over.is_set():
                    arrived.put(piece)
                arrived.put(b"")
            except Exception as error:
                arrived.put(error)

    threading.Thread(target=read, daemon=True).start()
    began, count = time.monotonic(), 0
    try:
        while True:
            try:
                piece = arrived.get(timeout=max(began + STALL_SECONDS - time.monotonic(), 0.0))
            except queue.Empty:
                piece = TimeoutError()
            if isinstance(piece, bytes):
                if not piece:
                    return
                count += len(piece)
                yield memoryview(piece)
            elif not isinstance(piece, TimeoutError):
                raise _BrokenError(_reason(piece)) from piece
            if time.monotonic() - began >= STALL_SECONDS or isinstance(piece, TimeoutError):
                if count < SLOWEST * STALL_SECONDS:
                    slow = (
                        f"only {count:,} bytes in {STALL_SECONDS:g} s" if count else f"no byte for {STALL_SECONDS:g} s"
                    )
                    raise _BrokenError(slow)
                began, count = time.monotonic(), 0
    finally:
        over.set()
        with contextlib.suppress(queue.Empty):  # the thread may be waiting for space in the queue
            while True:
                arrived.get_nowait()


def _reason(error: BaseException) -> str:
    """A short reason why an address failed, which may quote the server."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {printable(str(error.reason))}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return printable(str(cause) or type(cause).__name__)


def _bar(name: str, total: int | None, done: int, progress: bool) -> Any:
    """A progress bar: tqdm on a terminal, else ``_Lines``; both have ``update(bytes)`` and ``close()``."""
    if progress and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(desc=name, total=total, initial=done, unit="B", unit_scale=True)
    return _Lines(name, total, done, progress)


class _Lines:
    """Progress as plain lines: at the start, at each tenth (or 50 MB if the size is unknown), and at least once a minute."""

    def __init__(self, name: str, total: int | None, done: int, progress: bool) -> None:
        self.name, self.total, self.done, self.progress = name, total, done, progress
        self.first, self.start = done, time.monotonic()
        self.step = max(total / 10, 1) if total else 50e6
        self.next, self.told = 0.0, self.start
        self.update(0)

    def update(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if not self.progress or (self.done < self.next and now - self.told < 60):
            return
        self.told = now
        self.next = (self.done // self.step + 1) * self.step
        rate = (self.done - self.first) / max(now - self.start, 1e-3)
        line = f"{self.name}: {self.done / 1e6:.1f} MB"
        if self.total:
            line += f" of {self.total / 1e6:.1f} MB ({100 * self.done / self.total:.0f} %)"
        if rate:
            line += f", {rate / 1e6:.1f} MB/s"
            line += f", {(self.total - self.done) / rate:.0f} s left" if self.total else ""
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass
