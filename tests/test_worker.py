"""The killable worker: its deadline and its memory limit hold whatever the process does."""

from __future__ import annotations

import os
import re
import signal
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from factory import worker


def run(function: str, *args: object, deadline_seconds: float = 30, memory_limit_mb: int = 4000) -> tuple[list, str]:
    """What came before the failure, and the failure's words."""
    rows: list = []
    try:
        for row in worker.run_killable(
            function, *args, deadline_seconds=deadline_seconds, memory_limit_mb=memory_limit_mb
        ):
            rows.append(row)
    except worker.WorkerFailed as error:
        return rows, str(error)
    return rows, ""


def test_a_generator_runs_to_its_end() -> None:
    assert run(f"{__name__}:_counts", 3) == ([0, 1, 2], "")


def test_a_worker_that_hangs_is_ended_and_what_it_gave_stays() -> None:
    start = time.monotonic()
    with ThreadPoolExecutor() as pool:  # side by side: each takes its whole deadline
        hanging = [f"{__name__}:{name}" for name in ("_spins", "_stops", "_stops_within_a_row")]
        for rows, error in pool.map(lambda name: run(name, deadline_seconds=8), hanging):
            assert rows == [1, 2]
            assert "not finished after 8 s" in error
            assert "video.deadline_seconds" in error
    assert time.monotonic() - start < 16


def test_a_worker_that_takes_memory_is_ended_and_what_it_gave_stays() -> None:
    start = time.monotonic()
    rows, error = run(f"{__name__}:_takes_memory", memory_limit_mb=300)
    assert 0 < len(rows) < 30
    assert re.match(r"held \d+ MB of memory, more than video.memory_limit_mb=300", error)
    held = int(error.split()[1])
    assert 300 < held < 1500
    assert time.monotonic() - start < 20


def test_death_and_exceptions_are_told_apart() -> None:
    with pytest.raises(worker.WorkerEnded, match="code -9"):
        list(worker.run_killable(f"{__name__}:_dies", deadline_seconds=30, memory_limit_mb=4000))
    with pytest.raises(worker.WorkerFailed, match="a reason") as caught:
        list(worker.run_killable(f"{__name__}:_raises", deadline_seconds=30, memory_limit_mb=4000))
    assert not isinstance(caught.value, worker.WorkerEnded)


def _counts(count: int):
    yield from range(count)


def _spins():
    yield 1
    yield 2
    # one call that never returns and never lets go of the GIL
    re.match(r"(a+)+$", "a" * 64 + "b")


def _stops():
    yield 1
    yield 2
    os.kill(os.getpid(), signal.SIGSTOP)


def _stops_within_a_row():
    yield 1
    yield 2
    os.write(int(sys.argv[1]), struct.pack("!i", 1000))  # a row of 1,000 bytes that never come
    os.kill(os.getpid(), signal.SIGSTOP)


def _takes_memory():
    held = []
    for i in range(100):
        held.append(bytearray(os.urandom(1_000_000)) * 50)
        time.sleep(0.02)
        yield i


def _dies():
    yield 1
    os.kill(os.getpid(), 9)


def _raises():
    yield 1
    raise ValueError("a reason")
