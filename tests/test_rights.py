"""Whose the sources are: the YAML file, what is refused in it, and the columns that it writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from factory import intake
from factory.__main__ import USAGE, main
from factory.rights import RightsFile
from factory.store import Store

UNKNOWN = {"title": None, "rights_holder": None, "licence": "unknown", "url": None, "redistributable": None}
TEXT = """
"**":
  rights_holder: Studio Example
"show one/*.mkv":
  title: Show One
  licence: CC-BY-4.0
  url: https://example.org/one
  redistributable: true
"show one/ep2.mkv":
  title: Show One, episode two
  redistributable: false
"""


def _file(folder: Path, text: str) -> RightsFile:
    path = folder / "sources.yaml"
    path.write_text(text)
    return RightsFile(str(path))


def test_entries_name_sources_by_path_or_glob_and_later_ones_lie_over_earlier(tmp_path: Path) -> None:
    rights = _file(tmp_path, TEXT)
    studio = UNKNOWN | {"rights_holder": "Studio Example"}
    one = studio | {
        "title": "Show One",
        "licence": "CC-BY-4.0",
        "url": "https://example.org/one",
        "redistributable": True,
    }
    two = one | {"title": "Show One, episode two", "redistributable": False}
    assert rights.rights_of(f"{tmp_path}/show one/ep1.mkv") == one
    assert rights.rights_of(f"{tmp_path}/show one/ep2.mkv") == two
    assert rights.rights_of(f"{tmp_path}/show one/extras/ep1.mkv") == studio  # * stays within a folder
    assert rights.rights_of("/elsewhere/show one/ep1.mkv") is None
    assert rights.rights_of(f"s3:/{tmp_path}/show one/ep1.mkv") is None
    assert rights.unused([f"{tmp_path}/show one/ep1.mkv"]) == ["show one/ep2.mkv"]


@pytest.mark.parametrize("pattern", ["show one", "show one/", "show */", ".", "show one/extras/ep1.mkv"])
def test_a_folder_stands_for_what_lies_below_it(tmp_path: Path, pattern: str) -> None:
    rights = _file(tmp_path, f"{pattern!r}: {{licence: CC0-1.0}}")
    found = rights.rights_of(f"{tmp_path}/show one/extras/ep1.mkv")
    assert found == UNKNOWN | {"licence": "CC0-1.0"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mkv: {license: MIT}", r"'a\.mkv': Unknown setting license\. Did you mean licence\?"),
        ("a.mkv: {redistributable: perhaps}", r"'a\.mkv': Setting redistributable: .*'perhaps'"),
        ("a.mkv: {licence: null}", r"'a\.mkv': Setting licence"),
        ("a.mkv: {title: [one, two]}", r"'a\.mkv': Setting title"),
        ("a.mkv: CC0-1.0", r"'a\.mkv' must hold a mapping, found 'CC0-1\.0'"),
        ("- a.mkv", "must map paths or globs to rights"),
        ("", "must map paths or globs to rights"),
        ("a: [", "is not valid YAML"),
        ("a: !!python/object/apply:os.getpid []", "is not valid YAML"),
    ],
)
def test_what_is_wrong_in_it_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _file(tmp_path, text)


def _sources(store: Store) -> dict[str, dict[str, Any]]:
    rows = store.table("sources").to_table(columns=["uri", *UNKNOWN]).to_pylist()
    return {Path(row.pop("uri")).name: row for row in rows}


def test_a_changed_file_changes_the_rows_and_decodes_nothing(
    small_dataset: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "root"
    shutil.copytree(small_dataset, root)
    store = Store(str(root))
    assert _sources(store) == {"toon-00.mp4": UNKNOWN, "toon-01.mp4": UNKNOWN}
    versions = [store.table(name).version for name in ("candidates", "samples")]
    file = films.parent / "sources.yaml"
    for licence in ("CC-BY-4.0", "CC0-1.0"):
        file.write_text(f'"{films.name}/*-00.mp4": {{licence: {licence}}}\nabsent.mkv: {{licence: MIT}}\n')
        intake.record_rights(store, RightsFile(str(file)))
        assert _sources(store) == {"toon-00.mp4": UNKNOWN | {"licence": licence}, "toon-01.mp4": UNKNOWN}
        said = capsys.readouterr().out
        assert "1 of 2 sources changed" in said
        assert "'absent.mkv' names no source" in said
    version = store.table("sources").version
    intake.record_rights(store, RightsFile(str(file)))
    assert store.table("sources").version == version
    assert [store.table(name).version for name in ("candidates", "samples")] == versions


def test_build_takes_the_file(ray_session: str, small_dataset: Path, films: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(small_dataset, root)
    file = films.parent / "rights.yaml"
    file.write_text(f"{films.name}: {{title: Drawn}}\n")
    arguments = ["build", str(films), "--root", str(root), "--set", "split.validation_share=0"]
    assert main([*arguments, "--sources-file", f"file://{file}"]) == 0
    assert main(arguments) == 0  # without it the rows stay as they are
    assert _sources(Store(str(root))) == dict.fromkeys(("toon-00.mp4", "toon-01.mp4"), UNKNOWN | {"title": "Drawn"})
    assert main([*arguments, "--sources-file", str(tmp_path / "absent.yaml")]) == USAGE
