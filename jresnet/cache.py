"""Compiled programs, and how they outlive their process: JAX's persistent compilation cache, as the scripts use it."""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path
from typing import Any

import jax


def keep_compiled() -> Path | None:
    """Lets JAX keep what it compiles, so that the next process like this one loads it; before anything is compiled.

    The folder is ``JAX_COMPILATION_CACHE_DIR`` where that is set, else ``jresnet/compiled`` in ``XDG_CACHE_HOME`` or
    ``~/.cache``, there one for each number of cores: XLA cuts a program for the CPU into parts for the cores at hand, and
    JAX's key does not tell them apart. Entries are for this machine's kind of processor, version and device alone, are
    never deleted, and are code: nobody else should be able to write there.
    ``JAX_ENABLE_COMPILATION_CACHE=false`` switches it off.

    Returns:
        The folder; None where the cache is off or nothing can be written there.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    given = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    try:
        folder = Path(given or _default())
        folder.mkdir(0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Programs with oneDNN's kernels cannot be kept: jax 0.12.0.1 fails to write them down, and would say so of each.
    warnings.filterwarnings("ignore", r"Error writing persistent compilation cache entry .*std::bad_alloc")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX's second leaves out what initialises a network: some seventy small programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def compiled(jitted: Any, *arguments: Any) -> jax.stages.Compiled:
    """What ``jax.jit`` returned, compiled for arguments like these, or loaded.

    Python's search for garbage waits while JAX traces. Tracing makes objects by the million that live on, and looking
    through all of them time and again takes a fifth of it.
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
