"""The demo's journal: which step was done with which inputs, how long it took, by which commands."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.local import REPOSITORY
from factory.files import write_atomic

SHOWN_VERSIONS = (
    "ray",
    "pylance",
    "torch",
    "deepspeed",
    "diffusers",
    "transformers",
    "decord2",
    "opencv-python-headless",
)


class Journal:
    """`demo.json`: read at the start, written after each step that did something."""

    def __init__(self, path: Path):
        self._path = path
        self._begun = time.monotonic()
        try:
            self._steps: dict[str, dict[str, Any]] = json.loads(path.read_text())["steps"]
        except (OSError, ValueError, KeyError):
            self._steps = {}

    @contextlib.contextmanager
    def step(self, name: str, title: str) -> Iterator[Step]:
        """Print the heading of a step and time it. It counts as done when the block ends well."""
        minutes, seconds = divmod(int(time.monotonic() - self._begun), 60)
        print(f"\n[{minutes:02}:{seconds:02}] {title}", flush=True)
        step = Step(self, name, title)
        begun = time.monotonic()
        yield step
        if step.key is not None:
            self.record(
                name, title=title, key=step.key, seconds=round(time.monotonic() - begun, 2), commands=step.commands
            )

    def record(self, name: str, **facts: Any) -> None:
        """Write what is known of step `name`."""
        self._steps[name] = facts
        write_atomic(self._path, json.dumps(self.read(), indent=1) + "\n")

    def of(self, name: str) -> dict[str, Any]:
        """Return what is known of step `name`: `key` once it was done, `begun` while it is under way."""
        return self._steps.get(name, {})

    def key(self, name: str) -> str | None:
        """Return the key that step `name` was done with, for the keys of the steps that take its results."""
        return self.of(name).get("key")

    def read(self) -> dict[str, Any]:
        """Return all that is recorded: `steps`, `versions`, `machine`."""
        versions = {"python": platform.python_version()}
        for name in SHOWN_VERSIONS:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
        return {"steps": self._steps, "versions": versions, "machine": machine}


class Step:
    """A step that is under way."""

    def __init__(self, journal: Journal, name: str, title: str):
        self._journal, self._name, self._title = journal, name, title
        self.key: str | None = None
        self.commands: list[str] = []

    def needed(self, key: str, there: bool, *, anew: Path | None = None) -> bool:
        """Return whether the step is to be done: its results are not `there`, or were made with another `key`.

        What was begun with another key can't be gone on with: the folder `anew` is removed then.
        """
        before = self._journal.of(self._name)
        if there and before.get("key") == key:
            print("    already done", flush=True)
            return False
        if anew and anew.exists() and before.get("key", before.get("begun", key)) != key:
            print("    code or inputs have changed: made anew", flush=True)
            shutil.rmtree(anew)
        self.key = key
        self._journal.record(self._name, title=self._title, begun=key)
        return True

    def always(self) -> None:
        """Do the step in every run."""
        self.key = "always"

    def command(self, command: str | Sequence[str]) -> None:
        """Record a command as a reader would type it, with paths from the repository on; show it."""
        line = command if isinstance(command, str) else shlex.join(command)
        line = line.replace(f"{REPOSITORY}/", "$PWD/")
        self.commands.append(line)
        print(f"  $ {line}", flush=True)

    def job(self, entrypoint: Sequence[str]) -> None:
        """Record and show an entrypoint submitted as a Ray job."""
        self.command(f"ray job submit --working-dir . -- {shlex.join(entrypoint)}")


def fingerprint(*inputs: Any, code: Sequence[str]) -> str:
    """Return a hash of `inputs` (JSON values), and of code and locks of weights below the folders `code`."""
    digest = hashlib.sha256(json.dumps(inputs).encode())
    for folder in code:
        files = [path for pattern in ("*.py", "weights.lock.json") for path in (REPOSITORY / folder).rglob(pattern)]
        for path in sorted(files):
            digest.update(path.relative_to(REPOSITORY).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
