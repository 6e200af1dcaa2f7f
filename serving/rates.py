"""How much one key may ask of the server: requests at a time, and requests in a minute."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from serving.protocol import ApiError


class Rates:
    """Bounds for each key, counted in this process: each ingress replica counts for itself."""

    def __init__(self, *, concurrent: int, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`per_minute` requests may come at once too: they are taken from a bucket that fills up over a minute."""
        self.concurrent, self.per_minute, self._clock = concurrent, per_minute, clock
        self._held: dict[str, int] = {}
        self._buckets: dict[str, tuple[float, float]] = {}  # when it was looked at, and what was in it then

    @contextlib.contextmanager
    def held(self, key: str | None) -> Iterator[None]:
        """Count one request of `key` while the block runs. ApiError 429 for one too many; no key has no bound."""
        if key is None:
            yield
            return
        if self._held.get(key, 0) >= self.concurrent:
            raise _too_many(f"This key has {self.concurrent} requests under way, its most at a time.", 1)
        now, (then, left) = self._clock(), self._buckets.get(key, (self._clock(), float(self.per_minute)))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        if left < 1:
            wait = math.ceil((1 - left) * 60 / self.per_minute)
            raise _too_many(f"This key may send {self.per_minute} requests a minute.", wait)
        self._buckets[key] = (now, left - 1)
        self._held[key] = self._held.get(key, 0) + 1
        try:
            yield
        finally:
            self._held[key] -= 1


def _too_many(message: str, wait_s: int) -> ApiError:
    return ApiError(
        429, f"{message} Try again in {wait_s} s.", type="rate_limit_error", code="rate_limit_exceeded",
        headers={"Retry-After": str(wait_s)},
    )  # fmt: skip
