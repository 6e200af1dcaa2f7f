"""The keys that a table holds, in 8 bytes each, so that a commit need not read them all again."""

from __future__ import annotations

from collections.abc import Iterable

import lance
import numpy as np


class KeyIndex:
    """64-bit hashes of the keys of a table. What it says may be there, the table confirms."""

    def __init__(self, table: lance.LanceDataset, column: str) -> None:
        """Read the key `column` of `table`, batch by batch."""
        self._column = column
        batches = [_hashes(batch[column].to_pylist()) for batch in table.to_batches(columns=[column])]
        self._sorted = np.sort(np.concatenate([np.empty(0, np.int64), *batches]))

    def count(self, table: lance.LanceDataset, keys: list[str]) -> int:
        """Return how many rows of `table`, which has no keys but those read or added, have one of `keys`."""
        hashes = _hashes(keys)
        known = np.searchsorted(self._sorted, hashes) < np.searchsorted(self._sorted, hashes, side="right")
        likely = ["'" + key.replace("'", "''") + "'" for key, is_known in zip(keys, known, strict=True) if is_known]
        return table.count_rows(f"{self._column} IN ({', '.join(likely)})") if likely else 0

    def add(self, keys: Iterable[str]) -> None:
        """Add the keys of rows that came into the table."""
        hashes = np.sort(_hashes(keys))
        self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, hashes), hashes)


def _hashes(keys: Iterable[str]) -> np.ndarray:
    return np.fromiter(map(hash, keys), np.int64)
