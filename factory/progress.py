"""Progress of a stage, as lines on standard output."""

from __future__ import annotations

import time


class Progress:
    """Lines of progress on standard output, at most one every two seconds."""

    def __init__(self, stage: str, noun: str, total: int) -> None:
        self._stage, self._noun, self._total = stage, noun, total
        self._done = self._rows = 0
        self._start = self._said = time.monotonic()
        if total == 0:
            print(f"{stage:<8} nothing to do", flush=True)

    def step(self, rows: int = 0) -> None:
        """Count one unit done, with so many rows."""
        self._done += 1
        self._rows += rows
        now = time.monotonic()
        if now - self._said > 2 or self._done == self._total:
            self._said = now
            spent = now - self._start
            left = spent / self._done * (self._total - self._done)
            count = f"{self._done}/{self._total} {self._noun}" + (f"  {self._rows} rows" if self._rows else "")
            print(f"{self._stage:<8} {count}  {spent:.0f} s, {left:.0f} s left", flush=True)
