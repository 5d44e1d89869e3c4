"""The options that XLA's CPU compiler is given: which, when, and what is said of them."""

from __future__ import annotations

import logging

import jax
import pytest

import jresnet
from jresnet.kernels import compiler


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JRESNET_COMPILER_OPTIONS", raising=False)
    compiler._chosen.cache_clear()
    yield
    compiler._chosen.cache_clear()


OLDEST, NEWEST = compiler.ROWS[0], compiler.ROWS[-1]


@pytest.mark.parametrize(
    ("version", "row"),
    [
        ("0.9.2", None),
        ("0.10.0", None),
        ("0.10.1", OLDEST),
        ("0.10.1.dev20260501", OLDEST),
        ("0.11.2", OLDEST),
        ("0.12.0", OLDEST),
        ("0.12.0.1", NEWEST),
        ("0.12.1", NEWEST),
        ("99.0", NEWEST),
    ],
)
def test_a_version_gets_the_newest_row_that_is_not_newer(
    version: str, row: compiler.Row | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "_check", lambda options: None)
    monkeypatch.setattr(jax, "__version__", version)
    assert jresnet.compiler_options() == (row.options if row else {})
    assert jresnet.compiler_options(remat=True) == (row.options if row else {}) | compiler.BARRIERS


def test_a_version_that_was_not_measured_is_checked_once_and_spoken_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []
    monkeypatch.setattr(compiler, "_check", asked.append)
    monkeypatch.setattr(jax, "__version__", "99.0")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert jresnet.compiler_options() == NEWEST.options
    assert asked == [NEWEST.options]
    assert "jax 99.0: compiler options are those measured on jax 0.12.0.1" in caplog.text
    assert "measured on jax 0.12.0.1" in "\n".join(compiler.explain())


def test_an_option_that_this_jax_does_not_know_is_not_used_and_spoken_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiler, "ROWS", (compiler.Row((0, 1), {"xla_cpu_no_such_option": True}),))
    with caplog.at_level(logging.WARNING):
        assert jresnet.compiler_options() == {}
    assert "a program cannot be compiled" in caplog.text
    assert "xla_cpu_no_such_option" in caplog.text


def test_options_that_compute_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    jit = jax.jit

    def wrong(function, compiler_options=None):
        return jit(lambda *a: function(*a) * (1.001 if compiler_options else 1))

    monkeypatch.setattr(jax, "jit", wrong)
    assert compiler._check({"an": "option"}) == "a small network's result is off by 1e-03"


def test_the_options_of_this_jax_pass_their_check() -> None:
    assert compiler._check(jresnet.compiler_options()) is None


def test_a_cpu_without_avx2_has_xlas_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_has_avx2", lambda: False)
    assert jresnet.compiler_options() == {}
    assert "lacks AVX2" in compiler.explain()[0]


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JRESNET_COMPILER_OPTIONS", "off")
    assert jresnet.compiler_options() == {}
    assert jresnet.compiler_options(remat=True) == compiler.BARRIERS
    assert compiler.explain() == ["compiler XLA's defaults, because JRESNET_COMPILER_OPTIONS is off"]
    monkeypatch.setenv("JRESNET_COMPILER_OPTIONS", "fast")
    with pytest.raises(jresnet.InputError, match="must be on or off, got 'fast'"):
        jresnet.compiler_options()


def test_they_are_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert jresnet.compiler_options(remat=True) == {}
    assert "gpu" in compiler.explain()[0]
