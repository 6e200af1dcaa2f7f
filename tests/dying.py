"""A training loop whose workers are killed once each at three points. A module of its own: Ray's workers import it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.killing import die
from trainer import loop
from trainer.run import Run

train = loop.train_loop_per_worker  # before a test puts another in its place


def train_and_die(job: dict[str, Any]) -> None:
    """Train, and die once each: rank 1 within step 14, rank 0 within the save of step 20, and before step 30's
    adapter is published."""
    from trainer import worker

    notes = Path(job["config"].output).with_suffix(".kills")

    def die_once(point: str) -> None:
        try:
            os.close(os.open(notes / point, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        die()

    class Dying(worker.Worker):
        at = 0

        def step(self, step: int) -> dict[str, float]:
            self.at = step
            return super().step(step)

        def _loss(self, *arguments: Any) -> Any:
            if self.at == 13 and self.rank == 1:
                die_once("within a step")
            return super()._loss(*arguments)

    write, publish = worker.write_atomic, Run.publish_adapter

    def write_or_die(path: Path, data: bytes) -> None:
        if "step-20" in str(path):
            write(path, data[: len(data) // 2])
            die_once("within a save")
        write(path, data)

    def publish_or_die(run: Run, step: int) -> None:
        if step == 30:
            die_once("before publishing")
        publish(run, step)

    worker.Worker, worker.write_atomic, Run.publish_adapter = Dying, write_or_die, publish_or_die  # type: ignore
    train(job)
