"""The report of a dataset: one file, also of what failed, that shows a part of what is large."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from factory import report
from factory.__main__ import USAGE, main
from factory.committer import Committer
from factory.store import Store


@pytest.fixture
def store(small_dataset: Path, tmp_path: Path) -> Store:
    """A copy of the small dataset, to change."""
    shutil.copytree(small_dataset, tmp_path / "root")
    return Store(str(tmp_path / "root"))


def _append(store: Store, table: str, rows: list[dict]) -> None:
    Committer(store, table, every=1).add(store.write_unit(table, f"made up {len(rows)}", rows))


def test_the_report_is_one_file_that_tells_of_the_dataset(
    small_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "page.html"
    assert main(["report", "--root", str(small_dataset), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    page = output.read_text()
    told = report.funnel(Store(str(small_dataset)))
    assert f"{told['kept']} of {told['candidates']} candidates kept" in page
    (duplicate,) = (item for item in told["reasons"] if item["reason"] == "duplicate")
    assert len(duplicate["examples"]) == 2  # the frame, and the kept one that it repeats
    assert all(example["uri"] in page for example in duplicate["examples"])
    for source in ("toon-00.mp4", "toon-01.mp4"):
        assert f"<td>{source}</td>" in page
    for row in report.sample_rows(Store(str(small_dataset))):
        assert row["caption"] in page
        assert f"{row['source']} at {row['timestamp']:.2f} s" in page
        assert row["sketch"]["uri"] in page
    assert not re.search(r'(?:href|src)="(?!data:|#)', page)  # nothing is loaded
    assert "<script" not in page


def test_by_default_the_report_lies_in_the_root(store: Store) -> None:
    assert main(["report", "--root", str(store.root)]) == 0
    assert (store.root / "report.html").read_text().startswith("<!doctype html>")


def test_damaged_pictures_are_told_in_their_place(store: Store, capsys: pytest.CaptureFixture) -> None:
    row = store.table("samples").to_table(columns=["frame_id"], with_row_address=True).to_pylist()[0]
    files = [file for file in Path(store.uri("samples"), "data").rglob("*") if file.is_file()]
    for column in ("image", "training_sketch"):
        (picture,) = store.read_pictures("samples", column, [row["_rowaddr"]])
        assert picture
        (file,) = (file for file in files if picture in file.read_bytes())
        # in the pixels of the JPEG, which decodes all the same, and in the length of the PNG's first part with pixels
        damaged = bytearray(picture)
        damaged[len(picture) // 2 if column == "image" else picture.find(b"IDAT") - 1] ^= 4
        file.write_bytes(file.read_bytes().replace(picture, damaged))  # a small sketch is the training sketch too
    for file in Path(store.uri("candidates"), "data").rglob("*"):
        if file.is_file() and b"\xff\xd8\xff" in file.read_bytes():
            file.write_bytes(file.read_bytes().replace(b"\xff\xd8\xff", b"\xff\xd8\xfe"))
    assert main(["report", "--root", str(store.root)]) == 0
    page = (store.root / "report.html").read_text()
    dropped = sum(len(item["examples"]) for item in report.funnel(store)["reasons"])
    assert page.count("damaged picture: see python -m factory verify") == 2 + dropped
    assert dropped
    assert "it does not match its sha256" in page
    (store.root / "a file").touch()
    for output in (store.root, store.root / "a file" / "page.html"):
        assert main(["report", "--root", str(store.root), "--output", str(output)]) == USAGE
        assert f"--output {output}" in capsys.readouterr().err


def test_failed_sources_and_candidates_are_shown_with_their_errors(store: Store) -> None:
    before = report.funnel(store)
    cut = {"source_id": "cut", "uri": "/films/cut.mp4", "status": "partial", "error": "ends at <3> s"}
    text = {"source_id": "text", "uri": "/films/text.mp4", "status": "failed", "error": "not a video"}
    failed = {
        "frame_id": "cut-3000001",
        "source_id": "cut",
        "segment_id": "cut-0",
        "timestamp": 3.0,
        "status": "failed",
        "reason": "decode: bad_packet & more",
    }
    undecided = {**failed, "frame_id": "cut-1", "status": None, "reason": None}
    _append(store, "sources", [cut, text])
    _append(store, "candidates", [failed, undecided])

    told = report.funnel(store)
    assert told["sources"] == before["sources"] + 2
    assert told["failed_sources"] == 2
    assert told["candidates"] == before["candidates"] + 2
    assert told["kept"] == before["kept"]
    counts = {item["reason"]: item["count"] for item in told["reasons"]}
    assert counts["failed, decode: bad_packet & more"] == counts["undecided"] == 1
    assert sum(counts.values()) + told["kept"] == told["candidates"]
    page = report.write_report(store, store.root / "r.html").read_text()
    assert '<b class="failed">failed, decode: bad_packet &amp; more</b>' in page
    assert "<dt>sources failed, whole or in part</dt><dd>2</dd>" in page
    for line in ("partial: ends at &lt;3&gt; s", "failed: not a video"):
        assert f'<td class="wide failed">{line}</td>' in page


def test_of_many_sources_and_reasons_a_part_is_shown_what_failed_first(store: Store) -> None:
    films = [{"source_id": f"s{i}", "uri": f"/films/{i:04}.mp4", "status": "ok"} for i in range(300)]
    films[250] |= {"status": "failed", "error": "not a video"}
    row = {"source_id": "s0", "segment_id": "s0-0", "timestamp": 0.0, "status": "failed"}
    _append(store, "sources", films)
    _append(store, "candidates", [{**row, "frame_id": f"s0-{i}", "reason": f"error {i}"} for i in range(40)])
    told = report.sources(store)
    assert (told["shown"][0]["name"], len(told["shown"]), told["more"]) == ("0250.mp4", report.SOURCES, 102)
    found = report.funnel(store)
    assert (len(found["reasons"]), found["more_reasons"]) == (report.REASONS, 11)
    page = report.write_report(store, store.root / "r.html").read_text()
    assert "And 102 more" in page
    assert "And 11 rarer reasons" in page


def test_a_dataset_without_rows_has_a_report(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.create()
    assert "0 of 0 candidates kept" in report.write_report(store, tmp_path / "r.html").read_text()


def test_rows_come_from_all_sources_before_any_comes_twice() -> None:
    taken = list(report.turns([["a0", "a1", "a2", "a3"], ["b0"]]))
    assert taken[0] == ["a2", "b0"]
    assert sorted(item for turn in taken for item in turn) == ["a0", "a1", "a2", "a3", "b0"]
