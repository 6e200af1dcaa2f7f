"""Tasks whose process is killed once, at a named point: what the kill tests put in place of the factory's own."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from factory import store, tasks, worker


class KilledOnce:
    """A task that is killed once, at `point` of its first run, and notes each run in `folder`.

    Its first run is the first over a row that holds `word`.
    """

    def __init__(self, task: Callable[[dict], dict], point: str, folder: Path, word: str = "") -> None:
        self._task, self._point, self._folder, self._word = task, point, folder, word

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with open(self._folder / "runs", "a") as file:
            file.write(f"{sorted(row.items())}\n")
        if self._word not in str(row):
            return self._task(row)
        try:
            (self._folder / "killed").touch(exist_ok=False)
        except FileExistsError:
            return self._task(row)
        if self._point == "at the start":
            die()
        with _POINTS.get(self._point, contextlib.nullcontext)():
            answer = self._task(row)
        if self._point == "before the answer":
            die()
        return answer


def runs(folder: Path) -> list[str]:
    """The inputs of all runs of the KilledOnce of `folder`, in order; an input that was run again is there twice."""
    return (folder / "runs").read_text().splitlines()


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_the_second_picture() -> Any:
    decode, seen = tasks.decode_image, []

    def decode_or_die(data: bytes) -> Any:
        seen.append(data)
        return die() if len(seen) == 2 else decode(data)

    return mock.patch.object(tasks, "decode_image", decode_or_die)


def _before_the_ledger() -> Any:
    write = store.write_atomic
    return mock.patch.object(
        store, "write_atomic", lambda path, data: die() if "_ledger" in Path(path).parts else write(path, data)
    )


def _the_decoder_after_its_first_row(times: int = 1000) -> Any:
    run, left = worker.run_killable, [times]

    def run_and_kill(*args: Any, **more: Any) -> Iterator[Any]:
        for row in run(*args, **more):
            yield row
            for child in psutil.Process().children() if left[0] else ():
                if "factory.worker" in child.cmdline():
                    left[0] -= 1
                    child.kill()

    return mock.patch.object(worker, "run_killable", run_and_kill)


_POINTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "mid-unit": _at_the_second_picture,
    "before the ledger": _before_the_ledger,
    "the decoder, once": functools.partial(_the_decoder_after_its_first_row, 1),
    "the decoder, at each attempt": _the_decoder_after_its_first_row,
}
