"""Two sides of a comparison, alternated in one run: medians, spread, and their ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was measured: units of work per second on both sides."""

    title: str
    unit: str
    ours: list[float]
    peer: list[float]

    def row(self) -> str:
        """Return a Markdown table row: ours, peer, median of the ratios of neighbouring runs, with their range."""
        ratios = [a / b for a, b in zip(self.ours, self.peer, strict=True)]
        cells = [self.title, _spread(self.ours), _spread(self.peer), self.unit, _spread(ratios)]
        return f"| {' | '.join(cells)} |"


HEADER = "| what | ours | peer | unit | ratio |\n|---|---|---|---|---|"


def compare(
    title: str,
    unit: str,
    ours: Callable[[], int],
    peer: Callable[[], int],
    *,
    rounds: int = 5,
    warm_up: bool = True,
    before: Callable[[], object] = lambda: None,
) -> Comparison:
    """Run both sides `rounds` times in turn (A B, B A, ...), after once to warm up; each returns its units of work.

    `before` is called before each of them, and is not measured.
    """
    sides = {"ours": ours, "peer": peer}
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for side in sides.values() if warm_up else ():
        side()
    for turn in range(rounds):
        for name in ("ours", "peer") if turn % 2 == 0 else ("peer", "ours"):
            before()
            start = time.perf_counter()
            work = sides[name]()
            rates[name].append(work / (time.perf_counter() - start))
    return Comparison(title=title, unit=unit, **rates)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
