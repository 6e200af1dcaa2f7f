"""Selection over rows made up in a test: the factory's own takes a table."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from factory import schema, selection


def select(rows: list[dict[str, Any]], config: selection.SelectionConfig) -> dict[str, dict[str, Any]]:
    """The decisions of `selection.select` by frame_id."""
    columns = pa.schema([schema.CANDIDATES.field(name) for name in selection.COLUMNS])
    decided = selection.select(schema.arrange(rows, columns), config).to_pylist()
    return {row["frame_id"]: decision for row, decision in zip(rows, decided, strict=True)}
