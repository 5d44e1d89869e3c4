"""What asks for large pages, and what does not."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark.driver import Workplace
from conftest import REPOSITORY

from jresnet import commands
from jresnet.commands import huge_pages

HUGE = "glibc.malloc.hugetlb=1"


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's file, here with Debian's setting, and no tunables in the environment."""
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "SETTING", file)
    monkeypatch.delenv(huge_pages.TUNABLES, raising=False)
    return file


def test_who_must_ask_asks_once(setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert huge_pages.environment() == {"GLIBC_TUNABLES": HUGE}
    assert huge_pages.there()
    monkeypatch.setenv("GLIBC_TUNABLES", HUGE)
    assert huge_pages.environment() == {}
    assert huge_pages.there()


def test_other_tunables_stay(setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert huge_pages.environment() == {"GLIBC_TUNABLES": f"glibc.malloc.check=1:{HUGE}"}


@pytest.mark.parametrize(
    ("text", "there"),
    [("[always] madvise never\n", True), ("always madvise [never]\n", False), (None, False), ("", False)],
)
def test_who_need_not_or_cannot_does_not_ask(setting: Path, text: str | None, there: bool) -> None:
    setting.unlink()
    if text is not None:
        setting.write_text(text)
    assert huge_pages.environment() == {}
    assert huge_pages.there() == there


def test_the_off_switch(setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert huge_pages.environment() == {}
    assert not huge_pages.there()


def test_the_same_process_with_the_same_arguments(setting: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "from jresnet.commands import huge_pages\n"
        f"huge_pages.SETTING = pathlib.Path({str(setting)!r})\n"
        "print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), sys.flags.dont_write_bytecode, sys.argv[1:], flush=True)\n"
        "huge_pages.ask()\n"
    )
    command = [sys.executable, "-B", str(script), "--depth", "two words"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    process, rest = found[0].split(maxsplit=1)
    assert rest == "None 1 ['--depth', 'two words']"
    assert found[1:] == [f"{process} {HUGE} 1 ['--depth', 'two words']"]


@pytest.mark.parametrize("script", ["train_cifar10", "evaluate"])
def test_the_scripts_ask(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "ask", lambda: sys.exit(77))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "scripts" / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 77


@pytest.mark.parametrize(("name", "asks"), [("train", True), ("evaluate", True), ("info", False), ("--help", False)])
def test_the_console_command_asks_where_it_computes(name: str, asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(huge_pages, "ask", lambda: asked.append(name))
    monkeypatch.setattr(commands, "dispatch", lambda arguments: 0)
    assert commands.main([name]) == 0
    assert bool(asked) == asks


def test_both_frameworks_are_measured_with_them(setting: Path, tmp_path: Path) -> None:
    place = Workplace(tmp_path, "cpu", 1)
    assert place.environment()["GLIBC_TUNABLES"] == HUGE
