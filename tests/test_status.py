"""What a change makes stale, what status tells of it, and that a stage redoes its own part only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from factory import caption, models, pipeline, status, tasks
from factory.__main__ import INTERRUPTED, main
from factory.config import STAGES, FactoryConfig, micro
from factory.settings import load
from factory.sources import find_sources
from factory.store import Store

OVERRIDES = ["split.holdout=[toon-01.mp4]", "split.validation_share=0"]
NOTHING = {"decode": 0, "select": 0, "sketch": 0, "caption": 0}


def _config(*more: str) -> FactoryConfig:
    return load(micro(), None, [*OVERRIDES, *more])


@pytest.fixture
def store(small_dataset: Path, tmp_path: Path) -> Store:
    """A copy of the small dataset, to change."""
    shutil.copytree(small_dataset, tmp_path / "root")
    return Store(str(tmp_path / "root"))


def _rows(store: Store) -> dict[str, dict]:
    return {row["frame_id"]: row for row in store.table("samples").to_table().to_pylist()}


def _changed(before: dict[str, dict], after: dict[str, dict]) -> set[str]:
    """The columns that differ in any row; of pictures what the table tells of them."""
    assert before.keys() == after.keys()
    return {name for key, row in before.items() for name, value in row.items() if value != after[key][name]}


@pytest.mark.parametrize(
    ("override", "stage", "columns"),
    [
        ("caption.model=rule:colours-1", "caption", {"caption", "caption_by"}),
        (
            "sketch.converter=xdog",
            "sketch",
            {"sketch", "sketch_sha256", "ink_ratio", "tone", "training_sketch", "thumbnail"},
        ),
    ],
)
def test_a_build_with_another_model_redoes_its_stage_only(
    override: str, stage: str, columns: set[str], store: Store, films: Path, capsys: pytest.CaptureFixture
) -> None:
    before, samples = _rows(store), status.funnel(store)["samples"]
    candidates = store.table("candidates").version
    config = _config(override)
    assert status.stale(store, config) == NOTHING | {stage: samples}
    pipeline.build(store, find_sources([str(films)]), config)
    assert status.stale(store, config) == NOTHING
    after = _rows(store)
    assert _changed(before, after) == {*columns, "stages"}
    assert {
        name for key in after for name, value in after[key]["stages"].items() if value != before[key]["stages"][name]
    } == {stage}
    assert store.table("candidates").version == candidates
    lines = capsys.readouterr().out.splitlines()
    idle = {line.split()[0] for line in lines if line.endswith("nothing to do")}
    assert idle == {"decode", "samples", "sketch", "caption"} - {stage}


def test_other_keywords_are_written_without_a_caption(store: Store, capsys: pytest.CaptureFixture) -> None:
    before, samples = _rows(store), status.funnel(store)["samples"]
    config = _config("caption.keywords=[ink]")
    assert status.stale(store, config) == NOTHING | {"caption": samples}
    pipeline.caption(store, config)
    after = _rows(store)
    assert _changed(before, after) == {"keywords"}
    assert {tuple(row["keywords"]) for row in after.values()} == {("ink",)}
    assert status.stale(store, config) == NOTHING
    assert "caption  nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("task", [tasks.DrawSketches, tasks.WriteCaptions])
def test_networks_compute_on_one_thread_whatever_the_cpus(store: Store, task: type) -> None:
    """Of 16 sketches on four threads three differed from those on one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    address = store.table("samples").to_table(columns=[], with_row_address=True)["_rowaddr"][0].as_py()
    task(store, _config())({"fragment": address >> 32, "addresses": [address]})
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_a_new_source_appends_and_nothing_else_is_done_again(
    store: Store, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from factory.toon import plan_clip, write_clip

    (tmp_path / "series").mkdir()
    write_clip(tmp_path / "series" / "toon-02.mp4", plan_clip(44, shots=6, size=(320, 256)))
    before = _rows(store)
    pipeline.build(store, find_sources([str(films), str(tmp_path / "series")]), _config())
    after = _rows(store)
    assert {key: after[key] for key in before} == before
    assert {after[key]["source_id"] for key in after.keys() - before.keys()}.isdisjoint(
        row["source_id"] for row in before.values()
    )
    assert len(after) > len(before)
    assert "decode   1/1 segments" in capsys.readouterr().out


def test_a_model_counts_by_its_weights_not_by_its_name(tmp_path: Path) -> None:
    blips = [tmp_path / place / "blip" for place in ("here", "moved", "trained")]
    for folder in blips:
        shutil.copytree(models.WEIGHTS / "captioner", folder)
    weights = blips[2] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    configs = [_config(f"caption.model={folder}") for folder in blips]
    here, moved, trained = ({stage: config.fingerprint(stage) for stage in STAGES} for config in configs)
    assert here == moved
    assert {stage for stage in here if here[stage] != trained[stage]} == {"caption"}


def test_status_names_what_is_stale_and_the_command_that_mends_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = str(store.root)
    assert main(["status", "--root", root]) == 0
    assert "stale   nothing\n" in capsys.readouterr().out
    samples = status.funnel(store)["samples"]
    monkeypatch.setattr(caption, "VERSION", "later")
    assert main(["status", "--root", root]) == 0
    out = capsys.readouterr().out
    mend = f"python -m factory caption --root {root}"
    assert f"stale   caption: {samples} rows by other settings, code or models. Mend: {mend}\n" in out
    assert out.endswith(f"next: {mend}\n")
    assert main(mend.split()[3:]) == 0
    capsys.readouterr()
    assert main(["status", "--root", root, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stale"] == NOTHING


def test_status_tells_the_settings_and_of_a_model_that_is_gone(store: Store, capsys: pytest.CaptureFixture) -> None:
    from dataclasses import asdict, replace

    gone = replace(_config(), caption=caption.CaptionConfig(model="/models/gone"))
    store.keep_settings(asdict(gone))
    assert main(["status", "--root", str(store.root)]) == 0
    out = capsys.readouterr().out
    assert "settings caption.model=/models/gone split.holdout=[toon-01.mp4] split.validation_share=0.0\n" in out
    assert "stale?  caption: its model is not there" in out
    assert main(["select", "--root", str(store.root)]) == 0  # which needs no captioner


def test_settings_of_a_run_that_was_stopped_are_those_of_the_next(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = str(store.root)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run", stopped)
        assert main(["caption", "--root", root, "--set", "caption.keywords=[ink]"]) == INTERRUPTED
    assert main(["caption", "--root", root]) == 0
    assert {tuple(row["keywords"]) for row in _rows(store).values()} == {("ink",)}
    version = store.table("samples").version
    assert main(["caption", "--root", root]) == 0
    assert store.table("samples").version == version  # settings that are the same make no version
    assert "caption  nothing to do" in capsys.readouterr().out
