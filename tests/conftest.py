"""Fixtures and helpers shared by the tests: real data, small networks, and commands."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax._src.compiler
import numpy as np
import pytest
import safetensors.numpy

REPOSITORY = Path(__file__).parent.parent
sys.path.append(str(REPOSITORY / "scripts"))  # modules that scripts share

from benchmark.networks import randomise  # noqa: E402

import jresnet  # noqa: E402
from jresnet.models import layers  # noqa: E402
from jresnet.models.resnet import ResNet  # noqa: E402
from jresnet.weights import native  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that at the end no process waits for one of them."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One compilation cache per session, since many tests, and the commands they run, compile the same step."""
    folder = str(tmp_path_factory.mktemp("jax-cache"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # for commands
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))  # cached listings of image folders
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    draw_quickly()
    jax.jit(abs)(1.0)  # XLA reads XLA_FLAGS here, so that what compiled_quickly sets there is for commands alone


def draw_quickly() -> None:
    """Keeps one optimised program for initial weights: without LLVM's optimizations they take six times as long."""
    drawn, key = layers._normal_block, jax.random.key(0)
    program, dtype, devices = drawn.lower(key, np.uint32(0)).compile(), key.dtype, key.devices()

    def block(key: jax.Array, index: np.uint32) -> jax.Array:
        concrete = key.dtype == dtype and not isinstance(key, jax.core.Tracer) and key.devices() == devices
        return program(key, index) if concrete else drawn(key, index)

    layers._normal_block = block  # type: ignore[assignment]


# These compare float32 results of kernels and networks, or look at the compiled program, so they compile as users' programs.
# The others' float32 comparisons find wrong tensors, not rounding. In the others, the marker as_users_do is for one test.
AS_USERS_DO = {"test_compiler", "test_elsewhere", "test_golden", "test_jax_fit", "test_models", "test_training"}


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Turns LLVM's optimizations off in all other tests, and the commands they run, to halve XLA's compile time.

    In jaxlib 0.10, the older emitters of fusions halve it again.
    """
    quick = request.path.stem not in AS_USERS_DO
    with pytest.MonkeyPatch.context() as patched:
        if quick:
            patched.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
            if jax.__version_info__ < (0, 11):
                flags, compiler = os.environ.get("XLA_FLAGS", ""), jax._src.compiler
                patched.setenv("XLA_FLAGS", f"{flags} --xla_cpu_use_fusion_emitters=false")
                options_of = compiler.get_compile_options

                def with_older_emitters(*args: object, **options: object) -> object:
                    given = options.pop("env_options_overrides", None) or {}
                    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "true":
                        given = {"xla_cpu_use_fusion_emitters": False} | given
                    return options_of(*args, env_options_overrides=given, **options)

                patched.setattr(compiler, "get_compile_options", with_older_emitters)
        jax.config.update("jax_disable_most_optimizations", quick)
        yield
    jax.clear_caches()  # or a process that runs half of the tests holds 5 GB of compiled programs


@pytest.fixture(autouse=True)
def compiled_as_users_do(request: pytest.FixtureRequest) -> Iterator[None]:
    """Turns LLVM's optimizations on again in a test that is marked so."""
    if not request.node.get_closest_marker("as_users_do") or "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
        yield
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "false")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder named by JRESNET_SHARED, with ``cifar10/`` (real images) and ``weights/`` (a network trained elsewhere)."""
    folder = os.environ.get("JRESNET_SHARED")
    if not folder:
        pytest.skip("JRESNET_SHARED is not set: expected a folder with real images and weights")
    assert Path(folder).is_dir(), f"JRESNET_SHARED={folder} is not a folder"
    return Path(folder)


@pytest.fixture(scope="session")
def cifar10(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 in its official layouts, with 5,000 training and the 1,000 clean test images."""
    out = tmp_path_factory.mktemp("cifar10")
    command = [
        sys.executable,
        str(shared / "cifar10" / "make_cifar10.py"),
        str(out),
        "--test",
        "clean",
        "--train",
        "5000",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="session")
def native_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native file of a random resnet20_cifar."""
    path = tmp_path_factory.mktemp("native") / "resnet20.safetensors"
    model = jresnet.create("resnet20_cifar", seed=3)
    randomise(model)
    native.save(path, model, "resnet20_cifar")
    return path


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs Python with ``arguments`` in the repository, as a user would; does not check the exit code."""
    options = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run([sys.executable, *map(str, arguments)], **options)  # type: ignore[call-overload]


def load_script(name: str) -> ModuleType:
    """Loads ``scripts/NAME.py`` as a module, without running its command."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


def written_anyway(path: Path, model: ResNet, **metadata: str) -> None:
    """Writes a native file with valid digests and with ``metadata`` that ``save`` would reject."""
    native.save(path, model)
    with safetensors.safe_open(path, "numpy") as file:
        values, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    kept = {name: text for name, text in said.items() if name not in ("digest", "metadata_digest")}
    path.write_bytes(safetensors.numpy.save(values, native.sealed(values, kept | metadata)))
