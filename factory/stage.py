"""Running a stage: tasks on Ray Data, their entries to the committer, progress on standard output."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from factory.config import FactoryConfig
from factory.store import Committer, Store

Row = dict[str, Any]
T = TypeVar("T")


def run(
    stage: str, noun: str, task: Callable, rows: list[dict[str, Any]], committer: Committer, config: FactoryConfig
) -> list[Row]:
    """Run `task` over `rows`, hand each entry to the committer as it comes, and publish all of them.

    Return the errors: answers that are one, and those that an entry has as `unread`. What they stand for is not done.
    """
    progress = Progress(stage, noun, len(rows))
    failures: list[Row] = []
    for row in run_tasks(task, rows, config):
        entry = json.loads(row["entry"])
        if "error" in entry:
            failures.append(entry)
        else:
            failures += entry.pop("unread", [])
            committer.add(entry)
        progress.step(entry.get("rows", 0))
    committer.flush()
    return failures


def run_tasks(task: Callable, rows: list[dict[str, Any]], config: FactoryConfig) -> Iterator[Row]:
    """Yield task(row) for all rows, one Ray task each, as they are done."""
    import ray.data

    if not rows:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the stages print their own
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # the command says what happened, in the task's own words
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised, too
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(task, num_cpus=config.num_cpus)
    yield from data.iter_rows()


def in_lots(items: list[T], size: int) -> list[list[T]]:
    """Return `items` in lists of `size`, the last one shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def update(store: Store, name: str, rows: list[dict[str, Any]]) -> None:
    """Change columns of rows (with `_rowaddr`) of table `name` in one transaction."""
    fragments: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        fragments[row["_rowaddr"] >> 32].append({key: value for key, value in row.items() if key != "_rowaddr"})
    committer = Committer(store, name, every=len(fragments) + 1)
    for fragment, changed in sorted(fragments.items()):
        committer.add(store.write_updates(name, fragment, changed))
    committer.flush()


class Progress:
    """Lines of progress on standard output, at most one every two seconds."""

    def __init__(self, stage: str, noun: str, total: int) -> None:
        self._stage, self._noun, self._total = stage, noun, total
        self._done = self._rows = 0
        self._start = self._said = time.monotonic()
        if total == 0:
            print(f"{stage:<8} nothing to do", flush=True)

    def step(self, rows: int = 0) -> None:
        """Count one unit done, with so many rows."""
        self._done += 1
        self._rows += rows
        now = time.monotonic()
        if now - self._said > 2 or self._done == self._total:
            self._said = now
            spent = now - self._start
            left = spent / self._done * (self._total - self._done)
            count = f"{self._done}/{self._total} {self._noun}" + (f"  {self._rows} rows" if self._rows else "")
            print(f"{self._stage:<8} {count}  {spent:.0f} s, {left:.0f} s left", flush=True)
