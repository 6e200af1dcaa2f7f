"""A kept command: whatever it starts is ended with it, also when the one who asked for it is killed.

`Kept(["ray", "start", ...])` runs this file as a process between the caller and the command. On Linux that process is
the reaper of all orphans below it (PR_SET_CHILD_SUBREAPER), so daemons that leave their parent stay reachable. It ends
every process below it when the command ends, when it gets SIGTERM, and when its stdin closes, which the kernel does
even where the caller dies by SIGKILL. Nothing is looked up by name. A folder of secrets and sockets can go with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

GRACE_S = 6.0  # from SIGTERM to SIGKILL; a Ray head on loopback takes about 3 s
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Kept:
    """A running command and everything below it. `end()`, or leaving the `with` block, ends them all."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        output: IO[bytes] | int = subprocess.PIPE,
        removes: Path | None = None,
    ):
        """Start `command`; stdout and stderr go to `output`, by default to the pipe `self.output`.

        The folder `removes` is removed after the end, unless the command ended by itself: the caller may want to look.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-P", os.path.abspath(__file__), str(removes or ""), *command],  # -P: not this folder
            env=env,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches the caller alone, who then ends this in order
        )
        self.output = self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Return the command's exit status (128 + signal when one ended it), None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Return the command's exit status once it and everything below it have ended."""
        return self._process.wait(timeout)

    def end(self) -> None:
        """End the command and everything below it; return when none is left."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()
        if self.output:
            self.output.close()

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _keep(removes: str, command: Sequence[str]) -> int:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    asked = False

    def asked_to_end(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, asked_to_end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        except OSError as error:
            print(f"Could not start {command[0]}: {error.strerror}.", flush=True)
            return 127
        threading.Thread(target=_watch_caller, daemon=True).start()
        while True:  # reap the command, and orphans that came to us
            pid, status = os.waitpid(-1, 0)
            if pid == child.pid:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_all_below()
        if asked and removes:
            _remove(removes)


def _watch_caller() -> None:
    while os.read(0, 4096):  # b"" once the caller has closed its end, or is gone
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _end_all_below() -> None:
    """End every descendant of this process: SIGTERM, after `GRACE_S` SIGKILL."""
    me, told = psutil.Process(), set()
    deadline = time.monotonic() + GRACE_S
    while below := me.children(recursive=True):
        late = time.monotonic() > deadline
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                if late:
                    process.kill()
                elif process.pid not in told:
                    told.add(process.pid)
                    process.terminate()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def _remove(folder: str) -> None:
    """Remove `folder`; again, for a while, where another kept command that is being ended still writes there."""
    deadline = time.monotonic() + GRACE_S
    while os.path.exists(folder) and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(_keep(sys.argv[1], sys.argv[2:]))
