"""The killable worker: its deadline and its memory limit hold whatever the process does."""

from __future__ import annotations

import builtins
import errno
import os
import re
import signal
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
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
        hanging = [f"{__name__}:{name}" for name in ("_spins", "_stops", "_stops_within_a_row", "_stops_before_a_row")]
        for rows, error in pool.map(lambda name: run(name, deadline_seconds=8), hanging):
            assert rows == [1, 2]
            assert "not finished after 8 s" in error
            assert "video.deadline_seconds" in error
    assert time.monotonic() - start < 16


def test_the_callers_time_is_not_the_workers() -> None:
    found = []
    for row in worker.run_killable(f"{__name__}:_waits_for_its_reader", deadline_seconds=4, memory_limit_mb=4000):
        found.append(len(row))
        time.sleep(1.5)
    assert found == [1 << 20] * 4


def test_a_machine_that_starts_no_process_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(worker.subprocess, "Popen", no_process)
    with pytest.raises(worker.WorkerLost, match="no process could be started: Resource temporarily"):
        list(worker.run_killable(f"{__name__}:_counts", 3, deadline_seconds=4, memory_limit_mb=4000))


def test_a_worker_that_takes_memory_is_ended_and_what_it_gave_stays() -> None:
    start = time.monotonic()
    rows, error = run(f"{__name__}:_takes_memory", memory_limit_mb=300)
    assert 0 < len(rows) < 30
    assert re.match(r"held \d+ MB of memory, 95 % of video.memory_limit_mb=300", error)
    held = int(error.split()[1])
    assert 285 <= held < 1500
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("ValueError", worker.WorkerFailed, "a reason"),
        ("av.error.InvalidDataError", worker.WorkerFailed, "Invalid data"),
        ("av.error.OSError", worker.WorkerFailed, "Input/output"),  # FFmpeg's word for much that is damaged
        ("SIGSEGV", worker.WorkerFailed, "crashed .Segmentation fault"),
        ("SIGSEGV within a row", worker.WorkerFailed, "crashed .Segmentation fault"),
        ("OSError", worker.WorkerLost, "a reason"),
        ("ModuleNotFoundError", worker.WorkerLost, "a reason"),
        ("MemoryError", worker.WorkerLost, "a reason"),
        ("SIGKILL", worker.WorkerLost, "killed from outside"),
        ("SIGKILL within a row", worker.WorkerLost, "killed from outside"),
        ("SIGTERM", worker.WorkerLost, "code -15"),
    ],
)
def test_the_inputs_failures_and_the_machines_are_told_apart(how: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        list(worker.run_killable(f"{__name__}:_ends", how, deadline_seconds=30, memory_limit_mb=4000))
    assert type(caught.value) is kind


def test_one_process_answers_for_all_items_and_each_failure_is_of_its_own_item(tmp_path: Path) -> None:
    items = ["a", "SIGABRT within a row", "b", "ValueError", "c", "SIGKILL", "d", "SIGKILL once", "e"]
    answers = worker.run_for_each(
        f"{__name__}:_answers", items, str(tmp_path), deadline_seconds=30, seconds=[1] * 9, memory_limit_mb=4000
    )
    told = [type(answer) if isinstance(answer, Exception) else answer for answer in answers]
    failed, lost = worker.WorkerFailed, worker.WorkerLost
    assert told == ["a", failed, "b", failed, "c", lost, "d", "SIGKILL once", "e"]
    tried = [path.read_text() for path in sorted(tmp_path.iterdir())]
    assert tried == ["SIGKILL" * 4, "SIGKILL once" * 2]  # with the others, and then three times alone; once


def _counts(count: int):
    yield from range(count)


def _waits_for_its_reader():
    for _ in range(4):
        yield bytes(1 << 20)  # more than a pipe holds


def _spins():
    yield 1
    yield 2
    # one call that never returns and never lets go of the GIL
    re.match(r"(a+)+$", "a" * 64 + "b")


def _stops():
    yield 1
    yield 2
    os.kill(os.getpid(), signal.SIGSTOP)


def _stops_before_a_row():
    yield 1
    yield 2
    os.write(int(sys.argv[1]), struct.pack("!i", 1000))  # a row of 1,000 bytes that never come
    os.kill(os.getpid(), signal.SIGSTOP)


def _stops_within_a_row():
    yield 1
    yield 2
    _half_a_row()
    os.kill(os.getpid(), signal.SIGSTOP)


def _half_a_row():
    os.write(int(sys.argv[1]), struct.pack("!i", 5_000_000) + bytes(2_500_000))


def _takes_memory():
    held = []
    for i in range(100):
        held.append(bytearray(os.urandom(1_000_000)) * 50)
        time.sleep(0.02)
        yield i


def _ends(how: str):
    yield 1
    if how.startswith("SIG"):
        if how.endswith("within a row"):
            _half_a_row()
        os.kill(os.getpid(), getattr(signal, how.split()[0]))
        time.sleep(30)
    if how.startswith("av."):
        kind = getattr(av.error, how.rpartition(".")[2])
        raise kind(errno.EIO, "Invalid data" if "Invalid" in how else "Input/output error")
    raise getattr(builtins, how)("a reason")


def _answers(items: list[str], folder: str):
    for item in items:
        if "SIGKILL" in item:
            with open(os.path.join(folder, item), "a") as file:
                file.write(item)
                tried = file.tell() // len(item)
            if "once" not in item or tried == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        elif item.startswith("SIG"):
            _half_a_row()
            os.kill(os.getpid(), getattr(signal, item.split()[0]))
        elif item.endswith("Error"):
            raise getattr(builtins, item)("a reason")
        yield item
