"""Files: written whole or not at all, named by their SHA-256, and strangers' names made fit for a terminal."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from jresnet.errors import InputError

# Read once, before there are threads: to read it is to change it for a moment, in which another thread's file would be
# open to everyone.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file so that, whenever it is interrupted, the path holds the old content or the new one, whole.

    Raises:
        InputError: where it cannot be written (no such folder, no permission, disk full).
    """
    path = Path(path)
    temporary = None
    try:
        # A device or a pipe would be gone, and an ordinary file in its place.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("it is a device or a pipe")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes files private: give it an ordinary file's permissions
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    except BaseException:  # Ctrl-C: leave nothing half-written
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise


def sha256_of(path: Path | str) -> str:
    """The SHA-256 of a file, 64 lower-case hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def printable(name: str) -> str:
    """A name from a stranger's file as it may be shown on a terminal: without control codes, and not for pages."""
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= 200 else f"{name[:200]}..."


def few(names: Iterable[str]) -> str:
    """At most five names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(map(printable, names[:5])) + more
