"""What a run says while it goes: metrics.jsonl, TensorBoard, Weights & Biases, the bar and the lines."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jresnet.errors import InputError
from jresnet.training import metrics as logs
from jresnet.training.metrics import Metrics, Progress, WandB


def row(epoch: int, **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "step": 10 * epoch, "train_loss": 1 / epoch, "test_accuracy": 0.1 * epoch, **more}


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl as a strict reader sees it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    """The scalars by step as TensorBoard shows them: a session's start drops what lies at its step or beyond."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("session_log"):
                found = {name: {s: v for s, v in steps.items() if s < event.step} for name, steps in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def run(folder: Path, epochs: int, last: int, wandb: WandB | None = None) -> None:
    """A session from after ``epochs`` to ``last``."""
    metrics = Metrics(folder, epochs, wandb)
    for epoch in range(epochs + 1, last + 1):
        metrics.add(row(epoch))
    metrics.close()


def test_durations_and_sizes_read_well() -> None:
    durations = {0.2: "0 s", 59.6: "1 min", 95: "1 min 35 s", 3600: "1 h", 3661: "1 h 1 min", 900_000: "10 d 10 h"}
    assert {seconds: logs.duration(seconds) for seconds in durations} == durations
    sizes = {0: "0 MiB", 5 * 2**20: "5 MiB", 2**30 - 1: "1.0 GiB", 1023 * 2**20: "1023 MiB", 80 * 2**30: "80.0 GiB"}
    assert {count: logs.size(count) for count in sizes} == sizes


def test_the_same_numbers_in_the_file_and_in_tensorboard(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    assert lines(tmp_path) == [row(1), row(2), row(3)]
    for name, steps in tensorboard(tmp_path).items():
        assert steps == {line["step"]: np.float32(line[name]) for line in lines(tmp_path)}
    assert tensorboard(tmp_path).keys() == {"train_loss", "test_accuracy"}


def test_not_a_number_is_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.add(row(1, test_loss=float("nan"), norms={"conv1": float("inf"), "fc": [1.0, float("-inf")]}, note="x"))
    metrics.close()
    written = row(1, test_loss=None, norms={"conv1": None, "fc": [1.0, None]}, note="x")
    assert lines(tmp_path) == metrics.rows == [written]
    assert tensorboard(tmp_path).keys() == {"train_loss", "test_accuracy"}


def test_a_resumed_run_continues(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    metrics = Metrics(tmp_path, 2)  # killed after the third row and before its checkpoint
    assert metrics.rows == lines(tmp_path) == [row(1), row(2)]
    metrics.add(row(3, train_loss=7.0))
    metrics.close()
    assert lines(tmp_path) == [row(1), row(2), row(3, train_loss=7.0)]
    assert tensorboard(tmp_path)["train_loss"] == {10: 1.0, 20: 0.5, 30: 7.0}


def test_a_run_that_goes_back(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    for epoch in (1, 2, 3):
        metrics.add(row(epoch))
    metrics.rewind(1)
    metrics.add(row(2, train_loss=7.0))
    metrics.close()
    assert lines(tmp_path) == metrics.rows == [row(1), row(2, train_loss=7.0)]
    assert tensorboard(tmp_path)["train_loss"] == {10: 1.0, 20: 7.0}


def test_nothing_of_a_session_without_a_checkpoint_stays(tmp_path: Path) -> None:
    run(tmp_path, 0, 2)
    Metrics(tmp_path, 0).close()
    assert lines(tmp_path) == []
    assert tensorboard(tmp_path)["train_loss"] == {}


def test_killed_in_mid_line(tmp_path: Path) -> None:
    """Wherever the last line ends, the rows before it are there, and it is never taken for a row."""
    run(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    second = len(b"".join(content.splitlines(keepends=True)[:2]))
    for end in range(second, len(content) - 1):
        path.write_bytes(content[:end])
        assert logs.read_metrics(path) == [row(1), row(2)]
        with pytest.raises(
            InputError, match=r"metrics\.jsonl has 2 whole lines, but 3 epochs are behind the checkpoint"
        ):
            Metrics(tmp_path, 3)
        assert path.read_bytes() == content[:end]
    run(tmp_path, 2, 3)
    assert path.read_bytes() == content
    path.write_bytes(content[:-1])  # all of the last line but its end
    assert logs.read_metrics(path) == [row(1), row(2), row(3)]


@pytest.mark.parametrize(
    "line", ["{", "null", "[1]", '{"epoch": 1}', '{"epoch": 1.5, "step": 1}', '{"epoch": true, "step": 1}', "[" * 10**5]
)
def test_a_damaged_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row(1))}\n{line}\n{json.dumps(row(3))}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged: line 2 is not a JSON object with whole numbers"):
        Metrics(tmp_path, 2)
    assert Metrics(tmp_path, 1).rows == [row(1)]  # what the checkpoint does not count on is not looked at


def test_missing_and_too_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="has 0 whole lines, but 1 epochs"):
        Metrics(tmp_path, 1)
    run(tmp_path, 0, 1)
    monkeypatch.setattr(logs, "LARGEST", 10)
    with pytest.raises(InputError, match="more than 10 bytes"):
        Metrics(tmp_path, 1)


class FakeRun:
    """W&B's run as far as it is used: a step of its own that only grows, kept by its id."""

    def __init__(self, server: dict[str, list], **given: Any):
        self.given, self.rows = given, server.setdefault(given["id"], [])
        self.exit_code: int | None = None

    @property
    def step(self) -> int:
        return self.rows[-1][0] + 1 if self.rows else 0

    def log(self, values: dict[str, Any], step: int, commit: bool) -> None:
        assert commit
        assert step >= self.step, "W&B drops it"
        assert self.exit_code is None, "the run is over"
        self.rows.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """Stands for wandb and its server: the rows of each run by id."""
    rows: dict[str, list] = {}
    module = ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})  # type: ignore[attr-defined]

    def init(**given: Any) -> FakeRun:
        if given["project"] == "refused":
            raise module.Error("No API key configured. Use `wandb login` to log in.")
        return FakeRun(rows, **given)

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return rows


def test_the_same_rows_in_wandb(server: dict[str, list], tmp_path: Path) -> None:
    wandb = WandB("project", "name", {"lr": 0.1}, tmp_path)
    metrics = Metrics(tmp_path, 0, wandb)
    metrics.add(row(1))
    metrics.add(row(2, test_loss=float("nan")))
    metrics.close()
    (run_id,) = server
    assert wandb.run.given == {
        "project": "project", "name": "name", "config": {"lr": 0.1}, "dir": str(tmp_path), "id": run_id, "resume": "allow",
    }  # fmt: skip
    assert server[run_id] == [(10, row(1)), (20, row(2, test_loss=None))]
    assert [values for _, values in server[run_id]] == lines(tmp_path)
    assert wandb.run.exit_code == 0


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(server: dict[str, list], tmp_path: Path) -> None:
    run(tmp_path, 0, 3, WandB("project", "name", {}, tmp_path))
    run(tmp_path, 2, 4, WandB("project", "name", {}, tmp_path))  # the third epoch is trained again
    run(tmp_path / "", 4, 4, WandB("project", "name", {}, tmp_path))
    (rows,) = server.values()
    assert [values for _, values in rows] == lines(tmp_path) == [row(epoch) for epoch in (1, 2, 3, 4)]
    other = tmp_path / "other"
    other.mkdir()
    run(other, 0, 1, WandB("project", "name", {}, other))
    assert len(server) == 2


def test_wandb_hears_how_the_run_ended(server: dict[str, list], tmp_path: Path) -> None:
    wandb = WandB("project", "name", {}, tmp_path)
    with contextlib.suppress(KeyError), contextlib.ExitStack() as stack:
        metrics = Metrics(tmp_path, 0, wandb)
        stack.callback(lambda: metrics.close())
        metrics.rewind(0)
        metrics.add(row(1))  # its run goes on
        raise KeyError
    assert wandb.run.exit_code == 1


def test_wandb_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install --upgrade wandb"):
        WandB("project", "name", {}, tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # W&B's own folder wandb/, taken for a package
    with pytest.raises(InputError, match="pip install --upgrade wandb"):
        WandB("project", "name", {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_wandb_refuses(server: dict[str, list], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No API key configured.*WANDB_MODE=offline"):
        WandB("refused", "name", {}, tmp_path)
    for damaged in (b"", b"a/b", b"\xff", b"x" * 65):
        (tmp_path / "wandb-id").write_bytes(damaged)
        with pytest.raises(InputError, match="wandb-id is not the id of a run"):
            WandB("project", "name", {}, tmp_path)


FIGURES = (0.25, 0.456, 21345.6, 86000, 0.02134, 3 * 2**30)


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(logs.time, "monotonic", lambda: clock.now)
    stream = io.StringIO()
    progress = Progress(stream, memory="host memory")
    progress.begin(2, 9, 100, 0)
    printed = []
    for now in (59, 61, 120, 122):
        clock.now = now
        progress.step()
        progress.show(*FIGURES)
        printed.append(len(stream.getvalue().splitlines()))
    assert printed == [0, 1, 1, 2]
    progress.show(*FIGURES[:4])
    progress.end()
    progress.say("the end")
    line = (
        "epoch 2/9: loss 0.2500, accuracy 45.6 %, 21346 images/s, 0.021 epochs/s, 23 h 53 min left, host memory 3.0 GiB"
    )
    assert stream.getvalue().splitlines() == [line, line, "the end"]
    clock.now = 300
    progress.show(*FIGURES[:4])
    assert stream.getvalue().splitlines()[3] == line.split(", 0.021")[0] + ", 23 h 53 min left"


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
        progress = Progress(terminal)
        progress.begin(100, 200, 50_000, 0)
        content = ""
        for _ in range(5):
            progress.step(10_000)
            progress.show(*FIGURES)
            content += terminal.drawn()
        progress.say("a line above")
        content += terminal.drawn()
        assert max(map(len, re.split(r"[\r\n]+|\x1b\[A", content))) <= columns
        above, bar, figures = screen(content)
        assert above == "a line above"
        assert bar.startswith("epoch 100/200: 100%|")
        assert figures == "loss 0.2500, accuracy 45.6 %, 21346 images/s, 0.021 epochs/s"[: columns - 1]
        if columns >= 80:
            assert bar.endswith("| 50000/50000, 23 h 53 min left, device memory 3.0 GiB")
        progress.end()
        content += terminal.drawn()
        assert screen(content) == ["a line above"]
        progress.say("and one below")
        assert screen(content + terminal.drawn()) == ["a line above", "and one below"]


def test_quiet_prints_nothing() -> None:
    with Terminal(80) as terminal:
        for stream in (terminal, io.StringIO()):
            progress = Progress(stream, quiet=True)
            progress.say("x")
            progress.begin(1, 2, 3, 0)
            progress.last -= 100
            progress.step()
            progress.show(*FIGURES)
            progress.end()
        assert terminal.drawn() == stream.getvalue() == ""


def test_the_devices_memory() -> None:
    def device(platform: str, stats: dict | None) -> SimpleNamespace:
        return SimpleNamespace(platform=platform, memory_stats=lambda: stats)

    assert logs.device_memory(device("gpu", {"bytes_in_use": 5, "bytes_limit": 9})) == 5
    assert logs.device_memory(device("tpu", None)) is None
    held = np.ones(2**24)  # 128 MiB that are touched
    with_it = logs.device_memory(jax.devices("cpu")[0])
    assert with_it is not None
    assert with_it > held.nbytes


def test_host_memory_is_unknown_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert logs.device_memory(SimpleNamespace(platform="cpu", memory_stats=lambda: None)) is None
