"""The demo: failing steps, what is made anew, its end by Ctrl-C, its journal."""

import contextlib
import json
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import demo, pictures
from cluster.journal import Journal, fingerprint
from cluster.local import CommandFailed, run
from tests.test_local import running

REPOSITORY = Path(__file__).resolve().parent.parent
Disk = namedtuple("Disk", "total used free")


def test_a_failed_step_stops_the_demo_with_its_log_and_status_1(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def fail(folder: Path, *, log: Path) -> None:
        run([sys.executable, "-c", "print('No codec can write this.'); raise SystemExit(5)"], log=log)

    monkeypatch.setattr(demo.footage, "draw_clips", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert demo.main(["--output", str(tmp_path / "demo")]) == 1
    told = capsys.readouterr().err
    assert "ended with status 5" in told
    assert "No codec can write this." in told
    assert str(tmp_path / "demo/logs/footage.log") in told
    assert not (tmp_path / "demo/dataset").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "/data/x"), "The demo stopped: No space left on device: /data/x"),
        (FileNotFoundError("No table /x. Run: y"), "The demo stopped: No table /x. Run: y"),
    ],
)
def test_an_error_of_the_system_is_told_in_one_line(
    error: OSError, told: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def fail(folder: Path, *, log: Path) -> None:
        raise error

    monkeypatch.setattr(demo.footage, "draw_clips", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert demo.main(["--output", str(tmp_path / "demo")]) == 1
    assert capsys.readouterr().err.strip() == told


class Steps:
    """The demo's steps without what they do: each leaves the files that tell that it was done."""

    def __init__(self, output: Path, monkeypatch: pytest.MonkeyPatch):
        self._output = output
        self.done: list[str] = []
        self.code: dict[str, str] = {}  # in place of the code's bytes
        monkeypatch.setattr(demo.footage, "draw_clips", self.draw_clips)
        monkeypatch.setattr(demo.footage, "fetch_bunny", lambda folder, log: (folder / demo.footage.BUNNY).touch())
        monkeypatch.setattr(demo, "LocalCluster", lambda log: contextlib.nullcontext(self))
        monkeypatch.setattr(demo, "server", lambda *_: contextlib.nullcontext("http://x"))
        monkeypatch.setattr(demo, "write_report", lambda output, journal: output / "report.html")
        monkeypatch.setattr(pictures, "requests_for", lambda *_: [])
        monkeypatch.setattr(pictures, "ask", lambda *_: self.fill("images/index.json") or [])
        monkeypatch.setattr(demo, "fingerprint", lambda *given, code: repr((given, [self.code.get(c) for c in code])))

    def draw_clips(self, folder: Path, *, log: Path) -> None:
        names = [f"toon-{i:02}{end}" for i in range(demo.footage.CLIPS) for end in (".mp4", ".truth.json")]
        self.fill(*(f"footage/{name}" for name in names))

    def submit(self, entrypoint: list[str], *, log: Path) -> None:
        self.fill("dataset/samples.lance/x" if "factory" in entrypoint else "run/adapter/SHA256SUMS")

    def fill(self, *names: str) -> None:
        for name in names:
            (self._output / name).parent.mkdir(parents=True, exist_ok=True)
            (self._output / name).touch()
        self.done.append(names[0].split("/")[0])


def test_what_comes_of_changed_footage_or_code_is_made_anew(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    steps = Steps(tmp_path, monkeypatch)
    demo.demo(tmp_path)
    everything = ["footage", "dataset", "run", "images"]
    assert steps.done == everything
    for changed, redone in (
        ("", []),
        ("serving", ["images"]),
        ("trainer", ["run", "images"]),
        ("factory", ["dataset", "run", "images"]),
        ("factory/toon", ["footage", "dataset", "run", "images"]),
    ):
        steps.done.clear()
        steps.code[changed] = "changed"
        for folder in everything:
            (tmp_path / folder / "old").touch()
        capsys.readouterr()
        demo.demo(tmp_path)
        assert steps.done == redone, changed
        assert capsys.readouterr().out.count("code or inputs have changed: made anew") == len(redone)
        kept = {path.parent.name for path in tmp_path.glob("*/old")}
        assert kept == set(everything) - set(redone), changed


def test_ctrl_c_ends_the_demo_with_status_130(tmp_path: Path) -> None:
    script = """
import sys, cluster.demo as demo
from cluster.local import run
step = [sys.executable, "-uc", "import os, time; print(os.getpid()); time.sleep(600)"]
demo.footage.draw_clips = lambda folder, log: run(step, log=log)
sys.exit(demo.main(["--output", sys.argv[1]]))
"""
    child = subprocess.Popen(
        [sys.executable, "-uc", script, str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    step = psutil.Process(next(int(line) for line in child.stdout if line.strip().isdigit()))
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert errors.strip().startswith("Stopped; everything that was started has been ended.")
    assert not running(step)


@pytest.mark.parametrize(
    ("free", "why"), [(10**9, "has 1.0 GB free; the demo needs 3 GB."), (10**12, "Another demo is running")]
)
def test_what_the_demo_can_not_use_is_told_in_one_line(free: int, why: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda path: Disk(10**13, 0, free))
    with contextlib.ExitStack() as stack:
        if free == 10**12:
            stack.enter_context(demo.one_at_a_time(tmp_path))
        with pytest.raises(CommandFailed) as caught, demo.one_at_a_time(tmp_path):
            pass
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_step_is_done_once_and_again_when_its_inputs_change(tmp_path: Path) -> None:
    done = []
    result = tmp_path / "result"

    def once(key: str) -> None:
        with Journal(tmp_path / "demo.json").step("a", "A step") as step:
            if step.needed(key, result.exists(), anew=result):
                step.command(["python", "-m", "a b"])
                done.append(key)
                result.mkdir(exist_ok=True)
                (result / key).touch()

    for key in ("1", "1", "2"):
        once(key)
    assert done == ["1", "2"]
    assert [path.name for path in result.iterdir()] == ["2"]  # made anew
    written = json.loads((tmp_path / "demo.json").read_text())["steps"]["a"]
    assert written["commands"] == ["python -m 'a b'"]

    def fail() -> None:
        with Journal(tmp_path / "demo.json").step("a", "A step") as step:
            assert step.needed("3", True)
            raise CommandFailed("no")

    with pytest.raises(CommandFailed):
        fail()
    once("3")  # a failed step does not count as done
    assert done == ["1", "2", "3"]


def test_fingerprints_see_code_and_inputs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("cluster.journal.REPOSITORY", tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.py").write_text("1")
    first = fingerprint(["in"], code=["a"])
    assert first == fingerprint(["in"], code=["a"])
    assert first != fingerprint(["other"], code=["a"])
    (tmp_path / "a/x.py").write_text("2")
    assert first != fingerprint(["in"], code=["a"])
