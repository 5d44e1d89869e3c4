"""Configures JAX's persistent compilation cache, so that compiled programs are reused by later processes."""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path
from typing import Any

import jax


def keep_compiled() -> Path | None:
    """Turns on JAX's persistent compilation cache. Call it before anything is compiled.

    The folder is ``JAX_COMPILATION_CACHE_DIR`` if that is set, else ``jresnet/compiled`` in ``XDG_CACHE_HOME`` or
    ``~/.cache``, with one subfolder per number of CPU cores: XLA partitions a CPU program for the available cores, and
    JAX's cache key does not contain their number. Entries are valid only for the same processor type, versions and device.
    They are never deleted. They are executable code: nobody else should have write access to the folder.
    ``JAX_ENABLE_COMPILATION_CACHE=false`` turns the cache off.

    Returns:
        The folder, or None if the cache is off or the folder is not writable.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    given = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    try:
        folder = Path(given or _default())
        folder.mkdir(0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Programs with oneDNN kernels cannot be cached: jax 0.12.0.1 fails to serialize them, and warns about each one.
    warnings.filterwarnings("ignore", r"Error writing persistent compilation cache entry .*std::bad_alloc")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX's default of 1 s would skip the programs that initialise a network: about seventy small ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def compiled(jitted: Any, *arguments: Any) -> jax.stages.Compiled:
    """Lowers a jitted function for arguments of these shapes and compiles it, or loads it from the cache.

    Python's garbage collector is off while JAX traces. Tracing allocates millions of objects that stay alive, and scanning
    them repeatedly takes a fifth of the tracing time.
    """
    searching = gc.isenabled()
    gc.disable()
    try:
        lowered = jitted.lower(*arguments)
    finally:
        if searching:
            gc.enable()
    return lowered.compile()


def _default() -> Path:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "jresnet" / "compiled" / f"{cores}-cores"
