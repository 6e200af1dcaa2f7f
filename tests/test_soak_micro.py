"""The long proof of the micro family: an adapter of five minutes brings its references through.

The minutes are those of a clock: on two cores, with nothing beside it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.micro import exam
from trainer.micro.stages import Workshop

pytestmark = pytest.mark.soak


def test_five_minutes_of_training_bring_references_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exam, "SEEDS", (1,))
    torch.set_num_threads(2)
    found = exam.Exam(Workshop(tmp_path, threads=2)).adapter()["seed 1"]
    for name in ("hair", "expression", "background"):
        assert found["colour"][name] >= 0.8, found
        assert found["scale 0"][name] <= 0.35, found
    for name in ("hair_style", "expression"):
        assert found["line"][name] >= 0.75, found
