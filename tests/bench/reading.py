"""The training read: batches of rows at random, out of Lance, out of tuned Parquet, and out of a folder of files.

The same bytes on all sides: pictures as the encoders read them (blobs), and rows of a cache, of the micro base and of
SD v1.5. Cold: the kernel's pages of all files are dropped before each round. Nothing is decoded. Parquet is written
without compression and with a page index, and read with memory map and threads or without, whichever is the fastest.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from factory.schema import STORAGE_VERSION
from tests.bench.harness import Comparison, compare
from trainer.cache import open_rows, read_rows

Read = Callable[[Sequence[int]], list[Any]]  # of what has the bytes of a row each
BATCH = 16  # rows that are asked for at once
BATCHES = 12  # of a round; no row comes twice in one
ROUNDS = 5
PICTURES = 2000  # training sketches, 20 to 140 kB each
ROWS = ((3200, 2 * 1024 + (77 + 65) * 128), (256, 2 * 16384 + 77 * 768 + 257 * 1280))  # count, float16 numbers in each
GROUPS = (16, 1)  # rows of a Parquet row group; with 1 the footer, read whole at opening, describes each row


def reading(folder: Path) -> Iterator[Comparison]:
    """Yield the comparisons, in rows/s: Lance against Parquet and files, warm and cold."""
    rng = np.random.default_rng(0)
    yield from _compared("pictures of 80 kB", *_pictures(folder / "pictures", rng), rng)
    for count, numbers in ROWS:
        words = f"cache rows of {2 * numbers / 1e3:,.0f} kB"
        yield from _compared(words, *_cache_rows(folder / str(numbers), count, numbers, rng), rng)


def _compared(what: str, folder: Path, rows: list[bytes], ours: Read, rng: np.random.Generator) -> Iterator[Comparison]:
    peers = dict(_parquet(folder / "parquet", rows, size, rng) for size in GROUPS)
    peers["a folder of files"] = _files(folder / "files", rows)
    for peer, cold in itertools.product(peers, (False, True)):
        order = _Order(len(rows), rng)
        yield compare(
            f"{what}, {'cold' if cold else 'warm'}: Lance / {peer}",
            "rows/s",
            order.round(ours, rows),
            order.round(peers[peer], rows),
            rounds=ROUNDS,
            before=(lambda: _drop(folder)) if cold else lambda: None,
        )


class _Order:
    """Random batches, new ones in each round; both sides get the same."""

    def __init__(self, count: int, rng: np.random.Generator) -> None:
        seed = int(rng.integers(1 << 30))
        self._rounds = [
            np.random.default_rng(seed + turn).permutation(count)[: BATCH * BATCHES].reshape(-1, BATCH).tolist()
            for turn in range(ROUNDS + 1)
        ]

    def round(self, read: Read, rows: list[bytes]) -> Callable[[], int]:
        """Return what reads the next round's batches, looks at their lengths, and returns the number of rows."""
        turns = itertools.cycle(self._rounds)

        def run() -> int:
            done = 0
            for batch in next(turns):
                found = read(batch)
                assert [len(data) for data in found] == [len(rows[i]) for i in batch]
                done += len(found)
            return done

        return run


def _pictures(folder: Path, rng: np.random.Generator) -> tuple[Path, list[bytes], Read]:
    rows = [rng.bytes(int(size)) for size in rng.integers(20_000, 140_000, PICTURES)]
    schema = pa.schema([pa.field("frame_id", pa.string()), lance.blob_field("picture")])
    uri = str(folder / "table.lance")
    for start in range(0, len(rows), 500):  # fragments, as a build leaves them
        part = rows[start : start + 500]
        names = pa.array([f"{start + i:012d}" for i in range(len(part))])
        table = pa.Table.from_arrays([names, lance.blob_array(part)], schema=schema)
        lance.write_dataset(table, uri, mode="append", data_storage_version=STORAGE_VERSION)
    dataset = lance.dataset(uri)
    ids = dataset.to_table(columns=["frame_id"], with_row_id=True).sort_by("frame_id")["_rowid"].to_pylist()

    def read(batch: Sequence[int]) -> list[bytes]:
        found = dataset.read_blobs("picture", ids=[ids[i] for i in batch], preserve_order=True)
        return [data or b"" for _, data in found]

    return _checked(folder, rows, read)


def _cache_rows(folder: Path, count: int, numbers: int, rng: np.random.Generator) -> tuple[Path, list[bytes], Read]:
    rows = [rng.bytes(2 * numbers) for _ in range(count)]
    uri = str(folder / "table.lance")
    table = pa.table({"numbers": pa.array(rows, pa.binary(2 * numbers)), "crc32": pa.array(range(count), pa.uint32())})
    file = open_rows(lance.write_dataset(table, uri, data_storage_version=STORAGE_VERSION))

    def read(batch: Sequence[int]) -> list[Any]:
        return [numbers for numbers, _ in read_rows(file, batch)]

    return _checked(folder, rows, read)


def _parquet(folder: Path, rows: list[bytes], size: int, rng: np.random.Generator) -> tuple[str, Read]:
    """Return the fastest way to read Parquet with row groups of `size`, and its name: memory map, threads."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{size}.parquet"
    pq.write_table(
        pa.table({"data": pa.array(rows, pa.large_binary())}),
        file,
        row_group_size=size,
        compression="NONE",
        use_dictionary=False,
        write_statistics=False,
        write_page_index=True,
        data_page_size=64 << 10,
    )
    ways: dict[str, Read] = {}
    for mapped, threads in itertools.product((False, True), repeat=2):
        source = pq.ParquetFile(file, memory_map=mapped, pre_buffer=False)
        name = f"Parquet, groups of {size}{', memory map' if mapped else ''}{', threads' if threads else ''}"
        ways[name] = _of_groups(source, size, threads)
    batches = [rng.permutation(len(rows))[:BATCH].tolist() for _ in range(8)]
    seconds = {name: _seconds(read, batches, rows) for name, read in ways.items()}
    best = min(seconds, key=seconds.__getitem__)
    return best, ways[best]


def _of_groups(source: pq.ParquetFile, size: int, threads: bool) -> Read:
    def read(batch: Sequence[int]) -> list[bytes]:
        groups = sorted({i // size for i in batch})
        data = source.read_row_groups(groups, columns=["data"], use_threads=threads)["data"].combine_chunks()
        place = {group: number * size for number, group in enumerate(groups)}
        return [data[place[i // size] + i % size].as_py() for i in batch]

    return read


def _files(folder: Path, rows: list[bytes]) -> Read:
    folder.mkdir()
    names = [f"{folder}/{i:06d}" for i in range(len(rows))]
    for name, data in zip(names, rows, strict=True):
        Path(name).write_bytes(data)

    def one(name: str) -> bytes:
        with open(name, "rb", buffering=0) as file:
            return file.read()

    return lambda batch: [one(names[i]) for i in batch]


def _checked(folder: Path, rows: list[bytes], read: Read) -> tuple[Path, list[bytes], Read]:
    assert [bytes(data) for data in read([3, 1, 2])] == [rows[3], rows[1], rows[2]]
    return folder, rows, read


def _seconds(read: Read, batches: list[list[int]], rows: list[bytes]) -> float:
    assert read(batches[0]) == [rows[i] for i in batches[0]]
    begun = time.perf_counter()
    for batch in batches:
        read(batch)
    return time.perf_counter() - begun


def _drop(folder: Path) -> None:
    """Drop the kernel's pages of all files below `folder`."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
