"""Settings: layers, checks, and what an unknown key is answered."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from factory import models, transnetv2
from factory.config import STAGES, micro, paper
from factory.settings import absolute, changes, load, template
from factory.sketch import engine
from factory.video import RUNTIME_ONLY


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


XDOG, SHOTS, INTERVAL = ["sketch.converter=xdog"], [], ["video.frames=interval"]
PUBLISHED = ["sketch.converter=anime2sketch", "sketch.model=/models/lines"]
NETWORK, KEYS = ["video.detector=transnetv2"], ["video.frames=keyframes"]
NO_DUPLICATES = ["selection.duplicate_hash_bits=null"]
# what is set before, the setting that changes, and the stages whose results can differ by it
DECIDES: list[tuple[list[str], str, str]] = [
    *[([], f"{name}=3", "") for name in ("commit_every", "samples_per_unit", "num_cpus", "num_gpus")],
    ([], "split.validation_share=0.5", ""),
    ([], "split.holdout=[a]", ""),
    *[([], f"video.{name}=9", "") for name in (*RUNTIME_ONLY,) if name != "cache_folder"],
    ([], "video.cache_folder=/x", ""),
    ([], "video.frames=keyframes", "decode"),
    ([], "video.interval_seconds=9", ""),
    (INTERVAL, "video.interval_seconds=9", "decode"),
    ([], "video.detector=transnetv2", "decode"),
    (KEYS, "video.detector=transnetv2", ""),
    *[
        (before, f"video.{name}=0.27", stages)
        for name in ("max_shot_seconds", "min_shot_seconds", "transition_seconds", "same_picture", "other_picture",
                     "dissolve_residual", "black_level")
        for before, stages in ((SHOTS, "decode"), (NETWORK, "decode"), (KEYS, ""), (INTERVAL, ""))
    ],
    *[
        (before, f"video.{name}=0.27", stages)
        for name in ("min_change", "adaptive_threshold", "dissolve_similarity")
        for before, stages in ((SHOTS, "decode"), (NETWORK, ""), (KEYS, ""))
    ],
    *[(KEYS, f"video.{change}", "decode") for change in ("crop_bars=false", "crop_subtitles=true", "jpeg_quality=90")],
    *[
        ([], f"selection.{name}=0.5", "select")
        for name in ("max_text_share", "max_subtitle_share", "min_brightness", "max_brightness", "min_contrast",
                     "min_entropy", "min_sharpness", "duplicate_change")
    ],
    *[([], f"selection.{name}=9", "select") for name in ("min_short_side", "duplicate_hash_bits")],
    (NO_DUPLICATES, "selection.duplicate_change=0.5", ""),
    *[([], f"sketch.{grid}", "") for grid in ("tile=512", "overlap=64", "tile_offset=64", "batch=2")],
    *[(PUBLISHED, f"sketch.{grid}", "sketch") for grid in ("tile=512", "overlap=64")],
    ([], "sketch.model=/models/lines", "sketch"),
    ([], "sketch.brighten_below=0.5", "sketch"),
    ([], "sketch.size=512", "sketch"),
    (["sketch.size=512"], "sketch.square=pad", "sketch"),
    ([], "sketch.converter=xdog", "sketch"),
    *[([], f"sketch.xdog.{name}=3", "") for name in ("sigma", "k", "p", "epsilon", "phi")],
    *[(XDOG, f"sketch.xdog.{name}=3", "sketch") for name in ("sigma", "k", "p", "epsilon", "phi")],
    ([], "caption.model=rule:colours-1", "caption"),
    ([], "caption.keywords=[ink]", ""),
]  # fmt: skip


@pytest.mark.parametrize(("before", "change", "stages"), DECIDES)
def test_a_setting_makes_stale_what_can_differ_by_it(
    before: list[str], change: str, stages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "files_hash", str)  # /models/lines is not there
    old, new = load(micro(), None, before), load(micro(), None, [*before, change])
    assert old != new
    assert {stage for stage in STAGES if old.fingerprint(stage) != new.fingerprint(stage)} == set(stages.split())


def test_every_setting_is_in_that_table() -> None:
    def names(config: Any, prefix: str = "") -> set[str]:
        values = {f"{prefix}{field.name}": getattr(config, field.name) for field in fields(config)}
        below = [names(value, f"{name}.") for name, value in values.items() if is_dataclass(value)]
        return {name for name, value in values.items() if not is_dataclass(value)}.union(*below)

    assert names(micro()) == {change.split("=")[0] for _, change, _ in DECIDES}


def test_the_files_of_a_model_are_part_of_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def captioner(change: str) -> str:
        folder = tmp_path / (change or "as-it-is") / "captioner"
        shutil.copytree(models.WEIGHTS / "captioner", folder)
        if change:
            (folder / change).write_text((folder / change).read_text() + " ")
        return load(micro(), None, [f"caption.model={folder}"]).fingerprint("caption")

    asked = ("tokenizer.json", "tokenizer_config.json", "config.json", "preprocessor_config.json")
    same = captioner("")
    assert captioner("README.md") == same
    assert len({same, *(captioner(name) for name in asked)}) == 1 + len(asked)

    def network(*more: str) -> str:
        return load(micro(), None, [*NETWORK, *more]).fingerprint("decode")

    before, unasked = network(), network(*KEYS)
    monkeypatch.setattr(transnetv2, "sha256_file", lambda path: f"{path.name} of other weights")
    assert network() != before
    assert network(*KEYS) == unasked
