"""Settings: layers, checks, and what an unknown key is answered."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from factory.config import micro, paper
from factory.settings import absolute, changes, load, template


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping of settings, found NoneType"),
        ("commit_every: &a 3\nsamples_per_unit: *a\n", "aliases .* are refused"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases .* are refused"),
        ("[" * 10_000, "not valid YAML"),
        ("caption: {model: 3}\n", "Setting caption.model: Input should be a valid string"),
        ("caption: null\n", "Setting caption"),
        ("num_cpus: 0\n", "num_cpus must be above 0"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(micro(), tmp_path / "c.yaml")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No config file .*absent.yaml. Print one to start from"):
        load(micro(), tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match=r"cannot be read as text: .*directory"):
        load(micro(), tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read as text"):
        load(micro(), tmp_path / "binary.yaml")


def test_the_template_has_every_setting_with_the_comment_above_its_field() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Inner:
        # How much.
        # In litres.
        much: float = 1.5

    @dataclass(frozen=True, kw_only=True)
    class Outer:
        """Not a comment."""

        # The inner one.
        inner: Inner = field(default_factory=Inner)
        # Names.
        names: tuple[str, ...] = ("a, b", "no", "#1")
        bare: int | None = None

    assert template(Outer()) == (
        "# The inner one.\ninner:\n  # How much.\n  # In litres.\n  much: 1.5\n"
        "# Names.\nnames: ['a, b', 'no', '#1']\nbare: null\n"
    )
    assert changes(Outer(inner=Inner(much=2), bare=3), Outer()) == ["inner.much=2", "bare=3"]


def test_every_group_of_the_factorys_settings_begins_with_a_comment() -> None:
    lines = template(micro()).splitlines()
    assert lines[0].startswith("# ")
    for before, line in itertools.pairwise(lines):
        if before.endswith(":"):
            assert line.strip().startswith("# "), f"the first setting of {before} has no comment over its field"


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
