"""Running a stage: tasks on Ray Data, their entries to the committer, progress on standard output."""

from __future__ import annotations

import json
import logging
import pickle
import reprlib
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from factory import metrics
from factory.committer import Committer
from factory.config import FactoryConfig
from factory.session import check_gpus
from factory.store import NotFinished, Store
from factory.worker import ATTEMPTS

Row = dict[str, Any]
T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 5
_UNITS_TOLD = 5  # by name, of those that have no answer


class Measure(NamedTuple):
    """What a stage's work is measured in: in words, and as the counter of `metrics`."""

    words: str
    counter: str


FILM = Measure("s of film", "film_seconds")
PICTURES = Measure("pictures", "pictures")


def run(
    stage: str,
    noun: str,
    measure: Measure,
    task: Callable,
    rows: list[Row],
    committer: Committer,
    config: FactoryConfig,
) -> list[Row]:
    """Run `task` over `rows`, hand each entry to the committer as it comes, and publish all of them.

    Each row has, beside what the task reads, its `amount` of work by `measure`. Return the errors: answers that are
    one, and those that are in an answer as `unread`. What they stand for is not done. Raises NotFinished where units
    have no answer (run_tasks), after the others are published.
    """
    progress = Progress(stage, noun, len(rows), measure.words, sum(row["amount"] for row in rows))
    failures: list[Row] = []
    try:
        for answer in run_tasks(stage, _measured(task), rows, config):
            entry = json.loads(answer["entry"])
            failed = [entry] if "error" in entry else entry.pop("unread", [])
            failures += failed
            metrics.count("failures", len(failed), stage=stage, kind="unfinished")
            if "unit" in entry:
                committer.add(entry)
                metrics.count(measure.counter, answer["amount"], stage=stage)
                metrics.count("rows", entry["rows"], stage=stage)
                metrics.count("written_bytes", sum(entry["files"].values()), stage=stage)
            metrics.count("units", stage=stage)
            metrics.count("stage_seconds", answer["seconds"], stage=stage)
            progress.step(answer["amount"], rows=entry.get("rows", 0), failed=len(failed))
    except NotFinished:
        committer.flush()
        raise
    committer.flush()
    return failures


def _measured(task: Callable) -> Callable[[Row], Row]:
    """Return `task` with an answer that also has the `amount` of its row, and the `seconds` that it took."""

    def measured(row: Row) -> Row:
        begun = time.monotonic()
        amount = row.pop("amount")
        return {**task(row), "amount": amount, "seconds": time.monotonic() - begun}

    measured.__name__ = _name(task)
    return measured


def run_tasks(stage: str, task: Callable, rows: list[Row], config: FactoryConfig) -> Iterator[Row]:
    """Yield task(row) for all rows, one Ray task each, as they are done. What a task raises is raised at once.

    A task whose worker process dies is tried ATTEMPTS times, and more often where it was Ray that ended it for want of
    memory (session.py). Raises NotFinished, after the answers to all other rows, where some have none even so.
    """
    import ray.data
    from ray.exceptions import RayTaskError
    from ray.util.annotations import RayDeprecationWarning

    if not rows:
        return
    context = ray.data.DataContext.get_current().copy()  # the caller's stays as it is
    context.enable_progress_bars = False  # the stages print their own
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # a worker that dies takes no other's answer along
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # how it died
    numbered = [row | {"number": number} for number, row in enumerate(rows)]
    with ray.data.DataContext.current(context):
        data = ray.data.from_items(numbered, override_num_blocks=len(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # ray 2.60 has no other way to bound the attempts
        wanted: Row = {"num_cpus": config.num_cpus, "max_retries": ATTEMPTS - 1}
        if stage == "sketch" and config.num_gpus:
            check_gpus(config.num_gpus)
            # Ray ends a worker after each task on a GPU; this one keeps its network
            wanted |= {"num_gpus": config.num_gpus, "max_calls": 0}
        answers = data.map(_answering(task), **wanted)
    missing = dict(enumerate(rows))
    for answer in answers.iter_rows():
        if answer["raised"]:
            error = RayTaskError.from_bytes(answer["raised"])
            raise error.as_instanceof_cause() if isinstance(error, RayTaskError) else error
        del missing[answer["number"]]
        yield pickle.loads(answer["answer"])
    if missing:
        units = "".join(f"\n  {reprlib.repr(row)}" for row in islice(missing.values(), _UNITS_TOLD))
        raise NotFinished(
            f"{stage}: {len(missing)} of {len(rows)} units of work have no answer, their workers died each time "
            "(a crash, or too little memory; Ray's words are above). The others are done, and what was committed is "
            f"kept. Run the same command again; where memory is short, with --set num_cpus=2.{units}"
        )


def _answering(task: Callable) -> Callable[[Row], Row]:
    """Return `task` with an answer that has the `number` of its row, and beside it what the task gave or raised."""

    def answering(row: Row) -> Row:
        from ray.exceptions import RayTaskError

        number = row.pop("number")
        try:
            return {"number": number, "answer": pickle.dumps(task(row)), "raised": b""}
        except Exception as error:  # told from a worker that died: that has no answer
            raised = RayTaskError(_name(task), traceback.format_exc(), error).to_bytes()
            return {"number": number, "answer": b"", "raised": raised}

    answering.__name__ = _name(task)  # Ray's dashboard shows it
    return answering


def _name(task: Callable) -> str:
    return getattr(task, "__name__", type(task).__name__)


def in_lots(items: list[T], size: int) -> list[list[T]]:
    """Return `items` in lists of `size`, the last one shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def update(store: Store, name: str, rows: list[Row]) -> None:
    """Change columns of rows (with `_rowaddr`) of table `name` in one transaction."""
    fragments: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        fragments[row["_rowaddr"] >> 32].append({key: value for key, value in row.items() if key != "_rowaddr"})
    committer = Committer(store, name, every=len(fragments) + 1)
    for fragment, changed in sorted(fragments.items()):
        committer.add(store.write_updates(name, fragment, changed))
    committer.flush()


class Progress:
    """Whole lines of progress on standard output, at most one every five seconds, and the last."""

    def __init__(
        self, stage: str, noun: str, total: int, measure: str | None = None, amount: float | None = None
    ) -> None:
        """Expect `total` units, called `noun`. Where these differ in size, speed and time left are told by what
        `measure` names instead; all units hold `amount` of it."""
        self._stage, self._noun, self._total = stage, noun, total
        self._measure, self._amount = measure or noun, total if amount is None else amount
        self._done = self._rows = self._failed = 0
        self._worked = 0.0
        self._start = self._said = time.monotonic()
        whole = f", {self._amount:,.0f} {measure}" if measure else ""
        print(f"{stage:<8} {f'{total:,} {noun}{whole}' if total else 'nothing to do'}", flush=True)

    def reach(self, done: int) -> None:
        """Count units until so many are done."""
        while self._done < done:
            self.step()

    def step(self, amount: float = 1, *, rows: int = 0, failed: int = 0) -> None:
        """Count one unit done, with its amount of work, and so many rows and failures."""
        self._done += 1
        self._rows += rows
        self._failed += failed
        self._worked += amount
        now = time.monotonic()
        if now - self._said > _SECONDS_BETWEEN_LINES or self._done == self._total:
            self._said = now
            print(self._line(now - self._start), flush=True)

    def _line(self, spent: float) -> str:
        speed = self._worked / max(spent, 1e-3)
        left = (self._amount - self._worked) / max(speed, 1e-9)
        parts = [f"{self._done}/{self._total} {self._noun}"]
        parts += [f"{self._rows} rows"] if self._rows else []
        parts += [f"{self._failed} failed"] if self._failed else []
        parts += [f"{speed:{',.0f' if speed >= 100 else '.3g'}} {self._measure} per second", f"{clock(spent)} spent"]
        parts += [f"{clock(left)} left"] if self._done < self._total else []
        return f"{self._stage:<8} {', '.join(parts)}"


def clock(seconds: float) -> str:
    """Return a duration (s) in words: 8 s, 2 min 05 s, 3 h 07 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
