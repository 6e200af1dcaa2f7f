"""A generator run in a process of its own that can be killed from outside.

A video library can spin for ever while it holds the GIL, so a deadline inside the process would never fire; and a small
file can unpack to any amount of memory. What goes wrong is told by whose fault it is: the input's, or the machine's.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.01  # between two looks at the process
_MEMORY_SHARE = 0.95  # of its limit: a process that holds this much is ended, as it may take more until the next look
# Signals by which a process ends that did something wrong itself: a library that fails over its input.
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)

ATTEMPTS = 3  # at work whose process the machine failed


class WorkerFailed(RuntimeError):
    """The input's fault, the generator raised or crashed: with the same input it would again."""


class WorkerEnded(WorkerFailed):
    """The process went beyond its limits and was ended: with other limits it might not."""


class WorkerLost(RuntimeError):
    """The machine's fault, the process was killed or lacked something: tried again, it may work."""


def run_killable(function: str, *args: Any, deadline_seconds: float, memory_limit_mb: int) -> Iterator[Any]:
    """Yield what the generator `function` ("module:name") yields for `args`, from a process of its own.

    Raises WorkerFailed with the generator's own words, or when it crashed; WorkerEnded when it was not done in time or
    held 95 % of the memory (resident, MB of 10^6 bytes) that it may; WorkerLost when the process was killed by another,
    and for an OSError, ImportError or MemoryError in it. What was yielded before stays good.
    """
    ours, theirs = Pipe()
    with tempfile.TemporaryFile() as words:
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "factory.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            )
        except OSError as error:
            raise WorkerLost(f"no process could be started: {error.strerror}") from error
        finally:
            theirs.close()
        watch = _Watch(child, deadline_seconds, memory_limit_mb)
        watch.start()
        try:
            with contextlib.suppress(ConnectionError):  # a child that died at once is reported below
                ours.send((function, args))
            while True:
                try:
                    kind, value = ours.recv()
                except (EOFError, OSError):  # the process ended, be it in the midst of a row
                    watch.stop()
                    code = child.wait()
                    words.seek(0)
                    last = words.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
                    if watch.reason:
                        raise WorkerEnded(watch.reason) from None
                    if -code in _CRASHES:
                        raise WorkerFailed(f"the process crashed ({signal.strsignal(-code)}): {last[0]}") from None
                    raise WorkerLost(_how_it_ended(code, last[0])) from None
                if kind == "end":
                    return
                if kind == "error":
                    raise WorkerFailed(value)
                if kind == "machine":
                    raise WorkerLost(value)
                with watch.paused():  # what the caller does with it is not the generator's time
                    yield value
        finally:
            watch.stop()
            child.kill()
            child.wait()
            ours.close()


def run_for_each(
    function: str,
    items: list[Any],
    *args: Any,
    deadline_seconds: float,
    seconds: list[float],
    memory_limit_mb: int,
) -> list[Any]:
    """Return what the generator `function` yields for (items, *args), one answer per item in order, from one process.

    Where the process ends or fails, the item that it was at is tried alone: its WorkerFailed or WorkerLost takes the
    answer's place, and the others go on. A process may take `deadline_seconds`, and of its items the `seconds` each.
    """
    answers: list[Any] = []

    def take(end: int) -> WorkerFailed | WorkerLost | None:
        """Append the answers of the next items, those before `end`; return why not of all."""
        start = len(answers)
        limit = deadline_seconds + sum(seconds[start:end])
        try:
            for answer in run_killable(
                function, items[start:end], *args, deadline_seconds=limit, memory_limit_mb=memory_limit_mb
            ):
                answers.append(answer)
        except (WorkerFailed, WorkerLost) as error:
            return error
        return None

    while len(answers) < len(items):
        if take(len(items)) is None or len(answers) == len(items):
            break
        at = len(answers)
        failure: WorkerFailed | WorkerLost | None = None
        for _ in range(ATTEMPTS):
            failure = take(at + 1)
            if not isinstance(failure, WorkerLost):
                break
        if len(answers) == at:
            answers.append(failure)
    return answers


def _how_it_ended(code: int, last: str) -> str:
    if code == -signal.SIGKILL:
        return (
            "the process was killed from outside (SIGKILL). Where the machine is short of memory, let fewer run at "
            "once: --set num_cpus=2"
        )
    return f"the process ended with code {code}: {last}"


class _Watch(threading.Thread):
    """Ends a process that takes too long or too much memory; `reason` says which.

    Memory is what is resident: limits of address space (RLIMIT_AS, RLIMIT_DATA) would count what libraries reserve and
    never touch, and end a decoder in the midst of its own code with any message or none.
    """

    def __init__(self, child: subprocess.Popen[bytes], deadline_seconds: float, memory_limit_mb: int) -> None:
        super().__init__(daemon=True)
        self._child, self._deadline, self._limit = child, deadline_seconds, memory_limit_mb
        self._end = time.monotonic() + deadline_seconds
        self._paused = False
        self._stopped = threading.Event()
        self.reason = ""

    def run(self) -> None:
        while not self.reason and not self._stopped.wait(_POLL_SECONDS):
            resident = _resident_mb(self._child.pid)
            if resident > _MEMORY_SHARE * self._limit:
                self.reason = (
                    f"held {resident:.0f} MB of memory, 95 % of video.memory_limit_mb={self._limit} or more: the "
                    f"process was ended. Allow it more: --set video.memory_limit_mb={2 * self._limit}"
                )
            elif not self._paused and time.monotonic() > self._end:
                self.reason = (
                    f"not finished after {self._deadline:g} s: the process was ended. Allow it more: "
                    f"--set video.deadline_seconds={2 * self._deadline:g}"
                )
        if self.reason:
            self._child.kill()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let the time within the block not count."""
        begun = time.monotonic()
        self._paused = True
        yield
        self._end += time.monotonic() - begun
        self._paused = False

    def stop(self) -> None:
        """Look no more: from here on the process's number may be another's."""
        self._stopped.set()
        self.join()


def _resident_mb(pid: int) -> float:
    """Return the memory that the process holds, in MB of 10^6 bytes; 0 when it has ended."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


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
        connection.send(("machine" if is_of_machine(error) else "error", message))
    else:
        connection.send(("end", None))


def is_of_machine(error: Exception) -> bool:
    """Return whether `error` says something of the machine. FFmpeg's never do: PyAV's are OSErrors at times, and what
    they tell is that the file is damaged."""
    return isinstance(error, OSError | ImportError | MemoryError) and type(error).__module__ != "av.error"


if __name__ == "__main__":
    _main(int(sys.argv[1]))
