"""The run folder of contract 2: what a run was made with, its checkpoints and its metrics. Light: no model library.

run.json               what the run was made with; a command that differs in it is refused
metrics.jsonl          one line per step (`Worker.step`) and per validation; before them, at step 0, per alignment step
checkpoints/step-N/    sealed: adapter/, and state/ with the optimizer's, and run.json
pictures/              sheets of validation pictures, one per step at which they were asked for
adapter/ best/         the newest complete adapter, and the one with the lowest validation loss
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from factory.files import DamagedFolder, check_sealed, new_folder, write_atomic


class RunBusy(ValueError):
    """A run folder in which another process trains: later the same command can go on."""


class Run:
    """A run folder on a file system that all workers see."""

    def __init__(self, folder: str | Path) -> None:
        if "://" in str(folder):
            raise ValueError(
                f"--output {folder}: a run folder must be on a file system that every worker sees. Give a path."
            )
        self.folder = Path(folder)
        self.metrics = self.folder / "metrics.jsonl"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run folder, tidy; RunBusy when another process does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunBusy(
                    f"Another process trains in {self.folder}. Wait for it, or give another --output."
                ) from None
            self.tidy()
            yield

    def tidy(self) -> None:
        """Remove what a killed worker left half-written; a folder that it was about to replace is put back."""
        for aside in [*self.folder.glob(".*.*.old"), *self.folder.glob("checkpoints/.*.*.old")]:
            place = aside.with_name(aside.name[1:].rsplit(".", 2)[0])
            if not place.exists():
                aside.rename(place)
        for aside in [*self.folder.glob(".*.tmp"), *self.folder.glob(".*.old"), *self.folder.glob("checkpoints/.*")]:
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()

    def claim(self, facts: dict[str, Any]) -> None:
        """Record what the run is made with; ValueError naming the first thing that differs from its beginning."""
        file = self.folder / "run.json"
        if not file.exists():
            write_atomic(file, json.dumps(facts, indent=2, sort_keys=True) + "\n")
            return
        began = json.loads(file.read_text())
        for key in sorted({*facts, *began}):
            if began.get(key) != facts.get(key):
                raise ValueError(
                    f"Run {self.folder} was made with {key}={began.get(key)!r}, this command says {facts.get(key)!r}. "
                    "Use the same setting to go on, or give another --output."
                )

    def began(self) -> dict[str, Any] | None:
        """Return what the run was made with; None for a new run."""
        file = self.folder / "run.json"
        return json.loads(file.read_text()) if file.exists() else None

    def pinned_version(self) -> int | None:
        """Return the dataset version that the run began with; None for a new run."""
        began = self.began()
        return began["dataset_version"] if began else None

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint at `step`."""
        return self.folder / "checkpoints" / f"step-{step}"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint folder, newest first; their seals are not checked."""
        found = (path.name.removeprefix("step-") for path in (self.folder / "checkpoints").glob("step-*"))
        return sorted((int(number) for number in found if number.isdecimal()), reverse=True)  # not "step-3 (copy)"

    def newest(self) -> int:
        """Return the step of the newest checkpoint whose seal is right, 0 without one; damaged ones are named."""
        for step in self.steps():
            try:
                check_sealed(self.checkpoint(step), exact=True)
            except DamagedFolder as error:
                print(f"Checkpoint step-{step} is damaged and not used: {error}", flush=True)
                continue
            return step
        return 0

    def prune(self, keep: int, upto: int) -> None:
        """Remove all but the newest `keep` checkpoints up to step `upto`, and any after it: they were damaged."""
        good = [step for step in self.steps() if step <= upto]
        for step in self.steps():
            if step not in good[:keep]:
                shutil.rmtree(self.checkpoint(step))

    def publish_adapter(self, step: int) -> None:
        """Make `adapter/` the adapter of the checkpoint at `step`."""
        source = self.checkpoint(step) / "adapter"
        with new_folder(self.folder / "adapter") as aside:
            shutil.copytree(source, aside, dirs_exist_ok=True)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; one that a kill cut short is left out."""
        records = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def rewind(self, step: int) -> None:
        """Drop metrics after `step`, which will be written again."""
        kept = [record for record in self.history() if record["step"] <= step]
        write_atomic(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def best_loss(self) -> float | None:
        """Return the lowest validation loss of the trained adapter so far."""
        losses = [
            record["validation_loss"] for record in self.history() if "validation_loss" in record and record["step"]
        ]
        return min(losses, default=None)


def code_version() -> str:
    """Return sha256 over the sources of trainer/, 12 hex digits: jobs run code that is not installed."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
