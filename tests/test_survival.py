"""Runs that are killed (SIGKILL) again and again, and end where an undisturbed one does, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY

from jresnet.weights import native

COMMAND = (
    sys.executable, "-u", "scripts/train_cifar10.py", "--depth", "8", "--dataset", "digits", "--limit-train", "64",
    "--limit-test", "40", "--batch-size", "16", "--checkpoint-minutes", "0.02", "--resume",
)  # fmt: skip
PATIENCE = 300  # seconds until what a session should do counts as hanging
SAME = ("epoch", "step", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy")


class Session:
    """One start of the command, whose output goes to a file."""

    def __init__(self, out: Path, epochs: int, cache: Path, log: Path):
        self.out, self.log = out, log
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*COMMAND, "--epochs", str(epochs), "--out", str(out)],
                cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits, and looks often enough for a save to be caught half-way."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended too early:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"nothing happens:\n{self.log.read_text()}"
            time.sleep(0.001)

    def says(self, word: str, times: int = 1) -> bool:
        """Whether at least so many lines begin with the word."""
        return f"\n{self.log.read_text()}".count(f"\n{word}") >= times

    def names(self) -> set[str]:
        """What is in the folder of the checkpoints."""
        folder = self.out / "checkpoints"
        return {path.name for path in folder.iterdir()} if folder.exists() else set()

    def saving(self) -> bool:
        return any(name.startswith(".") for name in self.names())

    def steps(self) -> list[int]:
        """Of the checkpoints that are there."""
        return [int(name.removesuffix(".safetensors")) for name in self.names() if name[0].isdigit()]


def during_startup(session: Session, draw: random.Random) -> None:
    """Anywhere between the first line and some step."""
    session.until(lambda: session.says("device"))
    time.sleep(draw.uniform(0, 3))


def after_some_steps(session: Session, draw: random.Random) -> None:
    """An epoch begins when the line on the one before is written."""
    _into_an_epoch(session, draw.uniform(0.05, 0.6))


def during_evaluation(session: Session, draw: random.Random) -> None:
    """An epoch's last part."""
    _into_an_epoch(session, draw.uniform(0.7, 0.95))


def _into_an_epoch(session: Session, share: float) -> None:
    session.until(lambda: session.says("epoch"))
    began = time.monotonic()
    session.until(lambda: session.says("epoch", 2))
    time.sleep(share * (time.monotonic() - began))


def between_the_row_and_the_checkpoint(session: Session, draw: random.Random) -> None:
    """Evaluated, the row in metrics.jsonl, the checkpoint of the epoch not begun or not whole."""
    rows = session.out / "metrics.jsonl"
    session.until(lambda: session.says("epoch"))
    before = rows.stat().st_size
    session.until(lambda: rows.stat().st_size > before)
    time.sleep(draw.uniform(0, 0.005))


def during_a_save(session: Session, draw: random.Random) -> None:
    """The temporary file is there."""
    session.until(lambda: session.says("compiled"))
    for _ in range(draw.randrange(1, 3)):
        session.until(lambda: not session.saving())
        session.until(session.saving)
    time.sleep(draw.uniform(0, 0.03))


def at_the_end_of_a_save(session: Session, draw: random.Random) -> None:
    """The new checkpoint is there; the one that it replaces is being deleted."""
    session.until(lambda: session.says("compiled"))
    before = session.names()
    session.until(lambda: any(name[0].isdigit() for name in session.names() - before))
    time.sleep(draw.uniform(0, 0.003))


MOMENTS = (
    during_a_save,
    during_evaluation,
    between_the_row_and_the_checkpoint,
    during_startup,
    after_some_steps,
    at_the_end_of_a_save,
)


def survive(folder: Path, kills: int, epochs: int) -> list[str]:
    """Kills a run ``kills`` times and lets it end; returns a line on each kill.

    Raises:
        AssertionError: where it ends elsewhere than the undisturbed one; the message tells the seed and the kills.
    """
    seed = kills
    draw, story = random.Random(seed), [f"seed {seed}"]
    cache, killed, whole = folder / "cache", folder / "killed", folder / "whole"
    # What other tests have compiled; a copy, since a killed process may leave half of a file.
    shutil.copytree(os.environ["JAX_COMPILATION_CACHE_DIR"], cache)
    assert Session(whole, epochs, cache, folder / "whole.log").process.wait(3 * PATIENCE) == 0
    reached = 0
    for kill in range(kills):
        moment = MOMENTS[kill % len(MOMENTS)]
        session = Session(killed, epochs, cache, folder / f"{kill}.log")
        try:
            moment(session, draw)
        finally:
            session.process.kill()
        assert session.process.wait() == -signal.SIGKILL, story  # it was under way
        text = session.log.read_text()
        assert "Traceback" not in text, (story, text)
        assert "damaged" not in text, (story, text)
        rows = killed / "metrics.jsonl"
        written = len(rows.read_text().splitlines()) if rows.exists() else 0
        story.append(f"{moment.__name__}: {written} rows, {', '.join(sorted(session.names())) or 'no checkpoint'}")
        assert max(session.steps(), default=0) >= reached, story  # none is lost
        reached = max(session.steps(), default=0)
    session = Session(killed, epochs, cache, folder / "last.log")
    assert session.process.wait(3 * PATIENCE) == 0, (story, session.log.read_text())
    resumed = f"resumed  at step {reached:,} of" if reached else "resumed  nothing"
    assert resumed in session.log.read_text(), (story, session.log.read_text())

    for name in ("last.safetensors", "best.safetensors"):
        expected, found = native.read(whole / name)[2], native.read(killed / name)[2]
        different = [key for key in expected if expected[key].tobytes() != found[key].tobytes()]
        assert not different, (story, name, different)
    expected_rows, found_rows = (
        [[json.loads(line)[key] for key in SAME] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (whole, killed)
    )
    assert [row[0] for row in found_rows] == list(range(1, epochs + 1)), story
    assert found_rows == expected_rows, story
    # Nothing half-written is left, and not more than the newest three and the best.
    assert len(session.steps()) == len(session.names()), (story, session.names())
    assert not [path.name for path in killed.iterdir() if path.name.startswith(".")], story
    assert len(session.names()) <= 4, (story, session.names())
    return story


@pytest.mark.slow
def test_a_run_that_is_killed_twice(tmp_path: Path) -> None:
    print("\n".join(survive(tmp_path, kills=2, epochs=6)))


@pytest.mark.long
def test_a_run_that_is_killed_twenty_times(tmp_path: Path) -> None:
    story = survive(tmp_path, kills=20, epochs=60)
    print("\n".join(story))
    assert any(", ." in line for line in story), story  # at least one save was caught half-way
