"""Turns on huge pages for the memory of a command and its child processes.

XLA allocates temporary memory at every step, and the kernel maps it page by page. If Linux provides pages of 2 MiB only on
request ("madvise", the setting of Debian and Ubuntu), glibc's malloc (2.35 or newer) requests them if a tunable says so. The
tunable is read when a process starts.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
HUGE = "glibc.malloc.hugetlb"
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str]:
    """Environment variables that turn on huge pages; empty if they are already set, not needed or not possible.

    ``GLIBC_TUNABLES=glibc.malloc.hugetlb=0`` switches this off.
    """
    given = os.environ.get(TUNABLES, "")
    if HUGE in given or _setting() != "madvise":
        return {}
    return {TUNABLES: ":".join(filter(None, [given, f"{HUGE}=1"]))}


def there() -> bool:
    """Whether a process with these variables gets huge pages, if its glibc is 2.35 or newer."""
    asked = f"{HUGE}=1" in {**os.environ, **environment()}.get(TUNABLES, "")
    return _setting() == "always" or (_setting() == "madvise" and asked)


def ask() -> None:
    """Restarts the running command with these variables, as the same process; call it before anything else."""
    added = environment()
    if added and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **added})


def _setting() -> str:
    """ "always", "madvise" or "never"; empty on a system without huge pages."""
    try:
        found = re.search(r"\[(\w+)\]", SETTING.read_text())
    except OSError:
        return ""
    return found[1] if found else ""
