"""A task that notes, of each process that it starts to decode, how long it took and the most memory that it held."""

from __future__ import annotations

import functools
import importlib
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from factory import worker


class Measured:
    """A task around another one. Each decode process is a file in `folder`: film, seconds, peak_mb unless ended."""

    def __init__(self, task: Callable[[dict], dict], folder: Path) -> None:
        self._task, self._folder = task, folder

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        run = functools.partial(_timed, worker.run_killable, self._folder, row["uri"])
        with mock.patch.object(worker, "run_killable", run):
            return self._task(row)


def measured(folder: Path) -> list[dict[str, Any]]:
    """What the tasks noted in `folder`: {"film", "seconds", "peak_mb"}; peak_mb is None where the process was ended."""
    return [json.loads(path.read_text()) for path in folder.glob("*.json")]


def weighed(function: str, peak: Path, *args: Any) -> Iterator[Any]:
    """Yield what `function` ("module:name") does; then write the most memory that this process held (MB) to `peak`."""
    module, _, name = function.partition(":")
    try:
        yield from getattr(importlib.import_module(module), name)(*args)
    finally:
        (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        peak.write_text(str(int(kilobytes) * 1024 / 1e6))


def _timed(run: Callable[..., Iterator[Any]], folder: Path, film: str, function: str, *args: Any, **limits: Any) -> Any:
    note, begun = folder / f"{uuid.uuid4().hex}.json", time.monotonic()
    peak = note.with_suffix(".peak")
    try:
        yield from run(f"{__name__}:{weighed.__name__}", function, peak, *args, **limits)
    finally:
        held = float(peak.read_text()) if peak.exists() else None
        found = {"film": Path(film).name, "seconds": time.monotonic() - begun, "peak_mb": held}
        note.write_text(json.dumps(found))
