"""The whole factory on Ray: films to tables, twice, with bad files, and decided again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import lance
import pytest

from factory import pipeline, schema, settings, status, video
from factory.__main__ import SOURCES_FAILED, UNFINISHED, USAGE, main
from factory.candidates import candidate_frames, failed_candidate
from factory.config import FactoryConfig, micro
from factory.sources import describe_source, find_sources, segments_of
from factory.store import Store
from factory.verify import verify
from tests.footage import patterns, write_film

REPO = Path(__file__).parent.parent
OVERRIDES = ["split.holdout=[toon-01.mp4]", "split.validation_share=0"]


def _config(*more: str) -> FactoryConfig:
    return settings.load(micro(), None, [*OVERRIDES, *more])


def contents(root: Path) -> dict[str, list[tuple]]:
    """All rows of a dataset with the sha256 of their pictures, in the order of their keys."""
    store = Store(str(root))
    found = {}
    for name, key in schema.KEYS.items():
        columns = [f.name for f in schema.TABLES[name] if not schema.is_blob(f)]
        table = store.table(name).to_table(columns=columns, with_row_address=True)
        addresses = table["_rowaddr"].to_pylist()
        rows = table.drop_columns(["_rowaddr"]).to_pylist()
        for blob in schema.BLOBS[name] if addresses else ():
            for row, data in zip(rows, store.read_pictures(name, blob, addresses), strict=True):
                row[blob] = hashlib.sha256(data).hexdigest() if data else None
        found[name] = sorted((row[key], json.dumps(row, sort_keys=True, default=str)) for row in rows)
    return found


def test_every_row_is_complete_and_traceable(small_dataset: Path, films: Path) -> None:
    store = Store(str(small_dataset))
    samples = store.table("samples").to_table(with_row_address=True)
    rows, addresses = samples.to_pylist(), samples["_rowaddr"].to_pylist()
    truth = [json.loads(p.read_text())["shots"] for p in sorted(films.glob("*.truth.json"))]
    assert len(rows) == sum(shot["repeats"] is None for shots in truth for shot in shots)
    sources = {row["source_id"]: row for row in store.table("sources").to_table().to_pylist()}
    assert {hashlib.sha256(p.read_bytes()).hexdigest() for p in films.glob("*.mp4")} == set(sources)
    for row in rows:
        assert row["frame_id"] == f"{row['source_id'][:16]}-{round(row['timestamp'] * 1e6):012d}"
        held_out = sources[row["source_id"]]["uri"].endswith("toon-01.mp4")
        assert row["split"] == ("validation" if held_out else "train")
        assert row["caption"]
        assert row["caption_by"].startswith("animesketch/captioner@")
        assert row["keywords"] == ["anime sketch", "line art"]
        assert (row["sketch_width"], row["sketch_height"]) == (row["width"], row["height"]) == (480, 270)
        assert all(row["stages"].values())
        assert row["selected"]
        assert row["review"] == "pending"
    for blob, digest in (("image", "image_sha256"), ("sketch", "sketch_sha256")):
        for row, data in zip(rows, store.read_pictures("samples", blob, addresses), strict=True):
            assert data is not None
            assert hashlib.sha256(data).hexdigest() == row[digest]
    assert all(row["status"] == "ok" for row in sources.values())


def test_a_repeated_shot_is_dropped_as_duplicate_of_its_first_showing(small_dataset: Path, films: Path) -> None:
    store = Store(str(small_dataset))
    rows = store.table("candidates").to_table(
        columns=["frame_id", "source_id", "frame_index", "reason", "duplicate_of"]
    )
    by_id = {row["frame_id"]: row for row in rows.to_pylist()}
    for path in films.glob("*.mp4"):
        source = hashlib.sha256(path.read_bytes()).hexdigest()
        shots = json.loads(path.with_suffix(".truth.json").read_text())["shots"]

        def shot_of(row: dict, shots: list = shots) -> int:
            return next(i for i, s in enumerate(shots) if s["start"] <= row["frame_index"] < s["end"])

        dropped = [r for r in by_id.values() if r["source_id"] == source and r["reason"] == "duplicate"]
        pairs = {frozenset((shot_of(row), shot_of(by_id[row["duplicate_of"]]))) for row in dropped}
        assert pairs == {frozenset((i, s["repeats"])) for i, s in enumerate(shots) if s["repeats"] is not None}


def test_building_twice_adds_nothing(small_dataset: Path, films: Path, capsys: pytest.CaptureFixture) -> None:
    store = Store(str(small_dataset))
    before = contents(small_dataset)
    versions = {name: store.table(name).version for name in schema.TABLES}
    pipeline.build(store, find_sources([str(films)]), _config())
    assert contents(small_dataset) == before
    assert {name: store.table(name).version for name in schema.TABLES} == versions
    assert "nothing to do" in capsys.readouterr().out


def test_bad_files_are_rows_and_their_neighbours_are_complete(
    ray_session: str, small_dataset: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sources = tmp_path / "series"
    shutil.copytree(films, sources)
    for name, options in (("cut.mp4", {"movflags": "faststart"}), ("lost.mp4", {})):  # index first; index at the end
        path = write_film(sources / name, patterns(6, 24), **options)
        os.truncate(path, path.stat().st_size * 2 // 3)
    (sources / "text.mp4").write_text("this is no film")
    root = tmp_path / "root"
    sets = [part for override in OVERRIDES for part in ("--set", override)]
    arguments = ["build", str(sources), "--root", str(root), *sets]
    assert main(arguments) == SOURCES_FAILED
    assert main([*arguments, "--allow-failures"]) == 0
    rows = Store(str(root)).table("sources").to_table(columns=["uri", "status", "error", "candidates"]).to_pylist()
    found = {Path(row["uri"]).name: row for row in rows}
    assert {name: row["status"] for name, row in found.items()} == {
        "toon-00.mp4": "ok",
        "toon-01.mp4": "ok",
        "cut.mp4": "partial",  # its readable beginning is kept, the rest is a failed candidate
        "lost.mp4": "failed",
        "text.mp4": "failed",
    }
    assert "Invalid data" in found["text.mp4"]["error"]
    assert re.match(r"after \d+\.\d\d s, decode: ", found["cut.mp4"]["error"])
    source = describe_source(str(sources / "cut.mp4"), _config().video)
    (segment,) = segments_of(source)
    readable = []
    with contextlib.suppress(RuntimeError):
        readable.extend(row["frame_id"] for row in candidate_frames(segment, _config().video, in_order=True))
    held = Store(str(root)).table("candidates").to_table(columns=["frame_id", "source_id", "status"]).to_pylist()
    of_cut = [row for row in held if row["source_id"] == source["source_id"]]
    assert sorted(row["frame_id"] for row in of_cut if row["status"] != "failed") == sorted(readable)
    assert len(of_cut) == len(readable) + 1 >= 4  # and what could not be read
    assert contents(root)["samples"] == contents(small_dataset)["samples"]
    assert "cut.mp4" in capsys.readouterr().out


def test_a_film_that_moved_goes_on_where_it_is_now(
    ray_session: str, small_dataset: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, root = tmp_path / "series", tmp_path / "root"
    shutil.copytree(films, folder)
    store = Store(str(root))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipeline.build(store, find_sources([str(folder)]), _config())
    assert status.unfinished(status.funnel(store), status.stale(store, _config())) == ["build"]
    folder.rename(tmp_path / "moved")
    assert main(["select", "--root", str(root)]) == UNFINISHED
    pipeline.build(store, find_sources([str(tmp_path / "moved")]), _config())
    assert contents(root)["samples"] == contents(small_dataset)["samples"]
    uris = store.table("sources").to_table(columns=["uri"])["uri"].to_pylist()
    assert {Path(uri).parent.name for uri in uris} == {"moved"}


def test_a_segment_that_was_too_slow_is_tried_again_with_other_limits(
    ray_session: str, small_dataset: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = Store(str(tmp_path / "root"))
    paths = find_sources([str(films)])
    store.create()
    pipeline.add_sources(store, paths, _config())  # files are opened under the deadline too
    hurried = _config("video.deadline_seconds=0.01", "video.deadline_per_second=0")
    for _ in range(2):
        pipeline.build(store, paths, hurried)
    assert "decode   nothing to do" in capsys.readouterr().out  # with the same limits it is not tried again
    columns = ["status", "reason", "segment_id"]
    failed = store.table("candidates").to_table(columns=columns).to_pylist()
    assert [row["status"] for row in failed] == ["failed", "failed"]
    rows = store.table("sources").to_table(columns=["status", "error"]).to_pylist()
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert all("not finished after 0." in row["error"] for row in rows)
    later = _config("video.deadline_seconds=0.02", "video.deadline_per_second=0")
    pipeline.decode(store, paths, later)
    units = {row["segment_id"] for row in failed}
    failed = store.table("candidates").to_table(columns=columns).to_pylist()
    assert ["not finished after 0." in row["reason"] for row in failed] == [True, True]
    assert units.isdisjoint(row["segment_id"] for row in failed)  # they name the limits
    pipeline.build(store, paths, _config())
    assert contents(tmp_path / "root") == contents(small_dataset)
    assert verify(store).damaged == []


def test_a_segment_that_is_done_has_no_row_that_says_it_took_too_long(
    ray_session: str, small_dataset: Path, films: Path, tmp_path: Path
) -> None:
    """Its worker died after it entered that row into the ledger, and another one was quicker."""
    root = tmp_path / "root"
    shutil.copytree(small_dataset, root)
    store, config = Store(str(root)), _config()
    source = store.table("sources").to_table().to_pylist()[0]
    segment = segments_of(source)[0]
    failed = failed_candidate(segment, 0.0, "not finished", config.video.limits)
    failed |= {"decode_fingerprint": config.fingerprint("decode")}
    store.write_unit("candidates", segment.within(config.video.limits), [failed])
    pipeline.build(store, find_sources([str(films)]), config)
    assert contents(root) == contents(small_dataset)


def test_a_source_keeps_its_split(ray_session: str, small_dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(small_dataset, root)
    store = Store(str(root))
    rows = _rows(store)
    strictest = sorted(row["sharpness"] for row in rows)[len(rows) // 2]
    root2 = tmp_path / "strict"
    shutil.copytree(small_dataset, root2)
    shutil.rmtree(root2 / "samples.lance")
    strict = Store(str(root2))
    strict.create()
    pipeline.select(strict, _config(f"selection.min_sharpness={strictest}"))
    fewer = len(_rows(strict))
    pipeline.select(strict, settings.load(micro(), None, ["split.validation_share=0"]))  # the holdout is not repeated
    assert 0 < fewer < len(_rows(strict)) == len(rows)
    assert {r["frame_id"]: r["split"] for r in _rows(strict)} == {r["frame_id"]: r["split"] for r in rows}


def _flip_a_picture(store: Store, name: str, where: str | None = None) -> tuple[str, Path, bytes]:
    """Flip a byte of the first picture in a table, `where` that holds; return its key, its file, what the file was."""
    row = store.table(name).to_table(columns=["frame_id"], filter=where, with_row_address=True).to_pylist()[0]
    (picture,) = store.read_pictures(name, "image", [row["_rowaddr"]])
    assert picture is not None
    (file,) = [
        path for path in Path(store.uri(name), "data").rglob("*") if path.is_file() and picture in path.read_bytes()
    ]
    whole = file.read_bytes()
    at = whole.index(picture) + len(picture) // 2
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    return row["frame_id"], file, whole


def test_a_damaged_picture_is_named_and_its_neighbours_go_on(
    ray_session: str, small_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "root"
    shutil.copytree(small_dataset, root)
    store = Store(str(root))
    damaged, file, whole = _flip_a_picture(store, "samples")
    command = ["sketch", "--root", str(root), "--set", "sketch.size=240"]
    assert main(command) == UNFINISHED
    told = capsys.readouterr()
    assert f"The image of {damaged} in samples does not match its sha256" in told.err
    assert (
        f"1 damaged picture(s) were left out. See which files it is: python -m factory verify --root {root}" in told.err
    )
    assert told.out.endswith(f"next: python -m factory sketch --root {root}\n")
    assert {row["frame_id"]: row["sketch_width"] for row in _rows(store)} == {
        row["frame_id"]: 480 if row["frame_id"] == damaged else 240 for row in _rows(store)
    }
    assert len(_rows(store)) > 5
    captions = ["caption", "--root", str(root), "--set", "caption.model=rule:colours-1"]
    assert main(captions) == UNFINISHED  # though the sketch comes next
    assert capsys.readouterr().out.endswith(f"next: python -m factory sketch --root {root}\n")
    file.write_bytes(whole)
    assert main(command) == 0  # its own part is done, though a caption is not
    assert {row["sketch_width"] for row in _rows(store)} == {240}
    assert main(captions) == 0


def test_a_damaged_candidate_is_not_passed_on_and_its_neighbours_are(
    ray_session: str, small_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "root"
    shutil.copytree(small_dataset, root)
    wanted = {row["frame_id"] for row in _rows(Store(str(root)))}
    shutil.rmtree(root / "samples.lance")
    store = Store(str(root))
    store.create()
    damaged, file, whole = _flip_a_picture(store, "candidates", "status = 'kept'")
    assert main(["select", "--root", str(root)]) == UNFINISHED
    assert f"The image of {damaged} in candidates does not match its sha256" in capsys.readouterr().err
    assert {row["frame_id"] for row in _rows(store)} == wanted - {damaged} < wanted
    file.write_bytes(whole)
    assert main(["select", "--root", str(root)]) == 0
    assert {row["frame_id"] for row in _rows(store)} == wanted


def test_the_same_bytes_under_two_names_are_one_source(ray_session: str, films: Path, tmp_path: Path) -> None:
    shutil.copy(films / "toon-00.mp4", tmp_path / "b.mp4")
    shutil.copy(films / "toon-00.mp4", tmp_path / "a.mp4")
    store = Store(str(tmp_path / "root"))
    pipeline.build(store, find_sources([str(tmp_path)]), _config())
    (uri,) = store.table("sources").to_table(columns=["uri"])["uri"].to_pylist()
    assert uri.endswith("a.mp4")
    assert status.funnel(store)["kept"] == status.funnel(store)["samples"] == 5


def test_selection_sketches_and_captions_change_columns_only(
    ray_session: str, small_dataset: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(small_dataset, root)
    store = Store(str(root))
    before = {row["frame_id"]: row for row in _rows(store)}
    sharpest = max(row["sharpness"] for row in before.values())

    pipeline.select(store, _config(f"selection.min_sharpness={sharpest - 1}"))
    assert [row["selected"] for row in _rows(store)].count(True) == 1
    assert status.funnel(store)["dropped"]["blurred"] >= len(before) - 1
    pipeline.select(store, _config())
    assert {row["frame_id"]: row["selected"] for row in _rows(store)} == dict.fromkeys(before, True)

    pipeline.sketch(store, _config("sketch.size=240"))
    pipeline.caption(store, _config("caption.keywords=[ink]"))
    for row in _rows(store):
        old = before[row["frame_id"]]
        assert (row["sketch_width"], row["sketch_height"]) == (240, 135)
        assert row["sketch_sha256"] != old["sketch_sha256"]
        assert row["keywords"] == ["ink"]
        changed = {stage for stage, value in row["stages"].items() if value != old["stages"][stage]}
        assert changed == {"sketch"}
        assert row["image_sha256"] == old["image_sha256"]
    table = store.table("samples")
    addresses = table.to_table(columns=["image_sha256"], with_row_address=True).to_pylist()
    for row, data in zip(
        addresses, store.read_pictures("samples", "image", [r["_rowaddr"] for r in addresses]), strict=True
    ):
        assert hashlib.sha256(data or b"").hexdigest() == row["image_sha256"]


def _rows(store: Store) -> list[dict]:
    return store.table("samples").to_table().to_pylist()


def test_a_command_starts_from_the_settings_of_the_one_before(
    ray_session: str, small_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "root"
    shutil.copytree(small_dataset, root)
    assert main(["sketch", "--root", str(root), "--set", "sketch.size=240"]) == 0
    capsys.readouterr()
    assert main(["sketch", "--root", str(root)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["sketch", "--root", str(root), "--preset", "micro"]) == 0
    assert {row["sketch_width"] for row in _rows(Store(str(root)))} == {480}


def test_other_video_settings_are_refused_on_an_old_root(
    ray_session: str,
    small_dataset: Path,
    film: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    before = {name: Store(str(small_dataset)).table(name).version for name in schema.TABLES}
    arguments = ["build", str(film), "--root", str(small_dataset), "--set", "video.memory_limit_mb=8000"]
    assert main([*arguments, "--set", "video.jpeg_quality=80"]) == USAGE
    told = capsys.readouterr().err
    assert told.endswith("with other video settings. Take a new --root, or give --set=video.jpeg_quality=95\n")
    with monkeypatch.context() as patch:
        patch.setattr(video, "VERSION", "another")
        assert main(arguments) == USAGE
    assert "was decoded by another version. Use that one, or a new --root." in capsys.readouterr().err
    assert {name: Store(str(small_dataset)).table(name).version for name in schema.TABLES} == before


def test_a_stage_keeps_its_own_settings_only(
    ray_session: str, small_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = Store(str(tmp_path / "root"))
    shutil.copytree(small_dataset, store.root)
    before = store.settings() or {}
    assert main(["sketch", "--root", str(store.root), "--set", "video.jpeg_quality=80"]) == USAGE
    assert "--set video.jpeg_quality=80: sketch does not use it. Give it to build." in capsys.readouterr().err
    config = tmp_path / "c.yaml"
    config.write_text("video: {jpeg_quality: 80}\nsketch: {size: 240}\nnum_cpus: 0.5\n")
    assert main(["sketch", "--root", str(store.root), "--config", str(config)]) == 0
    expected = before | {"sketch": before["sketch"] | {"size": 240}, "num_cpus": 0.5}
    assert store.settings() == expected
    config.write_text("video: {jpeg_quality: 80}\nsketch: {size: 120}\ncaption: {keywords: [ink]}\nnum_cpus: 0.5\n")
    assert main(["caption", "--root", str(store.root), "--config", str(config)]) == 0
    assert store.settings() == expected | {"caption": before["caption"] | {"keywords": ["ink"]}}
    assert "next:" not in capsys.readouterr().out  # by the kept settings all is done


def test_stock_lance_reads_the_samples(small_dataset: Path) -> None:
    frame = lance.dataset(str(small_dataset / "samples.lance")).to_table(columns=["frame_id", "caption", "timestamp"])
    assert frame.num_rows > 5
    assert frame.to_pandas()["caption"].str.len().min() > 10
