"""Values that are kept as long as they fit, the least recently used given up first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Cache(Generic[T]):
    """At most `max_bytes` of values by content; `nbytes` tells the size of one. Not for several threads."""

    def __init__(self, max_bytes: int, nbytes: Callable[[T], int]) -> None:
        self.max_bytes, self.nbytes = max_bytes, nbytes
        self.held = 0
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of `key`, made now if it is not kept. One that is larger than all room is not kept."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = make()
        if (size := self.nbytes(value)) <= self.max_bytes:
            self._values[key] = value
            self.held += size
            while self.held > self.max_bytes:
                self.held -= self.nbytes(self._values.popitem(last=False)[1])
        return value

    def drop(self, wanted: Callable[[Hashable], bool]) -> None:
        """Give up the values whose key is `wanted`."""
        for key in [key for key in self._values if wanted(key)]:
            self.held -= self.nbytes(self._values.pop(key))

    def __len__(self) -> int:
        return len(self._values)
