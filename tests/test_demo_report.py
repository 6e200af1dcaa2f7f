"""The demo's report: the dataset's page with training, pictures and commands."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import report
from cluster.pictures import JUDGED
from factory.report import funnel, sample_rows
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
    rows.append({"step": 0, "validation_loss": 0.75, "base_validation_loss": 0.5})
    rows.append({"step": 40, "validation_loss": 0.0625})
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = []
    for i, request in enumerate(requests_for(small_dataset, ["toon-01.mp4"])):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
        index.append({"file": f"{i}.png", **vars(request), "prompt": request.prompt + "<script>alert(1)</script>"})
    (tmp_path / "images/index.json").write_text(json.dumps(index))
    return tmp_path


def test_the_report_is_one_file_that_tells_it_all(finished_demo: Path) -> None:
    steps = {"dataset": {"title": "Dataset", "key": "k", "seconds": 61.2, "commands": ["ray job submit -- x"]}}
    page = report.write_report(
        finished_demo, {"steps": steps, "versions": {"ray": "2.60.0"}, "machine": "2 cores"}
    ).read_text()
    store = Store(str(finished_demo / "dataset"))
    told = funnel(store)
    assert f"{told['kept']} of {told['candidates']} candidates kept" in page
    for source in ("toon-00.mp4", "toon-01.mp4"):
        assert f"<td>{source}</td>" in page
    for row in sample_rows(store):
        assert row["caption"] in page
        assert f"{row['source']} at {row['timestamp']:.2f} s" in page
    assert "adapter: keywords, sketch" in page
    near = sum(item["shows"] == JUDGED for item in json.loads((finished_demo / "images/index.json").read_text()))
    assert re.search(rf"hair style<br>by chance \d+\.\d, in the sketches themselves \d</dt><dd>\d of {near}<", page)
    assert "0.0625" in page
    assert "<dd>0.5000</dd>" in page
    assert "base alone<" in page
    assert "alignment step<" in page
    assert f"<dd>{sum(0.9 / i for i in range(21, 31)) / 10:.3f}</dd>" in page
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


def test_the_edit_lists_judge_captions_and_pictures(small_dataset: Path) -> None:
    import cv2

    from cluster import truth
    from factory import toon

    store = Store(str(small_dataset))
    drawn = truth.scenes(store)
    samples = store.table("samples").to_table(columns=["frame_id"], filter="selected").to_pylist()
    assert set(drawn) == {row["frame_id"] for row in samples}
    told = truth.captions(store, drawn)
    assert sum(part.count for part in told) == len(drawn)
    assert told[0].right > told[0].count / 2
    assert told[0].attributes > 0.9
    assert truth.captions(store, {key: toon.Scene(lighting="dark") for key in drawn})[0].right == 0

    scenes = {
        str(i): toon.random_scene(random.Random(i), figures=(toon.random_figure(random.Random(i)),)) for i in range(8)
    }
    scenes = {key: replace(scene, camera="bust", lighting="day") for key, scene in scenes.items()}
    sketches = {
        key: cv2.imencode(".png", toon.draw(scene, (128, 128)).lines)[1].tobytes() for key, scene in scenes.items()
    }
    for found in truth.pictures(sketches, sketches, scenes):
        assert found.right == found.in_sketches >= 6
        assert found.by_chance < 4
    others = dict(zip(sketches, [*list(sketches.values())[1:], sketches["0"]], strict=True))
    assert sum(found.right for found in truth.pictures(others, sketches, scenes)) < 12
    blank = dict.fromkeys(scenes, cv2.imencode(".png", np.full((64, 64), 255, np.uint8))[1].tobytes())
    for found in truth.pictures(blank, sketches, scenes):  # always the same: as good as chance, and no better
        assert found.right == pytest.approx(found.by_chance)
