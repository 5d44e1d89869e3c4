"""What a run prints to a person: the bar, the lines, durations and sizes."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jresnet.reports import metrics_file
from jresnet.training import console
from jresnet.training.config import default_config
from jresnet.training.console import Console


def test_durations_and_sizes_read_well() -> None:
    durations = {0.2: "0 s", 59.6: "1 min", 95: "1 min 35 s", 3600: "1 h", 3661: "1 h 1 min", 900_000: "10 d 10 h"}
    assert {seconds: metrics_file.duration(seconds) for seconds in durations} == durations
    sizes = {0: "0 MiB", 5 * 2**20: "5 MiB", 2**30 - 1: "1.0 GiB", 1023 * 2**20: "1023 MiB", 80 * 2**30: "80.0 GiB"}
    assert {count: console.size(count) for count in sizes} == sizes


FIGURES = (0.25, 0.456, 21345.6, 86000, 0.02134, 3 * 2**30)


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: clock.now)
    stream = io.StringIO()
    shown = Console(stream, memory="host memory")
    shown.begin(2, 9, 100, 0)
    printed = []
    for now in (59, 61, 120, 122):
        clock.now = now
        shown.step()
        shown.show(*FIGURES)
        printed.append(len(stream.getvalue().splitlines()))
    assert printed == [0, 2, 2, 4]  # a line in two of 80 columns
    shown.show(*FIGURES[:4])
    shown.end()
    shown.say("the end")
    line = (
        "epoch 2/9: loss 0.2500, accuracy 45.6 %, 21346 images/s, 0.021 epochs/s, 23 h 53 min left, host memory 3.0 GiB"
    )
    lines = console.wrapped(line, 80).split("\n")
    assert stream.getvalue().splitlines() == [*lines, *lines, "the end"]
    assert lines[0] == line[: line.index(" 23 h")]  # after a comma
    clock.now = 300
    shown.show(*FIGURES[:4])
    again = stream.getvalue().split("the end\n")[1]
    assert " ".join(again.split()) == line.split(", 0.021")[0] + ", 23 h 53 min left"


@given(st.text("ab ,;", max_size=300), st.integers(20, 90))
def test_lines_break_between_words(text: str, width: int) -> None:
    text = "title    " + text
    lines = console.wrapped(text, width).split("\n")
    assert " ".join(text.split()) == " ".join(" ".join(lines).split())
    for number, line in enumerate(lines):
        assert len(line) <= width or " " not in line[console.INDENT :].strip()
        assert not number or line.startswith(" " * console.INDENT)


def test_advice_never_repeats_what_was_chosen() -> None:

    def said(parameters: int = 21_282_122, **changes: Any) -> str:
        program: Any = SimpleNamespace(devices=SimpleNamespace(platform="cpu"), parameters=parameters)
        pace: Any = SimpleNamespace(step_seconds=1.0)
        return " ".join(console.estimate(default_config(**changes), program, pace, 4000))

    words = ("depth 20", "fewer epochs", "fewer training images", "digits")
    assert all(word in said() for word in words)
    least = said(269_722, arch="resnet20_cifar", epochs=1, limit_train=9, dataset="digits", batch_size=4)
    assert not any(word in least for word in words)
    assert "a GPU" in least
    assert "the digits instead of cifar100" in said(dataset="cifar100")


def test_few_steps_are_told() -> None:
    chosen = default_config(recipe="fast", dataset="digits")
    (told,) = console._few_steps(chosen, 16)
    assert told.startswith("note     16 steps in total are too few for recipe fast")
    assert "training images" not in told
    assert console._few_steps(chosen, 176) == []  # the digits' own number
    assert "more epochs or training images" in console._few_steps(default_config(limit_train=320), 16)[0]


class Terminal(io.TextIOWrapper):
    """A terminal of ``columns``; what is written to it comes out of :meth:`drawn`."""

    def __init__(self, columns: int):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self.master, False)
        super().__init__(io.FileIO(slave, "w"), encoding="utf-8", write_through=True)

    def drawn(self) -> str:
        self.flush()
        content = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.master, 65536):
                content += part
        return content.decode()

    def close(self) -> None:
        super().close()
        with contextlib.suppress(OSError):
            os.close(self.master)


def screen(content: str) -> list[str]:
    """The lines that stand on a terminal in the end."""
    lines, at, column = [""], 0, 0
    for part in re.split(r"(\r|\n|\x1b\[A)", content):
        if part == "\r":
            column = 0
        elif part == "\n":
            at += 1
            lines += [""] * (at == len(lines))
        elif part == "\x1b[A":
            at -= 1
        else:
            assert "\x1b" not in part
            before = lines[at].ljust(column)
            lines[at] = before[:column] + part + before[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_bar_fits_the_terminal(columns: int) -> None:
    with Terminal(columns) as terminal:
        shown = Console(terminal)
        shown.begin(100, 200, 50_000, 0)
        content = ""
        for _ in range(5):
            shown.step(10_000)
            shown.show(*FIGURES)
            content += terminal.drawn()
        shown.say("a line above")
        content += terminal.drawn()
        assert max(map(len, re.split(r"[\r\n]+|\x1b\[A", content))) <= columns
        above, bar, figures = screen(content)
        assert above == "a line above"
        assert bar.startswith("epoch 100/200: 100%|")
        assert figures == "loss 0.2500, accuracy 45.6 %, 21346 images/s, 0.021 epochs/s"[: columns - 1]
        if columns >= 80:
            assert bar.endswith("| 50000/50000, 23 h 53 min left, device memory 3.0 GiB")
        shown.end()
        content += terminal.drawn()
        assert screen(content) == ["a line above"]
        shown.say("and one below")
        assert screen(content + terminal.drawn()) == ["a line above", "and one below"]


def test_quiet_prints_nothing() -> None:
    with Terminal(80) as terminal:
        for stream in (terminal, io.StringIO()):
            shown = Console(stream, quiet=True)
            shown.say("x")
            shown.begin(1, 2, 3, 0)
            shown.last -= 100
            shown.step()
            shown.show(*FIGURES)
            shown.end()
        assert terminal.drawn() == stream.getvalue() == ""


def test_the_devices_memory() -> None:
    def device(platform: str, stats: dict | None) -> SimpleNamespace:
        return SimpleNamespace(platform=platform, memory_stats=lambda: stats)

    assert console.device_memory(device("gpu", {"bytes_in_use": 5, "bytes_limit": 9})) == 5
    assert console.device_memory(device("tpu", None)) is None
    held = np.ones(2**24)  # 128 MiB that are touched
    with_it = console.device_memory(jax.devices("cpu")[0])
    assert with_it is not None
    assert with_it > held.nbytes


def test_host_memory_is_unknown_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert console.device_memory(SimpleNamespace(platform="cpu", memory_stats=lambda: None)) is None


def test_a_closed_pipe_ends_the_lines_and_not_the_run() -> None:
    """As where the output goes to ``head``."""
    read, write = os.pipe()
    os.close(read)
    with contextlib.suppress(BrokenPipeError), os.fdopen(write, "w") as stream:
        shown = Console(stream)
        shown.say("one")
        shown.say("two")
        assert shown.quiet


def test_a_process_without_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    shown = Console()
    shown.begin(1, 2, 3, 0)
    shown.step()
    shown.say("nobody hears it")
    shown.end()
