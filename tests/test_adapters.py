"""The folder of adapters: what is put there is served, what is taken away is not, what is replaced is another one."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from factory.files import SUMS, new_folder, write_atomic
from serving.adapters import Adapters
from tests.asking import CONFIG, GENERATIONS, GOOD, FakeBackend, ask, check_error
from trainer.adapter import WEIGHTS


def put(folder: Path, name: str, number: float = 1.0, *, run: bool = False) -> None:
    with new_folder(folder / name / "adapter" if run else folder / name) as aside:
        write_atomic(aside / WEIGHTS, save({"a": np.full(9, number)}))


def test_a_folder_of_adapters_is_looked_at_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapters = Adapters(str(tmp_path / "adapters"))
    assert adapters.names() == []
    put(tmp_path / "adapters", "lines")
    put(tmp_path / "adapters", "a-run", run=True)
    (tmp_path / "adapters" / "empty").mkdir()
    (tmp_path / "adapters" / ".hidden").mkdir()
    whole = save({"a": np.zeros(9)})
    (tmp_path / "adapters" / "bare.safetensors").write_bytes(whole)
    (tmp_path / "adapters" / "coming.safetensors").write_bytes(whole[:-1])
    put(tmp_path / "adapters", "two words")
    (tmp_path / "adapters" / "README.md").write_text("ours")
    with caplog.at_level(logging.WARNING, "ray.serve"):
        for _ in range(2):
            assert adapters.names() == ["a-run", "bare.safetensors", "lines"]
    told = sorted(record.getMessage() for record in caplog.records)
    assert [line.partition(" is not served: ")[0] for line in told] == [
        "README.md",
        "coming.safetensors",
        "empty",
        "two words",
    ]  # once each
    assert WEIGHTS in told[2]
    (tmp_path / "adapters" / "coming.safetensors").write_bytes(whole)
    assert adapters.find("coming.safetensors") is not None
    shutil.copytree(tmp_path / "adapters" / "lines", tmp_path / "adapters" / "half", ignore=lambda *_: [SUMS])
    assert adapters.find("half") is None  # it could never be loaded
    put(tmp_path / "adapters", "torn")
    (tmp_path / "adapters" / "torn" / WEIGHTS).write_bytes(whole[:-1])
    assert adapters.find("torn") is None  # its sums are there before its weights
    before = adapters.find("lines")
    assert before is not None
    assert before == adapters.find("lines")
    put(tmp_path / "adapters", "lines", 2.0)
    after = adapters.find("lines")
    assert after is not None
    assert (after.name, after.path) == (before.name, before.path)
    assert after.id != before.id
    shutil.rmtree(tmp_path / "adapters" / "lines")
    assert adapters.find("lines") is None


@pytest.mark.parametrize("name", ["../adapters", "..", "", "/etc", "lines/../lines", "lines\0", "a" * 200])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    put(tmp_path / "adapters", "lines")
    put(tmp_path, "secret")
    assert Adapters(str(tmp_path / "adapters")).find(name) is None
    assert Adapters(None).find("lines") is None


def test_a_request_names_its_adapter(tmp_path: Path) -> None:
    put(tmp_path, "lines")
    config = dataclasses.replace(CONFIG, adapter_folder=str(tmp_path))
    listed: list[dict[str, Any]] = ask("GET", "/v1/models", config=config).json()["data"]
    assert [model["id"] for model in listed] == ["animesketch", "lines"]
    assert [ask("GET", f"/v1/models/{model['id']}", config=config).json() for model in listed] == listed
    check_error(ask("GET", "/v1/models/other", config=config), 404, "model", "model_not_found")
    for name, served in (("lines", "lines"), ("animesketch", None)):
        backend = FakeBackend()
        assert ask("POST", GENERATIONS, backend=backend, config=config, json={**GOOD, "model": name}).status_code == 200
        (job,) = backend.jobs
        assert (job.adapter and job.adapter.name) == served
    missing = ask("POST", GENERATIONS, config=config, json={**GOOD, "model": "../lines"})
    check_error(missing, 404, "model", "model_not_found")
