"""What kill tests put in place of the factory's tasks: some note their runs, some are killed once at a named point."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from factory import store, tasks, worker


class Noted:
    """A task that notes each run in `folder`."""

    def __init__(self, task: Callable[[dict], dict], folder: Path) -> None:
        self._task, self._folder = task, folder

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with open(self._folder / "runs", "a") as file:
            file.write(f"{type(self._task).__name__} {sorted(row.items())}\n")
        return self._run(row)

    def _run(self, row: dict[str, Any]) -> dict[str, Any]:
        return self._task(row)


class KilledOnce(Noted):
    """A task that is killed once, at `point` of its first run: the first over a row that holds `word`."""

    def __init__(self, task: Callable[[dict], dict], point: str, folder: Path, word: str = "") -> None:
        super().__init__(task, folder)
        self._point, self._word = point, word

    def _run(self, row: dict[str, Any]) -> dict[str, Any]:
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


def noted_tasks(folder: Path) -> SimpleNamespace:
    """The factory's tasks, which note each run in `folder`."""

    def noted(task: Callable[..., Callable[[dict], dict]]) -> Callable[..., Noted]:
        return lambda *arguments: Noted(task(*arguments), folder)

    return SimpleNamespace(**{**vars(tasks), **{name: noted(getattr(tasks, name)) for name in NAMES}})


def runs(folder: Path) -> list[str]:
    """All runs noted in `folder`, in order: task and input. What was run again is there twice."""
    return (folder / "runs").read_text().splitlines()


NAMES = ("DecodeSegment", "AppendSamples", "DrawSketches", "WriteCaptions")


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

    def run_killed(function: str, *args: Any, **limits: Any) -> Iterator[Any]:
        if not left[0]:
            return run(function, *args, **limits)
        left[0] -= 1
        return run(f"{__name__}:_killed_after_its_first_row", function, *args, **limits)

    return mock.patch.object(worker, "run_killable", run_killed)


def _killed_after_its_first_row(function: str, *args: Any) -> Iterator[Any]:
    module, _, name = function.partition(":")
    for row in getattr(importlib.import_module(module), name)(*args):
        yield row
        die()


def _at_the_first_row() -> Any:
    run = worker.run_killable

    def run_and_die(*args: Any, **more: Any) -> Iterator[Any]:
        for _ in run(*args, **more):
            die()
        yield

    return mock.patch.object(worker, "run_killable", run_and_die)


_POINTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "at its first candidate": _at_the_first_row,
    "mid-unit": _at_the_second_picture,
    "before the ledger": _before_the_ledger,
    "the decoder, once": functools.partial(_the_decoder_after_its_first_row, 1),
    "the decoder, at each attempt": _the_decoder_after_its_first_row,
}
