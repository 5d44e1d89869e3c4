"""Handles Ctrl-C and SIGTERM between two steps."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupted(Exception):
    """A signal ended the run early, after its state was saved; the first argument is the number of the signal."""


class StopRequest:
    """Records Ctrl-C and SIGTERM, for the training loop to check; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __call__(self) -> bool:
        return self.signal is not None
