"""SIGKILL of every part at every point, then the same command again: the rows equal the undisturbed run's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from factory import pipeline, settings, tasks
from factory.__main__ import DONE, UNFINISHED, main
from factory.config import FactoryConfig, micro
from factory.sources import find_sources
from factory.store import Store
from factory.verify import verify
from tests.footage import patterns, write_film
from tests.killing import KilledOnce, noted_tasks, runs
from tests.test_factory import OVERRIDES, contents

REPO = Path(__file__).parent.parent
SMALL_UNITS = ["commit_every=1", "samples_per_unit=4"]


def test_killed_before_any_effect_on_the_disk_the_store_ends_as_if_undisturbed(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.crash_points", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)
    whole, killed = found["whole"], found["killed"]
    assert whole["keys"] == [f"{unit}-{i}" for unit in ("late", "u0", "u1", "u2") for i in range(2)]
    assert whole["units"] == ["empty", "late", "u0", "u1", "u2"]
    assert whole["ledger"] == whole["damaged"] == []
    names = {
        "write_fragments",
        "replace",
        "commit",
        "unlink",
        "update_columns",
        "update_config",
        "cleanup_old_versions",
    }
    assert names <= set(whole["effects"])
    assert len(killed) > 50
    written = whole.pop("effects").count("write_fragments")
    for number, case in enumerate(killed):
        # One process writes the units in turn: it had one in hand, and what the ledger holds is not written again.
        assert case.pop("effects").count("write_fragments") <= written + 1, number
        assert case == {**whole, "first": -signal.SIGKILL}, number


_DRIVER = """
    import os, signal, sys
    from pathlib import Path
    from factory import pipeline
    from factory.__main__ import main
    from factory.committer import Committer
    from tests.killing import noted_tasks

    def commit_and_die(self, operation, units, commit=Committer._commit):
        wanted = self._name == sys.argv[2] and units
        if not wanted or sys.argv[1] == "after":
            commit(self, operation, units)
        if wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    Committer._commit = commit_and_die
    pipeline.tasks = noted_tasks(Path(sys.argv[3]))
    main(sys.argv[4:])
"""


@pytest.mark.parametrize(
    ("when", "table", "task"), [("before", "candidates", "DecodeSegment"), ("after", "samples", "AppendSamples")]
)
def test_a_driver_killed_beside_its_commit(
    when: str,
    table: str,
    task: str,
    ray_session: str,
    small_dataset: Path,
    films: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "root"
    sets = [part for override in (*OVERRIDES, *SMALL_UNITS) for part in ("--set", override)]
    build = ("build", str(films), "--root", str(root))
    driver = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_DRIVER), when, table, str(tmp_path), *build, *sets],
        cwd=REPO,
        env={**os.environ, "RAY_ADDRESS": ray_session},
        timeout=180,
    )
    assert driver.returncode == -signal.SIGKILL
    store = Store(str(root))
    assert store.ledger(table)  # written
    assert bool(store.table(table).count_rows()) == (when == "after")
    done = store.committed_units(table).union(*(entry["units"] for entry in store.ledger(table)))
    before = runs(tmp_path)
    monkeypatch.setattr(pipeline, "tasks", noted_tasks(tmp_path))
    pipeline.build(store, find_sources([str(films)]), small_units())
    again = [run for run in runs(tmp_path)[len(before) :] if run in before]
    # Nothing that was committed or in the ledger; of the others those in hand, one per worker.
    assert all(run.startswith(f"{task} ") for run in again)
    assert len(again) <= sum(run.startswith(f"{task} ") for run in before) - len(done) <= 4
    assert contents(root) == contents(small_dataset)
    assert verify(store).damaged == []


@pytest.mark.parametrize(
    ("task", "point"),
    [
        ("DecodeSegment", "before the ledger"),
        ("AppendSamples", "at the start"),
        ("DrawSketches", "mid-unit"),
        ("WriteCaptions", "before the answer"),
    ],
)
def test_a_task_whose_worker_was_killed_is_run_again_and_no_other(
    task: str,
    point: str,
    ray_session: str,
    small_dataset: Path,
    films: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace_task(monkeypatch, task, point, tmp_path)
    store = Store(str(tmp_path / "root"))
    pipeline.build(store, find_sources([str(films)]), small_units())
    assert contents(store.root) == contents(small_dataset)
    assert verify(store).damaged == []
    inputs = runs(tmp_path)
    assert len(inputs) == len(set(inputs)) + 1 >= 3


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a film of two shots and a coarser copy of it, whose frames are duplicates that lose."""
    folder = tmp_path_factory.mktemp("copies")
    for name, crf in (("better.mp4", "12"), ("copy.mp4", "24")):
        write_film(folder / name, patterns(2, 24, (480, 270)), encoder={"crf": crf})
    return folder


@pytest.fixture(scope="module")
def undisturbed(ray_session: str, copies: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    store = Store(str(tmp_path_factory.mktemp("undisturbed") / "root"))
    pipeline.build(store, find_sources([str(copies)]), small_units())
    found = contents(store.root)
    samples = [json.loads(row) for _, row in found["samples"]]
    sources = {row["source_id"]: row["uri"] for row in (json.loads(text) for _, text in found["sources"])}
    assert [Path(sources[row["source_id"]]).name for row in samples] == ["better.mp4"] * 2
    return found


def test_a_decoder_that_was_killed_is_started_again_in_the_same_build(
    undisturbed: dict, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_task(monkeypatch, "DecodeSegment", "the decoder, once", tmp_path, "better.mp4")
    store = Store(str(tmp_path / "root"))
    pipeline.build(store, find_sources([str(copies)]), small_units())
    assert (tmp_path / "killed").exists()
    assert contents(store.root) == undisturbed


def test_nothing_is_selected_without_a_film_whose_decoder_is_always_killed(
    undisturbed: dict, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    store = Store(str(tmp_path / "root"))
    sets = [part for override in (*OVERRIDES, *SMALL_UNITS) for part in ("--set", override)]
    command = ["build", str(copies), "--root", str(store.root), *sets]
    with monkeypatch.context() as patch:
        replace_task(patch, "DecodeSegment", "the decoder, at each attempt", tmp_path, "better.mp4")
        assert main(command) == UNFINISHED
    told = capsys.readouterr().err
    assert "1 source(s) are not decoded to their end. Run the same build again." in told
    assert "better.mp4: decode: the process was killed from outside (SIGKILL)" in told
    rows = store.table("sources").to_table(columns=["uri", "status", "error"]).to_pylist()
    assert {Path(row["uri"]).name: row["status"] for row in rows} == {"better.mp4": "pending", "copy.mp4": "ok"}
    assert store.table("candidates").count_rows("status is not null") == store.table("samples").count_rows() == 0
    assert main(["select", "--root", str(store.root)]) == UNFINISHED
    assert main(["status", "--root", str(store.root)]) == DONE
    told = capsys.readouterr().out
    assert "better.mp4: decode: the process was killed from outside" in told
    assert main(command) == DONE
    assert contents(store.root) == undisturbed


def small_units() -> FactoryConfig:
    return settings.load(micro(), None, [*OVERRIDES, *SMALL_UNITS])


def replace_task(monkeypatch: pytest.MonkeyPatch, task: str, point: str, folder: Path, word: str = "") -> None:
    """Put a KilledOnce around one of the pipeline's tasks."""
    original = getattr(tasks, task)
    made = {**vars(tasks), task: lambda *arguments: KilledOnce(original(*arguments), point, folder, word)}
    monkeypatch.setattr(pipeline, "tasks", SimpleNamespace(**made))
