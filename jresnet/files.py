"""File helpers: bounded reads, atomic writes, SHA-256, and untrusted text made safe to print on a terminal."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from jresnet.errors import InputError

TORCH_SUFFIXES = (".pth", ".pt", ".th")  # suffixes of files written by torch.save
LONGEST = 2000  # characters of a printed line; the library's own lines have a few hundred

# The umask can only be read by changing it for a moment, in which another thread could create a file that everybody can
# access. So it is read once at import, before there are threads.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file atomically: even if interrupted, the path holds either the complete old or the complete new content.

    If the path is a symbolic link, the link is kept and its target is written. Devices and pipes are refused.

    Raises:
        InputError: the file cannot be written (no such folder, no permission, disk full, a device or a pipe).
    """
    temporary = None
    try:
        target = Path(os.path.realpath(path))
        if target.is_symlink():  # realpath could not follow it
            raise OSError("it is a broken link")
        # os.replace would replace a device or a pipe by an ordinary file.
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise OSError("it is a device or a pipe")
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp creates private files; use the usual permissions
        os.replace(temporary, target)
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; choose another place"
        ) from error
    except BaseException:  # such as KeyboardInterrupt: remove the temporary file
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise


def read_ordinary(path: str | Path, most: int) -> bytes:
    """Reads a regular file. Pipes and devices are not opened, because reading them may block or never end.

    Args:
        path: the file, or a link to it.
        most: largest allowed size in bytes.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger than ``most``.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is a folder, a device or a pipe")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"it has {max(status.st_size, len(content)):,} bytes; expected at most {most:,}")
    return content


def sha256_of(path: Path | str) -> str:
    """The SHA-256 of a file as 64 lower-case hex digits; raises OSError if it cannot be read, or is a pipe or a device."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is a folder, a device or a pipe")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def printable(name: str) -> str:
    """Makes an untrusted name safe to print on a terminal: control characters escaped, at most 200 characters."""
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= 200 else f"{name[:200]}..."


def shown(message: str) -> str:
    """Makes a message safe to print on a terminal: control characters are escaped and very long lines are cut.

    A message may contain untrusted text: paths, entries of files, answers of a server. Line breaks are kept.
    """

    def line(text: str) -> str:
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 3 :]}"

    return "\n".join(map(line, message.split("\n")))


def few(names: Iterable[str]) -> str:
    """Formats a list of names: at most five of them, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(map(printable, names[:5])) + more
