"""Files: read up to a bound, written whole or not at all, named by their SHA-256; strangers' texts fit for a terminal."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from jresnet.errors import InputError

TORCH_SUFFIXES = (".pth", ".pt", ".th")  # of files of torch.save
LONGEST = 2000  # letters of a line that is shown; the library's own have a few hundred

# Read once, before there are threads: to read it is to change it for a moment, in which another thread's file would be
# open to everyone.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file so that, whenever it is interrupted, the path holds the old content or the new one, whole.

    A link stays, and the file that it points to is written. Devices and pipes are not touched.

    Raises:
        InputError: where it cannot be written (no such folder, no permission, disk full, a device).
    """
    temporary = None
    try:
        target = Path(os.path.realpath(path))
        if target.is_symlink():  # what realpath cannot follow
            raise OSError("it is a link that leads nowhere")
        # A device or a pipe would be gone, and an ordinary file in its place.
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise OSError("it is a device or a pipe")
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes files private: give it an ordinary file's permissions
        os.replace(temporary, target)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; choose another place"
        ) from error
    except BaseException:  # Ctrl-C: leave nothing half-written
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise


def read_ordinary(path: str | Path, most: int) -> bytes:
    """The content of an ordinary file. A pipe or a device is not opened: it might never answer, or never end.

    Args:
        path: the file, or a link to it.
        most: bytes that it may have.

    Raises:
        OSError: it cannot be read, is no ordinary file, or has more bytes.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is a folder, a device or a pipe")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"it has {max(status.st_size, len(content)):,} bytes, where {most:,} are the most that can be")
    return content


def sha256_of(path: Path | str) -> str:
    """The SHA-256 of a file, 64 lower-case hex digits; raises OSError where it cannot be read or is a pipe or a device."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is a folder, a device or a pipe")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def printable(name: str) -> str:
    """A name from a stranger's file as it may be shown on a terminal: without control codes, and not for pages."""
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= 200 else f"{name[:200]}..."


def shown(message: str) -> str:
    """A message as it may be shown on a terminal: its control codes escaped, and its lines cut where they are very long.

    Lines stay lines. What comes from strangers, or from a shell's wildcard, is in it as it is: paths, entries of files,
    what a server said.
    """

    def line(text: str) -> str:
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 3 :]}"

    return "\n".join(map(line, message.split("\n")))


def few(names: Iterable[str]) -> str:
    """At most five names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(map(printable, names[:5])) + more
