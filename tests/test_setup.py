"""Setting up: the environment that `make` makes, and the targets."""

import ast
import re
import runpy
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SETUP = REPOSITORY / "cluster/setup_env.py"
Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def setup_env() -> Any:
    return namedtuple("Module", "main globals")(*(lambda g: (g["main"], g))(runpy.run_path(str(SETUP))))


def test_setup_parses_on_old_pythons() -> None:
    ast.parse(SETUP.read_text(), feature_version=(3, 6))


def test_an_old_python_is_told_in_one_line(setup_env: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "requirements.lock").write_text("a==1\n")
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    assert setup_env.main(str(tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Python 3.9 is too old: AnimeSketch needs 3.11 or newer.")


def test_a_small_disk_is_told_in_one_line(setup_env: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "requirements.lock").write_text("a==1\n")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk(10**11, 10**11 - 10**9, 10**9))
    assert setup_env.main(str(tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"has 1\.0 GB free: AnimeSketch needs 10 GB", line)
    assert not (tmp_path / ".venv").exists()


def test_setup_installs_once_and_again_when_the_lock_changes(setup_env: Any, tmp_path: Path, monkeypatch: Any) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("# nothing to install\n")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk(10**12, 0, 10**12))
    asked = []
    popen = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda command, **more: asked.append(command) or popen(command, **more))
    assert setup_env.main(str(tmp_path)) == 0
    (installed,) = [command for command in asked if "install" in command]
    assert installed[-3:] == ["--use-pep517", "-r", str(lock)]  # or an older pip speaks of a deprecated way
    asked.clear()
    assert setup_env.main(str(tmp_path)) == 0
    assert asked == []  # nothing was even looked at
    lock.write_text("# another\n")
    assert setup_env.main(str(tmp_path)) == 0
    assert sum("install" in command for command in asked) == 1


def test_make_names_every_target() -> None:
    told = subprocess.run(["make", "-s", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert {"demo", "test", "bench", "soak", "lint", "lock"} <= set(re.findall(r"make (\w+)", told))
