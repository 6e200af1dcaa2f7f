"""Settings: layers, checks, and what an unknown key is answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from factory.config import micro, paper
from factory.settings import absolute, load


def test_file_then_overrides_are_laid_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("selection: {min_sharpness: 50, min_contrast: 0.1}\ncommit_every: 3\n")
    config = load(paper(), str(file), ["selection.min_sharpness=80", "split.holdout=[a.mp4, b.mp4]"])
    assert config.selection.min_sharpness == 80
    assert config.selection.min_contrast == 0.1
    assert config.selection.min_short_side == 1080
    assert config.commit_every == 3
    assert config.split.holdout == ("a.mp4", "b.mp4")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selection.min_sharpnes=80", "Did you mean selection.min_sharpness"),
        ("selektion.min_sharpness=80", "Did you mean selection"),
        ("selection.min_sharpness=very", "selection.min_sharpness"),
        ("video.segment_seconds=0", "segment_seconds must be above 0"),
        ("sketch.converter=magic", "xdog"),
        ("selection", "key=value"),
        ("selection.min_sharpness=[", "not valid YAML"),
        ("split.holdout=!!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_a_bad_override_is_refused_with_what_to_do(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(micro(), None, [override])


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        load(micro(), str(tmp_path / "c.yaml"))


def test_a_job_refuses_relative_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match=r'--root "\$PWD/data"'):
        absolute("data", "--root")
    assert absolute("/data", "--root") == "/data"
    assert absolute("s3://bucket/data", "--root") == "s3://bucket/data"
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert absolute("data", "--root") == str(Path("data").absolute())


def test_fingerprints_change_with_their_stage_only() -> None:
    before = micro().fingerprints()
    after = load(micro(), None, ["selection.min_sharpness=80"]).fingerprints()
    assert {stage for stage in before if before[stage] != after[stage]} == {"select"}
    how = load(micro(), None, ["video.segment_seconds=7", "video.decode_threads=2"]).fingerprints()
    assert how == before
