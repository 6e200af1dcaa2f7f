"""The report: one file that tells it all, also what failed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster import report
from factory.committer import Committer
from factory.store import Store


@pytest.fixture
def finished_demo(small_dataset: Path, tmp_path: Path) -> Path:
    """A demo's folder: the small dataset, and made-up metrics and pictures."""
    from PIL import Image

    from cluster.pictures import requests_for

    (tmp_path / "dataset").symlink_to(small_dataset)
    for folder in ("run", "images"):
        (tmp_path / folder).mkdir()
    rows: list[dict[str, Any]] = [{"step": 0, "alignment_step": i, "alignment_loss": 0.9 / i} for i in range(1, 31)]
    rows += [{"step": i, "loss": 1 / i, "lr": 1e-3, "samples_per_second": 8.0} for i in range(1, 41)]
    rows.append({"step": 40, "validation_loss": 0.0625})
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = []
    for i, request in enumerate(requests_for(small_dataset)):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
        index.append({"file": f"{i}.png", **vars(request), "prompt": request.prompt + "<script>alert(1)</script>"})
    (tmp_path / "images/index.json").write_text(json.dumps(index))
    return tmp_path


def test_the_report_is_one_file_that_tells_it_all(finished_demo: Path) -> None:
    steps = {"dataset": {"title": "Dataset", "key": "k", "seconds": 61.2, "commands": ["ray job submit -- x"]}}
    page = report.write_report(
        finished_demo, {"steps": steps, "versions": {"ray": "2.60.0"}, "machine": "2 cores"}
    ).read_text()
    told = report.funnel(finished_demo / "dataset")
    assert f"{told['kept']} of {told['candidates']} candidates kept" in page
    for source in ("toon-00.mp4", "toon-01.mp4"):
        assert f"<td>{source}</td>" in page
    for row in report.sample_rows(finished_demo / "dataset"):
        assert row["caption"] in page
        assert f"{row['source']} at {row['timestamp']:.2f} s" in page
    assert "adapter: keywords, sketch" in page
    assert "0.0625" in page
    assert "alignment step<" in page
    assert "training step<" in page
    assert "<svg" in page
    assert "1 min 01 s" in page
    assert "ray job submit -- x" in page
    # one file: every picture is inside, nothing is loaded, text is escaped
    kinds = {source.split(",")[0] for source in re.findall(r'<img[^>]* src="([^"]*)"', page)}
    assert kinds == {"data:image/jpeg;base64", "data:image/png;base64"}
    assert not re.search(r'(?:href|src)="(?!data:|#)', page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert len(page) < 6 * 10**6


def test_failed_sources_and_candidates_are_shown_with_their_errors(finished_demo: Path) -> None:
    root = finished_demo / "dataset"
    built = root.resolve()
    root.unlink()
    shutil.copytree(built, root)
    store = Store(str(root))
    before = report.funnel(root)
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
    for table, rows in (("sources", [cut, text]), ("candidates", [failed, undecided])):
        Committer(store, table, every=1).add(store.write_unit(table, "made up", rows))

    told = report.funnel(root)
    assert told["sources"] == before["sources"] + 2
    assert told["failed_sources"] == 2
    assert told["candidates"] == before["candidates"] + 2
    assert told["kept"] == before["kept"]
    counts = {item["reason"]: item["count"] for item in told["reasons"]}
    assert counts["failed, decode: bad_packet & more"] == counts["undecided"] == 1
    assert sum(counts.values()) + told["kept"] == told["candidates"]
    page = report.write_report(finished_demo, {"steps": {}, "versions": {}, "machine": ""}).read_text()
    assert '<b class="failed">failed, decode: bad_packet &amp; more</b>' in page
    assert "<dt>sources failed, whole or in part</dt><dd>2</dd>" in page
    for line in ("partial: ends at &lt;3&gt; s", "failed: not a video"):
        assert f'<td class="wide failed">{line}</td>' in page


def test_rows_come_from_all_sources_before_any_comes_twice() -> None:
    taken = list(report.turns([["a0", "a1", "a2", "a3"], ["b0"]]))
    assert taken[0] == ["a2", "b0"]
    assert sorted(item for turn in taken for item in turn) == ["a0", "a1", "a2", "a3", "b0"]
