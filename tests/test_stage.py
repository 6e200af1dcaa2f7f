"""Running a stage: its progress, its counters for Prometheus, and what of a dataset a change makes stale."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from factory import caption, metrics, stage
from factory.committer import Committer
from factory.config import micro
from factory.models import find_model
from factory.stage import PICTURES, Progress, clock
from factory.store import DamagedData, NotFinished, Store
from factory.worker import ATTEMPTS
from tests import killing

REPO = Path(__file__).parent.parent


def test_progress_tells_counts_speed_and_time_left_in_whole_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(stage.time, "monotonic", lambda: now[0])
    progress = Progress("decode", "segments", 4, "s of film", 1000.0)
    for seconds, amount, rows, failed in (
        (4, 100, 5, False),
        (6, 300, 15, False),
        (8, 300, 0, True),
        (1, 300, 7, False),
    ):
        now[0] += seconds
        progress.step(amount, rows=rows, failed=failed)
    assert capsys.readouterr().out == (
        "decode   4 segments, 1,000 s of film\n"
        # none after 4 s; what is left is judged by the film, not by the number of segments
        "decode   2/4 segments, 20 rows, 40 s of film per second, 10 s spent, 15 s left\n"
        "decode   3/4 segments, 20 rows, 1 failed, 38.9 s of film per second, 18 s spent, 8 s left\n"
        "decode   4/4 segments, 27 rows, 1 failed, 52.6 s of film per second, 19 s spent\n"
    )


def test_progress_of_nothing_says_so(capsys: pytest.CaptureFixture) -> None:
    Progress("sketch", "units of samples", 0)
    assert capsys.readouterr().out == "sketch   nothing to do\n"


def test_durations_are_told_in_words() -> None:
    assert [clock(s) for s in (0.4, 59.6, 125, 11220)] == ["0 s", "1 min 00 s", "2 min 05 s", "3 h 07 min"]


def test_a_model_is_loaded_without_a_word(capfd: pytest.CaptureFixture) -> None:
    caption._loaded.__wrapped__(str(find_model("animesketch/captioner")))
    assert "".join(capfd.readouterr()) == ""


def test_counters_follow_prometheus_conventions() -> None:
    for name in metrics.COUNTERS:
        assert re.fullmatch(r"animesketch_factory_[a-z_]+_total", name)
    with pytest.raises(KeyError):
        metrics.count("frames_per_minute", 1)


def test_a_unit_whose_worker_always_dies_is_named_and_the_others_are_published(
    ray_session: str, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "root"))
    store.create()

    def task(row: dict) -> dict:
        if row["edit"] == "bad":
            with open(tmp_path / "attempts", "a") as file:
                file.write("x")
            killing.die()
        return {
            "entry": json.dumps(store.write_unit("edits", row["edit"], [{"edit_id": row["edit"], "frame_id": "f"}]))
        }

    rows = [{"edit": name, "amount": 1} for name in ("bad", "one", "two")]
    with pytest.raises(NotFinished, match=r"(?s)^tried: 1 of 3 units .* again.*\n  \{.*'edit': 'bad'"):
        stage.run("tried", "edits", PICTURES, task, rows, Committer(store, "edits", every=8), micro())
    assert (tmp_path / "attempts").read_text() == "x" * ATTEMPTS
    assert store.committed_units("edits") == {"one", "two"}


def test_what_a_task_raises_is_raised_in_its_own_words(ray_session: str) -> None:
    def task(row: dict) -> dict:
        raise DamagedData(f"no {row['picture']} here")

    with pytest.raises(DamagedData, match="no cat here") as raised:
        list(stage.run_tasks("tried", task, [{"picture": "cat"}], micro()))
    assert str(getattr(raised.value, "cause", None)) == "no cat here"


def test_what_a_stage_did_is_counted(ray_session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, float] = {}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name.removeprefix("animesketch_factory_").removesuffix("_total")
            self.labels = set(metrics.COUNTERS[name][1])

        def inc(self, amount: float, tags: dict[str, str]) -> None:
            assert set(tags) == self.labels
            assert tags["stage"] == "tried"
            found[self.name] = found.get(self.name, 0) + amount

    monkeypatch.setattr(metrics, "_counter", Recorder)
    wanted = _run_a_stage(tmp_path)
    assert 0 < found.pop("stage_seconds") < 60
    assert found == wanted


@pytest.mark.soak
def test_ray_serves_what_a_stage_did(ray_session: str, tmp_path: Path) -> None:
    wanted = _run_a_stage(tmp_path)
    found = _scraped("tried", {*wanted, "stage_seconds"})
    assert 0 < found.pop("stage_seconds") < 60
    assert found == wanted


def _run_a_stage(tmp_path: Path) -> dict[str, float]:
    """Run a stage of two good units and a bad one; return what its counters must come to, its seconds left out."""
    store = Store(str(tmp_path / "root"))
    store.create()

    def task(row: dict) -> dict:
        if row["edit"] == "bad":
            return {"entry": json.dumps({"error": "the worker ended"})}
        rows = [{"edit_id": row["edit"] + end, "frame_id": "f"} for end in "ab"]
        return {"entry": json.dumps(store.write_unit("edits", row["edit"], rows))}

    rows = [{"edit": name, "amount": 3} for name in ("one", "two", "bad")]
    failures = stage.run("tried", "edits", PICTURES, task, rows, Committer(store, "edits", every=1), micro())
    assert [failure["error"] for failure in failures] == ["the worker ended"]
    written = sum(file.stat().st_size for file in (tmp_path / "root/edits.lance/data").iterdir())
    return {
        "units": 3,
        "rows": 4,
        "pictures": 6,
        "written_bytes": written,
        "failures": 1,
    }


def _scraped(of_stage: str, names: set[str]) -> dict[str, float]:
    """The values of the factory's counters `names` for a stage, once Ray's metrics page has all of them."""
    import ray

    (node,) = ray.nodes()
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    line = re.compile(rf'^ray_animesketch_factory_(\w+)_total\{{.*stage="{of_stage}".*\}} (\S+)$', re.M)
    deadline = time.monotonic() + 90
    found: dict[str, float] = {}
    while found.keys() < names and time.monotonic() < deadline:
        time.sleep(0.5)
        with urllib.request.urlopen(url, timeout=10) as page:
            found = {name: float(value) for name, value in line.findall(page.read().decode())}
    return found


def test_what_the_caller_set_for_ray_data_stays(ray_session: str) -> None:
    import ray.data

    held = ray.data.DataContext.get_current()
    before = (held.enable_progress_bars, held.print_on_execution_start, held.max_errored_blocks)

    def double(row: dict) -> dict:
        return {"n": 2 * row["n"]}

    assert -1 not in before[2:], "else this test could not fail"
    answers = stage.run_tasks("double", double, [{"n": 1, "amount": 1}, {"n": 2, "amount": 1}], micro())
    assert sorted(row["n"] for row in answers) == [2, 4]
    assert ray.data.DataContext.get_current() is held
    assert (held.enable_progress_bars, held.print_on_execution_start, held.max_errored_blocks) == before


def _in_a_ray_of_its_own(script: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=REPO, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_stage_that_asks_for_more_cores_than_there_are_does_not_wait_for_ever() -> None:
    told = _in_a_ray_of_its_own(
        "import os, ray; from factory.session import ray_session\n"
        "with ray_session(os.cpu_count() + 3):\n"
        "    print(ray.cluster_resources()['CPU'] - os.cpu_count())\n"
        "    print(ray.get_runtime_context().gcs_address)\n"
        "    print(ray.get(ray.remote(lambda: os.environ['RAY_ADDRESS']).remote()), os.environ.get('RAY_ADDRESS'))"
    )
    cpus, address, in_a_worker, after = told.split()
    assert cpus == "3.0"
    # beside another Ray, a worker would ask that one: which has never heard of a run's controller, and ends the run
    assert in_a_worker.rpartition(":")[2] == address.rpartition(":")[2]
    assert after == "None"


def test_a_gpu_that_is_not_there_is_wrong_usage() -> None:
    told = _in_a_ray_of_its_own(
        "from factory.session import check_gpus, ray_session; from factory.settings import UsageError\n"
        "with ray_session(2):\n"
        "    try: check_gpus(64)\n"
        "    except UsageError as error: print(error)"
    )
    assert told == "64 GPU(s) asked for, but Ray sees fewer on this machine. Give --set num_gpus=0.\n"


def test_sketches_are_drawn_on_the_gpu_by_workers_that_stay() -> None:
    told = _in_a_ray_of_its_own(
        "import os, ray; from factory import stage; from factory.config import micro\n"
        "from factory.settings import load\n"
        "ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, logging_level='ERROR', log_to_driver=False)\n"
        "def task(row): return {'pid': os.getpid(), 'gpus': os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n"
        "config = load(micro(), None, ['num_gpus=1'])\n"
        "for name in ('sketch', 'caption'):\n"
        "    answers = list(stage.run_tasks(name, task, [{'n': n} for n in range(8)], config))\n"
        "    print({a['gpus'] for a in answers}, len(answers), len({a['pid'] for a in answers}) < 8)\n"
        "ray.shutdown()"
    )
    assert told.splitlines()[-2:] == ["{'0'} 8 True", "{''} 8 True"]
