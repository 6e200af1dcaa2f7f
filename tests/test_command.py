"""The command line: what it says to those who type too little, or wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from factory import tags
from factory.__main__ import DONE, UNFINISHED, USAGE, main
from factory.arguments import VERBS, new_parser
from factory.config import micro, paper
from factory.settings import NothingThere, UsageError, load
from factory.store import Store, StoreError

REPO = Path(__file__).parent.parent


def _refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """What is said on standard error when the command line is wrong."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == USAGE
    return capsys.readouterr().err


def test_without_arguments_it_says_what_can_be_done(capsys: pytest.CaptureFixture) -> None:
    told = _refused([], capsys)
    assert "python -m factory build films/ --root /data/anime" in told
    for verb in VERBS:
        assert f"\n    {verb} " in told
    assert "exit codes: 0 done; 1 not finished" in told


def test_a_wrong_verb_is_answered_with_the_nearest(capsys: pytest.CaptureFixture) -> None:
    assert "no verb 'biuld'. Did you mean build?" in _refused(["biuld", "films"], capsys)
    assert "no verb 'captions'. Did you mean caption?" in _refused(["captions", "--root", "/d"], capsys)
    assert f"Verbs: {', '.join(VERBS)}." in _refused(["xyz"], capsys)


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_teaches_by_examples_that_parse(verb: str, capsys: pytest.CaptureFixture) -> None:
    import shlex

    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert "exit codes:" in told
    for example in VERBS[verb][1]:
        assert f"  python -m factory {example}\n" in told
        assert new_parser().parse_args(shlex.split(example.split(" > ")[0])).verb == verb


@pytest.mark.parametrize("preset", [micro, paper])
def test_the_printed_config_is_one_that_config_takes(
    preset: object, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made = preset()  # type: ignore[operator]
    assert main(["config", "--preset", preset.__name__, "--set", "caption.keywords=[ink, 'a: b']"]) == 0  # type: ignore[attr-defined]
    printed = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(printed)
    wanted = load(made, None, ["caption.keywords=[ink, 'a: b']"])
    for base in (micro(), paper()):
        assert load(base, tmp_path / "c.yaml") == wanted
    assert "  # Least short side of a frame (pixels).\n  min_short_side: " in printed


def test_config_prints_the_settings_that_a_root_was_written_with(
    small_dataset: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["config", "--root", str(small_dataset)]) == 0
    assert "  holdout: [toon-01.mp4]\n" in capsys.readouterr().out
    assert main(["config", "--root", str(small_dataset), "--preset", "micro"]) == 0
    assert "  holdout: []\n" in capsys.readouterr().out


def test_a_model_that_is_not_there_changes_no_root_and_makes_none(
    ray_session: str, small_dataset: Path, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = Store(str(tmp_path / "root"))
    shutil.copytree(small_dataset, store.root)
    before = store.settings()
    wrong = ["--set", "caption.model=/gone/blip"]
    assert main(["caption", "--root", str(store.root), *wrong]) == USAGE
    assert store.settings() == before
    assert main(["build", str(film), "--root", str(tmp_path / "new"), *wrong]) == USAGE
    assert not list(tmp_path.glob("new/*.lance"))
    assert capsys.readouterr().err.count("No model '/gone/blip'. Give a folder that exists") == 2


def test_a_commit_that_a_power_cut_tore_is_removed_by_the_next_command(
    ray_session: str, small_dataset: Path, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "root"))
    shutil.copytree(small_dataset, store.root)
    digests = store.digests("samples")
    torn = digests.manifest(digests.versions()[-1] + 1)
    torn.write_bytes(b"half a manifest")
    with pytest.raises(StoreError):
        store.table("samples")
    assert main(["caption", "--root", str(store.root)]) == DONE
    assert not torn.exists()


def test_settings_of_another_version_are_refused_with_what_to_do(
    small_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import shutil

    from factory.store import Store

    shutil.copytree(small_dataset, tmp_path / "root")
    store = Store(str(tmp_path / "root"))
    store.keep_settings({**(store.settings() or {}), "colour_of_the_sky": "blue"})
    assert main(["select", "--root", str(store.root)]) == USAGE
    told = capsys.readouterr().err
    assert "colour_of_the_sky" in told
    assert "Give --preset." in told


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("that is no film"), USAGE),
        (NothingThere("no such model"), USAGE),
        (StoreError("try again"), UNFINISHED),
        (FileNotFoundError(2, "No such file or directory", "/tables/1.lance"), UNFINISHED),
        (ValueError("a bug"), None),
        (KeyError("a bug"), None),
    ],
)
def test_only_wrong_usage_is_told_as_such_and_a_bug_keeps_its_trace(
    error: Exception,
    code: int | None,
    small_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(tags, "tags", fails)
    command = ["tag", "--root", str(small_dataset)]
    if code is None:
        with pytest.raises(type(error), match="a bug"):
            main(command)  # Python prints the trace, and ends with 1
    else:
        assert main(command) == code
        assert f"factory: {error}" in capsys.readouterr().err


def test_status_prints_the_funnel(small_dataset: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["status", "--root", str(small_dataset)]) == 0
    text = capsys.readouterr().out
    assert "duplicate" in text
    assert main(["status", "--root", str(small_dataset), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["candidates"] == counts["kept"] + sum(counts["dropped"].values())
    assert counts["samples"] == counts["sketched"] == counts["captioned"] == counts["kept"]
    assert set(counts["splits"]) == {"train", "validation"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "--root", "/nonexistent/root"], "python -m factory build"),
        (["select", "--root", "/nonexistent/root"], "python -m factory build"),
        (["compact", "--root", "/tmp/never-made"], "python -m factory build"),
        (["config", "--root", "/tmp/never-made"], "python -m factory build"),
        (["report", "--root", "/tmp/never-made"], "python -m factory build"),
        (
            ["build", "/nonexistent/film.mp4", "--root", "/tmp/never-made"],
            "'/nonexistent/film.mp4' cannot be looked at: No such file or directory.",
        ),
        (["build", f"{REPO}/tests/*.mp4", "--root", "/tmp/never-made"], "No video at"),
        (["build", f"{REPO}/factory", "--root", "/tmp/never-made"], "in folders these count: .mp4, "),
        (["build", f"{REPO}/docs/demo.jpg", "--root", f"{REPO}/README.md"], "README.md is no folder"),
        (["build", f"{REPO}/docs/demo.jpg", "--root", f"{REPO}/README.md/x"], "README.md is a file"),
        (
            ["select", "--root", "/tmp/two words"],
            "build SOURCES --root '/tmp/two words'",
        ),
        (
            ["build", f"{REPO}/docs/demo.jpg", "--root", "/tmp/never-made", "--set", "split.validation_share=2"],
            "factory: split.validation_share must lie in [0, 1), got 2.0.\n",
        ),
        (
            ["build", "/nonexistent/film.mp4", "--root", "/tmp/never-made", "--set", "video.jpegquality=1"],
            "Did you mean",
        ),
    ],
)
def test_wrong_usage_says_what_to_do(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == USAGE
    assert message in capsys.readouterr().err
    assert not Path("/tmp/never-made").exists()
