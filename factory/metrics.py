"""Counters for Prometheus, through Ray: each one that the factory exports is defined here.

Ray serves them on every node's metrics port with a prefix of its own: `ray_animesketch_factory_rows_total`.
"""

from __future__ import annotations

import functools
from typing import Any

# name -> what it counts, and its labels
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "animesketch_factory_units_total": ("Units of work done: files, segments, batches of samples.", ("stage",)),
    "animesketch_factory_rows_total": ("Rows appended or changed.", ("stage",)),
    "animesketch_factory_film_seconds_total": ("Seconds of film decoded.", ("stage",)),
    "animesketch_factory_pictures_total": ("Pictures decoded, copied, drawn as sketches, or captioned.", ("stage",)),
    "animesketch_factory_written_bytes_total": ("Bytes of table files written.", ("stage",)),
    "animesketch_factory_stage_seconds_total": ("Seconds that workers spent on units of work.", ("stage",)),
    "animesketch_factory_failures_total": (
        "Failures. Kind: unopened, partial or failed sources; unfinished units, which the next run tries again.",
        ("stage", "kind"),
    ),
}


def count(name: str, amount: float = 1, **labels: str) -> None:
    """Add `amount` to the counter `animesketch_factory_<name>_total`; nothing, where it is 0."""
    if amount > 0:
        _counter(f"animesketch_factory_{name}_total").inc(amount, tags=labels)


@functools.cache
def _counter(name: str) -> Any:
    from ray.util.metrics import Counter

    description, labels = COUNTERS[name]
    return Counter(name, description=description, tag_keys=labels)
