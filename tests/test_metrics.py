"""The numbers of a run as it goes: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import command
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from jresnet.errors import InputError
from jresnet.reports import metrics_file
from jresnet.reports.metrics_file import read_metrics
from jresnet.training.metrics import Metrics, WandB


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
                if value.WhichOneof("value") == "simple_value":
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def run(folder: Path, epochs: int, last: int, wandb: WandB | None = None) -> None:
    """A session from after ``epochs`` to ``last``."""
    metrics = Metrics(folder, epochs, wandb)
    for epoch in range(epochs + 1, last + 1):
        metrics.add(row(epoch))
    metrics.close()


def test_the_same_numbers_in_the_file_and_in_tensorboard(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    assert lines(tmp_path) == [row(1), row(2), row(3)]
    found = tensorboard(tmp_path)
    for tag, name in (("loss/train", "train_loss"), ("accuracy/test", "test_accuracy")):
        assert found[tag] == {line["step"]: np.float32(line[name]) for line in lines(tmp_path)}
    assert found.keys() == {"loss/train", "accuracy/test"}


def test_the_losses_of_steps_texts_and_pictures_in_tensorboard(tmp_path: Path) -> None:
    """A session that goes on in the middle of an epoch keeps the steps before it and drops those that are taken again."""
    metrics = Metrics(tmp_path, 0)
    metrics.steps(3, np.array([3.0, 2.0, 1.0], np.float32))
    metrics.steps(5, np.array([np.nan, 0.5]))
    metrics.text("configuration", '{\n "lr": 0.1\n}')
    Image.new("RGB", (4, 3), (255, 0, 0)).save(tmp_path / "x.png")
    metrics.picture("curves", tmp_path / "x.png", 5)
    metrics.close()
    again = Metrics(tmp_path, 0, step=3)
    again.steps(4, np.array([0.75]))
    again.close()
    assert tensorboard(tmp_path)["loss/step"] == {1: 3.0, 2: 2.0, 3: 1.0, 4: 0.75}
    whole = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    for expected in (b"configuration", b'"lr": 0.1', b"pictures/curves", b"\x89PNG"):
        assert expected in whole


def test_without_tensorboardx_a_note_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    metrics = Metrics(tmp_path, 0)
    assert metrics.note
    assert metrics.note.startswith("no TensorBoard files are written")
    metrics.add(row(1))
    metrics.steps(1, np.ones(1))
    metrics.text("a", "b")
    metrics.rewind(1, 10)
    metrics.close()
    assert lines(tmp_path) == [row(1)]
    assert not (tmp_path / "tensorboard").exists()


def test_not_a_number_is_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.add(row(1, test_loss=float("nan"), norms={"conv1": float("inf"), "fc": [1.0, float("-inf")]}, note="x"))
    metrics.close()
    written = row(1, test_loss=None, norms={"conv1": None, "fc": [1.0, None]}, note="x")
    assert lines(tmp_path) == metrics.rows == [written]
    assert tensorboard(tmp_path).keys() == {"loss/train", "accuracy/test"}


def test_a_resumed_run_continues(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    metrics = Metrics(tmp_path, 2)  # killed after the third row and before its checkpoint
    assert metrics.rows == lines(tmp_path) == [row(1), row(2)]
    metrics.add(row(3, train_loss=7.0))
    metrics.close()
    assert lines(tmp_path) == [row(1), row(2), row(3, train_loss=7.0)]
    assert tensorboard(tmp_path)["loss/train"] == {10: 1.0, 20: 0.5, 30: 7.0}


def test_a_run_that_goes_back(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    for epoch in (1, 2, 3):
        metrics.add(row(epoch))
    metrics.rewind(1)
    metrics.add(row(2, train_loss=7.0))
    metrics.close()
    assert lines(tmp_path) == metrics.rows == [row(1), row(2, train_loss=7.0)]
    assert tensorboard(tmp_path)["loss/train"] == {10: 1.0, 20: 7.0}


def test_nothing_of_a_session_without_a_checkpoint_stays(tmp_path: Path) -> None:
    run(tmp_path, 0, 2)
    Metrics(tmp_path, 0).close()
    assert lines(tmp_path) == []
    assert tensorboard(tmp_path)["loss/train"] == {}


def test_killed_in_mid_line(tmp_path: Path) -> None:
    """Wherever the last line ends, the rows before it are there, and it is never taken for a row."""
    run(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    second = len(b"".join(content.splitlines(keepends=True)[:2]))
    for end in range(second, len(content) - 1):
        path.write_bytes(content[:end])
        assert read_metrics(path) == [row(1), row(2)]
        with pytest.raises(
            InputError,
            match=r"metrics\.jsonl has 2 complete lines, but the checkpoint to resume from is after 3 epochs",
        ):
            Metrics(tmp_path, 3)
        assert path.read_bytes() == content[:end]
    run(tmp_path, 2, 3)
    assert path.read_bytes() == content
    path.write_bytes(content[:-1])  # all of the last line but its end
    assert read_metrics(path) == [row(1), row(2), row(3)]


@pytest.mark.parametrize(
    "line", ["{", "null", "[1]", '{"epoch": 1}', '{"epoch": 1.5, "step": 1}', '{"epoch": true, "step": 1}', "[" * 10**5]
)
def test_a_damaged_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row(1))}\n{line}\n{json.dumps(row(3))}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged: line 2 is not a JSON object with whole numbers"):
        Metrics(tmp_path, 2)
    assert Metrics(tmp_path, 1).rows == [row(1)]  # what the checkpoint does not count on is not looked at


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"test_accuracy": "x"}, "invalid value of test_accuracy"),
        ({"test_accuracy": 1.5}, "invalid value of test_accuracy"),
        ({"train_loss": -1, "seconds": [1]}, "invalid value of train_loss, seconds"),
        ({"images_per_second": 10**400}, "invalid value of images_per_second"),
        ({"epoch": 3}, "it is epoch 3, step 20"),
        ({"step": -1}, "it is epoch 2, step -1"),
    ],
)
def test_figures_that_cannot_be(tmp_path: Path, more: dict[str, Any], match: str) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (row(1), row(2) | more)))
    with pytest.raises(InputError, match=rf"metrics\.jsonl is damaged: line 2: {match}"):
        Metrics(tmp_path, 2)


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="it is a folder, a device or a pipe"):
        Metrics(tmp_path, 0)


def test_missing_and_too_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="has 0 complete lines, but the checkpoint to resume from is after 1 epochs"):
        Metrics(tmp_path, 1)
    run(tmp_path, 0, 1)
    monkeypatch.setattr(metrics_file, "LARGEST", 10)
    with pytest.raises(InputError, match="bytes; expected at most 10"):
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


def test_tensorboard_does_not_import_torch() -> None:
    code = "import sys; from jresnet.training import metrics; print(metrics._summary_writer(), 'torch' in sys.modules)"
    done = command("-c", code)
    assert done.stdout == "<class 'tensorboardX.writer.SummaryWriter'> False\n", done.stderr
