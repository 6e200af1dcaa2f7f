"""Counters of one ingress, for Prometheus, and from them the seconds that what is under way will take."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from serving.job import Facts, Job, Picture
from serving.protocol import ApiError, Busy

FULL = 0.9  # of what can be done in time: behind more than that, no request is read
SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)  # bounds of the histograms


class Metrics:
    """Counters in a registry of their own, so that two apps in one process don't collide."""

    def __init__(self, routes: tuple[str, ...]) -> None:
        """`routes` are counted by name, every other path as "other": names can't be made up from outside."""
        self.active = 0
        self._routes = routes
        self._owed, self._speed = 0.0, 0.0  # steps of a picture; and of them, what a replica takes in a second
        self.registry = CollectorRegistry()
        one: Any = {"registry": self.registry}
        timed: Any = {"registry": self.registry, "buckets": SECONDS}
        self.responses = Counter("animesketch_http_responses", "Answers.", ["route", "status"], **one)
        self.refused = Counter("animesketch_http_refused", "Requests refused, by the error's code.", ["code"], **one)
        self.left = Counter("animesketch_clients_left", "Requests whose client left before the answer.", **one)
        self.first = Histogram("animesketch_first_partial_seconds", "Time to a stream's first picture.", **timed)
        self.pictures = Counter("animesketch_pictures", "Finished pictures.", ["route"], **one)
        self.seconds = Histogram("animesketch_request_seconds", "Time of finished requests.", ["route"], **timed)
        self.picture_steps = Counter("animesketch_picture_steps", "Steps of finished pictures.", **one)
        self.steps = Counter(
            "animesketch_steps", "Denoising steps that drew them; picture_steps / steps is a batch's occupancy.", **one
        )
        self.step_seconds = Counter("animesketch_step_seconds", "Seconds of those; / steps is what one takes.", **one)
        self.in_progress = Gauge("animesketch_requests_in_progress", "Requests that hold a place.", **one)

    @contextlib.contextmanager
    def owed(self, facts: Facts, job: Job, replicas: float, most_s: float, few: float) -> Iterator[None]:
        """Count the steps of a job, in pictures of the native size, as under way while the block runs.

        Busy when it would not be done within `most_s`, behind what is under way, by so many replicas. `few` jobs may
        try all the same, and one alone.
        """
        recipe, (width, height) = job.recipe, facts.native_size
        area = math.prod(recipe.size or facts.native_size) / (width * height)
        steps = recipe.n * recipe.num_inference_steps * area
        self._speed = facts.steps_per_second
        most = most_s * self._speed * replicas
        if self._owed + steps > most > 0 and self._owed and self.active > few:
            raise Busy
        self._owed += steps
        try:
            yield
        finally:
            self._owed -= steps

    def full(self, replicas: float, most_s: float, few: float) -> bool:
        """Return whether hardly anything would be done in time behind what is under way; bounds as for `owed`."""
        return 0 < FULL * most_s * self._speed * replicas < self._owed and self.active + 1 > few

    def drained_in(self, replicas: float) -> int | None:
        """Return the seconds in which what is under way will be done, 1 at least; None where nobody knows."""
        return max(1, math.ceil(self._owed / (self._speed * replicas))) if self._speed else None

    def answered(self, path: str, status: int) -> None:
        """Count an answer."""
        self.responses.labels(path if path in self._routes else "other", str(status)).inc()

    def refuse(self, error: ApiError) -> None:
        """Count a refusal by its reason."""
        self.refused.labels(error.body["error"]["code"] or str(error.status)).inc()

    def drawn(self, route: str, picture: Picture) -> None:
        """Count a finished picture."""
        self.pictures.labels(route).inc()
        self.picture_steps.inc(picture.steps)
        self.steps.inc(picture.share)
        self.step_seconds.inc(picture.seconds)

    def done(self, route: str, seconds: float) -> None:
        """Count a request that was answered with its pictures."""
        self.seconds.labels(route).observe(seconds)
