"""Fetch one file: mirrors in order, resumed, checked by its SHA-256, moved into place in one step.

A server may be anyone's: what it sends is bounded in size (``most``) and in time (``SLOWEST``), whatever it announces.

Standard library only; tqdm draws the bar where it is installed and the output is a terminal.
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

CONNECT_SECONDS = 2.5  # for the first answer from any of the mirrors: a command without network must end within 5 s
STALL_SECONDS = 30.0  # without a byte, or with too few, after which the next mirror goes on from there
SLOWEST = 4096  # bytes a second, over STALL_SECONDS; CIFAR-10's home server gives 50,000
MOST = 1 << 30  # bytes of a file, where its size is not known; the largest of torchvision's ResNets has 0.5 GB
TURNS = 3  # how often one address may be asked to go on after a transfer that broke off
_CHUNK = 1 << 18  # bytes read at most at once
_LOOPBACK = {None, "", "localhost", "127.0.0.1", "::1"}


def fetch(urls: Sequence[str], path: Path, *, sha256: str, most: int = MOST, progress: bool = True) -> Path:
    """Download a file from the first address that gives it, unless it is there already.

    Bytes arrive in ``path`` + ``.part``, which a later call, or another mirror, resumes; the file appears under its own
    name only when its digest is right. Proxies are taken from the environment as urllib does. Processes that want the
    same file at once wait for the first of them.

    Args:
        urls: addresses of the same bytes, best first; https only (see ``_check_address``).
        path: where the file is to lie; missing folders are made.
        sha256: its digest, 64 hex digits, or at least the first 8, as torchvision publishes them.
        most: its size in bytes where that is known, else the most that it can have.
        progress: show bytes, rate and time left on stderr.

    Returns:
        ``path``.

    Raises:
        DownloadError: no address gave the file (each is listed with its reason, within ``CONNECT_SECONDS`` where there
            is no network), the disk is full, the folder cannot be written, or another file already lies at ``path``,
            or a pipe or a device there or at the partial file.
    """
    path, digest = Path(path), sha256.lower()
    if not re.fullmatch("[0-9a-f]{8,64}", digest):
        raise DownloadError(f"a SHA-256 of 8 to 64 hex digits is needed to check {path.name}, not {sha256!r}")
    if not urls:
        raise DownloadError(f"no address is known for {path.name}: put the file at {path}")
    for url in urls:
        _check_address(url)
    try:
        for place in (path, path.with_name(path.name + ".part")):
            if place.exists() and not place.is_file():  # a pipe would never answer
                raise DownloadError(f"{place} is no ordinary file: move or delete it")
        if path.exists():
            return _checked(path, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        part, part_path, locked = _open_part(path, progress)
        with part:
            # Another process may have fetched it while this one waited for the lock.
            failures = {} if path.exists() else _collect(urls, part, path.name, digest, most, progress)
            kept = _size(part) if failures and locked else 0  # a part without a lock has a name of its own: no resuming
            if os.name == "nt":  # Windows renames and removes only closed files; elsewhere the lock is held to the end
                part.close()
            if not failures and not path.exists():
                os.replace(part_path, path)
            elif not kept:
                part_path.unlink()
        if not failures:
            return _checked(path, digest)
    except DownloadError:  # an OSError itself
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space there and run it again, it goes on from there" if full else "choose another folder"
        raise DownloadError(f"cannot write {path}: {error.strerror or error}; {advice}") from error
    lines = "".join(f"\n  {url}: {reason}" for url, reason in failures.items())
    resume = f"\n{kept:,} bytes are kept in {part_path}: running it again goes on from there." if kept else ""
    raise DownloadError(
        f"could not download {path.name} (expected SHA-256 {digest}{'' if len(digest) == 64 else '...'}):{lines}\n"
        f"Without network, fetch it elsewhere from one of these addresses and put it at {path}{resume}"
    )


def _check_address(url: str, loopback: bool = True) -> None:
    """Refuse what anyone between here and the server could change: another file with the same 8 digits is found within
    minutes, so the connection has to be trusted too. Plain http and files on this very machine serve the tests."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:  # "https://[::1/x"
        raise DownloadError(f"{printable(url)} is no address: {error}") from error
    local = loopback and parts.scheme in ("http", "file") and parts.hostname in _LOOPBACK
    if parts.scheme != "https" and not local:
        raise DownloadError(f"only https addresses are downloaded from, not {printable(url)}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections only to addresses that would be accepted in the first place."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_address(newurl, loopback=req.type != "https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except BaseException:
            fp.close()  # urllib would leave the connection open
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _checked(path: Path, digest: str) -> Path:
    """``path``, if its digest is right; a file that someone put there is never overwritten."""
    if not (actual := sha256_of(path)).startswith(digest):
        raise DownloadError(f"{path} exists, but its SHA-256 is {actual} instead of {digest}: move or delete it")
    return path


def _size(part: io.FileIO) -> int:
    return os.fstat(part.fileno()).st_size


def _open_part(path: Path, progress: bool) -> tuple[io.FileIO, Path, bool]:
    """The partial file, open for appending, its path, and whether it is locked; where there are no locks, one of this
    thread's own."""
    part = path.with_name(path.name + ".part")
    while fcntl is not None:
        file = open(part, "ab+", buffering=0)  # noqa: SIM115 - unbuffered, so that what is counted is on the disk
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress:
                    print(f"another process is downloading {path.name}: waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            # Its last owner may have moved or removed it while this one waited: then the lock is on another file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                    return file, part, True
            file.close()
        except OSError:  # some network file systems have no locks
            file.close()
            break
        except BaseException:
            file.close()
            raise
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    return open(part, "wb+", buffering=0), part, False


def _collect(urls: Sequence[str], part: io.FileIO, name: str, digest: str, most: int, progress: bool) -> dict[str, str]:
    """Fill ``part`` until its digest is right; else return for each address why it is not."""
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
                waiting.append(url)  # after the other mirrors
            continue
        part.seek(0)
        actual = hashlib.file_digest(part, "sha256").hexdigest()
        if actual.startswith(digest):
            return {}
        failures[url] = f"what it gave has {_size(part):,} bytes and SHA-256 {actual}"
        part.truncate(0)
        if resumed and (not fits or response.status == 206):
            waiting.insert(0, url)  # the older bytes may be the wrong ones: once more, from the start
    return failures


def _first_answer(urls: list[str], offset: int) -> tuple[str, Any, dict[str, str]]:
    """Ask the addresses in turn until one answers, ``CONNECT_SECONDS`` in all, however many they are.

    Each gets its share of the time before the next is asked as well, but stays in the race: so a mirror that drops
    packets does not cost the next one its chance, nor do many mirrors cut a slow line short.

    Returns:
        address and response of the winner ("" and None without one), and the reasons of those that failed.
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
            if response is None:  # the earlier one wins if two answer at once
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
    """Request a file from byte ``offset`` on, in a thread of its own: a name look-up hangs beyond any socket timeout,
    and a daemon thread does not keep the program from ending."""
    future: futures.Future[Any] = futures.Future()
    headers = {"User-Agent": "jresnet"} | ({"Range": f"bytes={offset}-"} if offset else {})

    def run() -> None:
        try:
            opener = urllib.request.build_opener(_Redirects)
            future.set_result(opener.open(urllib.request.Request(url, headers=headers), timeout=STALL_SECONDS))
        except urllib.error.HTTPError as error:
            if error.code == 416 and offset:  # nothing there beyond the bytes that we have: an answer too
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
    """A transfer that broke off, and how; what has arrived is kept."""


def _receive(response: Any, part: io.FileIO, name: str, most: int, progress: bool) -> bool:
    """Append what arrives to ``part``, or write it from the start if the server does not resume; ``response`` is closed.

    Returns:
        whether the answer fits the request; if not, nothing was written.

    Raises:
        _BrokenError: it broke off, came too slowly, or is more than was announced or than ``most``; then nothing is kept.
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
    total = offset + int(length[:20]) if length.isascii() and length.isdecimal() else None  # beyond 20 digits: too many
    if (total or 0) > most:
        response.close()
        part.truncate(0)
        raise _BrokenError(f"it announces more than the {most:,} bytes that {name} can have")
    bar = _bar(name, total, offset, progress)
    limit = most if total is None else total
    pieces = _pieces(response)
    try:
        for piece in pieces:
            if _size(part) + len(piece) > limit:
                part.truncate(0)
                raise _BrokenError(f"it sent more than the {limit:,} bytes that {name} can have")
            bar.update(len(piece))
            while piece:  # a disk that fills up takes a part of it
                piece = piece[os.write(part.fileno(), piece) :]
    finally:
        pieces.close()
        bar.close()
    if total is not None and _size(part) < total:
        raise _BrokenError(f"the connection was cut after {_size(part):,} of {total:,} bytes")
    return True


def _pieces(response: Any) -> Generator[memoryview]:
    """The body as it comes; the response is closed in the end.

    It is read in a thread of its own: a chunk's head or a trailer that arrives in drops hangs beyond any socket timeout,
    and while the main thread waits for the queue it hears Ctrl-C.
    """
    arrived: queue.Queue[bytes | Exception] = queue.Queue(4)
    over = threading.Event()

    def read() -> None:
        with response:
            try:
                # read1, because read would lose what had arrived before a stall
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
        with contextlib.suppress(queue.Empty):  # the thread may wait for room
            while True:
                arrived.get_nowait()


def _reason(error: BaseException) -> str:
    """Why an address failed, in a few words, of which some are the server's."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {printable(str(error.reason))}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return printable(str(cause) or type(cause).__name__)


def _bar(name: str, total: int | None, done: int, progress: bool) -> Any:
    """tqdm on a terminal, else ``_Lines``; both have ``update(bytes)`` and ``close()``."""
    if progress and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(desc=name, total=total, initial=done, unit="B", unit_scale=True)
    return _Lines(name, total, done, progress)


class _Lines:
    """Progress as plain lines: one at the start, one for each tenth (or 50 MB of an unknown size), one a minute at least."""

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
