"""What the scripts compile is kept for their next start."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from conftest import REPOSITORY

from jresnet import cache, commands

# Prints the folder, and how many programs were compiled and how many loaded.
PROGRAM = """
import jax
from jax import monitoring
from jresnet import cache

counts = {"cache_hits": 0, "cache_misses": 0}


def count(event, **_):
    name = event.rpartition("/")[2]
    if name in counts:
        counts[name] += 1


monitoring.register_event_listener(count)
folder = cache.keep_compiled()
jax.jit(lambda x: x * 3)(2.0).block_until_ready()
print(folder, counts["cache_hits"], counts["cache_misses"])
"""


def start(home: Path, program: str = PROGRAM, **environment: str) -> list[str]:
    """The words that a program prints, with its own cache folder in ``home``."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, text=True, capture_output=True, timeout=120,
        env=inherited | {"XDG_CACHE_HOME": str(home), "PYTHONPATH": str(REPOSITORY)} | environment,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    folder, hits, misses = start(tmp_path)
    assert Path(folder).parent == tmp_path / "jresnet" / "compiled"
    assert Path(folder).stat().st_mode & 0o077 == 0, "what lies there is code"
    assert hits == "0"
    assert int(misses) > 0
    assert start(tmp_path) == [folder, misses, "0"]


def test_no_word_of_programs_that_cannot_be_kept(tmp_path: Path) -> None:
    """Those with oneDNN's kernels; of a full disk there is."""
    program = """
import warnings
from jresnet import cache
warnings.showwarning = lambda message, *_: print(str(message).split()[-1])
cache.keep_compiled()
for why in ("MemoryError: std::bad_alloc", "OSError: full"):
    warnings.warn(f"Error writing persistent compilation cache entry for 'x': {why}")
"""
    assert start(tmp_path, program) == ["full"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no choice of cores")
def test_programs_for_other_numbers_of_cores_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set()
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        folders.add(cache._default())
    assert len(folders) == 2


def test_jaxs_own_settings_are_respected(tmp_path: Path) -> None:
    given = tmp_path / "given"
    assert start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(given))[0] == str(given)
    assert list(given.iterdir())
    assert start(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == ["None", "0", "0"]
    assert start(tmp_path, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1000")
    assert not (tmp_path / "jresnet").exists() or not list((tmp_path / "jresnet").rglob("*-cache"))


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "jresnet").write_text("a file in the folder's place")
    folder, hits, _ = start(tmp_path)
    assert (folder, hits) == ("None", "0")


@pytest.mark.parametrize(
    ("name", "options"),
    [("train", ["--dataset", "digits"]), ("evaluate", ["--weights", "resnet18", "--data", "cifar10"])],
)
def test_the_commands_use_it_before_anything_else(name: str, options: list[str], monkeypatch) -> None:
    class Asked(Exception):
        pass

    def keep_compiled() -> None:
        raise Asked

    monkeypatch.setattr(cache, "keep_compiled", keep_compiled)
    with pytest.raises(Asked):
        commands.run(name, options, name)


def test_the_search_for_garbage_waits_while_jax_traces_and_goes_on_after_an_error():
    seen = []

    def function(x):
        seen.append(gc.isenabled())
        return x + "no number"

    assert float(cache.compiled(jax.jit(lambda x: x * 3), 2.0)(2.0)) == 6.0
    with pytest.raises(TypeError):
        cache.compiled(jax.jit(function), 2.0)
    assert seen == [False]
    assert gc.isenabled()
    gc.disable()
    try:
        cache.compiled(jax.jit(lambda x: x), 2.0)
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()
