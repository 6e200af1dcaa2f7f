"""A generator run in a process of its own that can be killed from outside.

A video library can spin for ever while it holds the GIL, so a deadline inside the process would never fire.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any

_PR_SET_PDEATHSIG = 1


class WorkerFailed(RuntimeError):
    """The generator raised: with the same input it would again."""


class WorkerEnded(WorkerFailed):
    """The process died or took longer than its deadline: on a less busy machine it might not."""


def run_killable(function: str, *args: Any, deadline_seconds: float) -> Iterator[Any]:
    """Yield what the generator `function` ("module:name") yields for `args`, from a process of its own.

    Raises WorkerFailed with the generator's own words, WorkerEnded when the process died or was not done in time.
    What was yielded before stays good.
    """
    ours, theirs = Pipe()
    end = time.monotonic() + deadline_seconds
    with tempfile.TemporaryFile() as words:
        child = subprocess.Popen(
            [sys.executable, "-m", "factory.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        )
        theirs.close()
        try:
            with contextlib.suppress(ConnectionError):  # a child that died at once is reported below
                ours.send((function, args))
            while True:
                if not ours.poll(max(0.0, end - time.monotonic())):
                    raise WorkerEnded(f"not finished after {deadline_seconds:g} s: the process was ended")
                try:
                    kind, value = ours.recv()
                except (EOFError, ConnectionError):
                    code = child.wait()
                    words.seek(0)
                    last = words.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
                    raise WorkerEnded(f"the process ended with code {code}: {last[0]}") from None
                if kind == "end":
                    return
                if kind == "error":
                    raise WorkerFailed(value)
                yield value
        finally:
            child.kill()
            child.wait()
            ours.close()


def _main(fd: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlive the one who asked
    connection = Connection(fd)
    function, args = connection.recv()
    module, _, name = function.partition(":")
    try:
        for value in getattr(importlib.import_module(module), name)(*args):
            connection.send(("row", value))
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        connection.send(("error", message))
    else:
        connection.send(("end", None))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
