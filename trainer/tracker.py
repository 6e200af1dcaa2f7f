"""Copies of a run's metrics for a tracking service. Each is an optional package, imported only when asked for.

`metrics.jsonl` stays the record: a run goes on without its tracker, and none is ever read.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from factory.files import write_atomic
from trainer.run import Run

Report = Callable[[int, dict[str, float]], None]
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def check(name: str) -> None:
    """Raise ValueError when the package of the tracker `name` is not installed; "none" needs none."""
    if name != "none":
        _module(name)


class Tracker:
    """A run's copy at a service. Whatever the service's client raises is told once, and then it gets no more."""

    def __init__(self, name: str, run: Run, first: int, settings: dict[str, Any]) -> None:
        """Begin, or go on at step `first`; "none" is no service.

        Where the services keep it is their own affair: MLFLOW_TRACKING_URI, WANDB_PROJECT and the like; TensorBoard's
        files are in the run folder.
        """
        self._name, self._run = name, run
        opened = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}.get(name)
        self._service: tuple[Report, Callable[[], object]] | None = None
        if opened:
            with self._careful(first):
                self._service = opened(run, first, settings)

    def report(self, step: int, numbers: dict[str, float]) -> None:
        """Copy the numbers of a step."""
        if self._service:
            with self._careful(step):
                self._service[0](step, numbers)

    def close(self, step: int) -> None:
        """Tell the service that the run is finished: Ray ends its workers without a word."""
        if self._service:
            with self._careful(step):
                self._service[1]()

    @contextlib.contextmanager
    def _careful(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a client raises: no hour of training is lost for a copy
            self._service = None
            told = f"{self._name} failed at step {step} and gets no more of this run ({error}); see {self._run.metrics}"
            print(told, flush=True)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise ValueError(
            f"--report-to {name}: its package is missing ({error}). Install it where Ray's workers run: "
            f"pip install {name} — or leave the option out: metrics.jsonl has every number."
        ) from None


def _tensorboard(run: Run, first: int, settings: dict[str, Any]) -> tuple[Report, Callable[[], object]]:
    # what a killed run had written beyond its checkpoint is dropped
    writer = _module("tensorboard").SummaryWriter(str(run.folder / "tensorboard"), purge_step=first + 1)

    def report(step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return report, writer.close


def _wandb(run: Run, first: int, settings: dict[str, Any]) -> tuple[Report, Callable[[], object]]:
    wandb, file = _module("wandb"), run.folder / "wandb_id"
    if not file.exists():
        write_atomic(file, wandb.util.generate_id())
    (run.folder / "wandb").mkdir(exist_ok=True)
    tracked = wandb.init(
        id=file.read_text(), resume="allow", name=run.folder.name, dir=str(run.folder), config=settings
    )
    # a service's own steps only rise, and numbers that are sent again at a resume would be lost
    tracked.define_metric("*", step_metric="step")
    return lambda step, numbers: tracked.log({**numbers, "step": step}), tracked.finish


def _mlflow(run: Run, first: int, settings: dict[str, Any]) -> tuple[Report, Callable[[], object]]:
    mlflow, file = _module("mlflow"), run.folder / "mlflow_id"
    if file.exists():
        mlflow.start_run(run_id=file.read_text())
    else:
        write_atomic(file, mlflow.start_run(run_name=run.folder.name).info.run_id)
        mlflow.log_params(settings)
    return lambda step, numbers: mlflow.log_metrics(numbers, step=step), mlflow.end_run
