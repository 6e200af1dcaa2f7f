"""Verify: each flip, truncation and removal in the files of a dataset is found and named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import lance
import pytest

from factory import schema, tags
from factory.__main__ import DONE, UNFINISHED, USAGE, main
from factory.committer import Committer
from factory.compact import compact
from factory.store import Store
from factory.verify import Report, verify


def picture_rows(unit: int, size: int = 100_000) -> list[dict]:
    """Three candidates of one segment whose pictures are random bytes, `size` of each, with their sha256."""
    pictures = [random.Random(f"{unit}-{i}").randbytes(size) for i in range(3)]
    return [
        {
            "frame_id": f"{unit:04d}-{i}",
            "source_id": "s",
            "segment_id": f"u{unit}",
            "image": picture,
            "image_sha256": hashlib.sha256(picture).hexdigest(),
            "sharpness": float(unit),
        }
        for i, picture in enumerate(pictures)
    ]


def dataset(root: Path) -> Store:
    """A dataset with small, middling and large pictures (Lance stores them differently), tagged, then updated."""
    store = Store(str(root))
    store.create()
    committer = Committer(store, "candidates", every=1)
    for unit, size in enumerate((100, 100_000, 6_000_000)):
        committer.add(store.write_unit("candidates", f"u{unit}", picture_rows(unit, size)))
    tags.tag(store, "first")
    kept = [{"frame_id": f"0000-{i}", "status": "kept", "score": 1.5} for i in range(3)]
    committer.add(store.write_updates("candidates", 0, kept))
    sources = Committer(store, "sources", every=1)
    sources.add(store.write_unit("sources", "all", [{"source_id": "s", "uri": "/films/a.mp4", "status": "ok"}]))
    return store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return dataset(tmp_path / "root")


def files_of(store: Store, *suffixes: str) -> list[Path]:
    return sorted(path for path in store.root.rglob("*") if path.suffix in suffixes and path.is_file())


@contextlib.contextmanager
def flipped(file: Path, rng: random.Random) -> Iterator[None]:
    """Flip a random bit of a file, and back."""
    place, bit = rng.randrange(file.stat().st_size), 1 << rng.randrange(8)
    for turn in range(2):
        with open(file, "r+b") as handle:
            handle.seek(place)
            byte = handle.read(1)[0]
            handle.seek(place)
            handle.write(bytes([byte ^ bit]))
        if turn == 0:
            yield


def named(report: Report, file: Path) -> bool:
    return any(damage.file and str(file).endswith(f"{damage.table}.lance/{damage.file}") for damage in report.damaged)


def flips_found(store: Store, files: list[Path], flips: int, seed: int) -> int:
    """Flip one bit at a time, in each file in turn, and count how often verify names the file."""
    rng, found = random.Random(seed), 0
    for number in range(flips):
        file = files[number % len(files)]
        with flipped(file, rng):
            found += named(verify(store), file)
    return found


def test_what_was_written_is_whole_and_all_of_it_is_read(store: Store) -> None:
    report = verify(store)
    assert (report.damaged, report.unrecorded, report.pictures) == ([], [], 9)
    on_disk = files_of(store, ".lance", ".blob", ".manifest")
    assert report.files == len(on_disk)
    assert report.bytes == sum(file.stat().st_size for file in on_disk) > 18_000_000


def test_every_flipped_byte_is_found(store: Store) -> None:
    files = files_of(store, ".lance", ".blob", ".manifest")
    assert flips_found(store, files, len(files), seed=0) == len(files) >= 12
    assert verify(store).damaged == []


def test_each_file_cut_short_or_gone_is_found(store: Store) -> None:
    tables = {name: store.table(name).version for name in schema.TABLES}
    needed = [store.digests(name).manifest(version) for name, version in tables.items()]
    needed += [store.digests(name).manifest(version) for name, version in tags.tags(store)["first"].items()]
    for file in [*files_of(store, ".lance", ".blob"), *dict.fromkeys(needed)]:
        data = file.read_bytes()
        os.truncate(file, len(data) - 1)
        assert named(verify(store), file), f"{file} cut short"
        file.unlink()
        assert named(verify(store), file), f"{file} gone"
        file.write_bytes(data)
    assert verify(store).damaged == []


def test_a_damaged_picture_is_named_by_its_row(store: Store) -> None:
    (packed,) = [file for file in files_of(store, ".blob") if file.stat().st_size == 300_000]
    with open(packed, "r+b") as handle:
        handle.seek(150_000)
        handle.write(b"damaged!")
    of_file, of_row = verify(store).damaged
    assert of_file.keys == ("0001-0", "0001-1", "0001-2")
    assert of_row.keys == ("0001-1",)
    assert "image does not match" in of_row.problem


def test_pictures_that_were_mixed_up_in_whole_files_are_found(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    store.create()
    rows = picture_rows(0)
    rows[0]["image"], rows[1]["image"] = rows[1]["image"], rows[0]["image"]
    Committer(store, "candidates", every=1).add(store.write_unit("candidates", "u0", rows))
    (damage,) = verify(store).damaged
    assert damage.keys == ("0000-0", "0000-1")


def test_a_damaged_list_of_removed_rows_is_found(store: Store) -> None:
    sources = Committer(store, "sources", every=1)
    rows = [{"source_id": key, "uri": f"/films/{key}.mp4"} for key in "abc"]
    sources.add(store.write_unit("sources", "more", rows[:2]))
    sources.add(store.write_unit("sources", "last", rows[2:]))
    store.remove("sources", {"a", "c"})
    assert sorted(store.table("sources").to_table(columns=["source_id"])["source_id"].to_pylist()) == ["b", "s"]
    report = verify(store)
    assert (report.damaged, report.unrecorded) == ([], [])
    (removed,) = (Path(store.uri("sources")) / "_deletions").iterdir()
    with flipped(removed, random.Random(0)):
        (damage,) = verify(store).damaged
    assert (damage.file, damage.keys) == (f"_deletions/{removed.name}", ("a", "c"))
    compact(store, "sources", rows=8, older_than=timedelta(0))
    assert verify(store).damaged == []
    assert store.table("sources").count_rows() == 2


def test_rows_that_something_else_added_are_found(store: Store) -> None:
    lance.write_dataset(schema.to_table("sources", [{"source_id": "s"}]), store.uri("sources"), mode="append")
    report = verify(store)
    assert [damage.problem for damage in report.damaged] == ["has no readable digest"]
    assert report.unrecorded == ["sources, version 3"]


def test_the_digest_of_a_commit_that_was_cut_off_is_taken_by_the_next_writer(store: Store) -> None:
    (store.root / "_digests" / "candidates" / f"v{store.table('candidates').version:012d}.json").unlink()
    assert verify(store).unrecorded == [f"candidates, version {store.table('candidates').version}"]
    Committer(store, "candidates", every=1)
    assert verify(store).unrecorded == []


def test_a_damaged_digest_is_said_to_be_unreadable(store: Store) -> None:
    folder = store.root / "_digests" / "candidates"
    digest = next(file for file in sorted(folder.iterdir()) if not file.name.startswith("v"))
    whole = digest.read_text()
    for damaged in (whole.replace('"files"', '"fhles"'), whole.replace('"keys"', '"kays"'), whole[:-1], "\xff"):
        digest.write_text(damaged, "latin-1")
        assert [damage.problem for damage in verify(store).damaged] == ["has no readable digest"]


def test_a_flipped_byte_in_the_ledger_makes_its_unit_be_done_again(tmp_path: Path) -> None:
    store, rng = Store(str(tmp_path / "root")), random.Random(0)
    store.create()
    (folder := store.root / "_ledger" / "candidates").mkdir(parents=True, exist_ok=True)
    for unit in range(100):
        before = store.write_unit("candidates", f"u{unit}", picture_rows(unit, 100))
        assert store.ledger("candidates") == [before]
        (file,) = folder.glob("*.json")
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        assert store.ledger("candidates") == []
        again = store.write_unit("candidates", f"u{unit}", picture_rows(unit, 100))
        assert again["files"].keys().isdisjoint(before["files"])
        assert store.ledger("candidates") == [again]
        store.strike("candidates", f"u{unit}")


def test_the_command_says_what_is_damaged(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["verify", "--root", str(store.root)]
    assert main(arguments) == DONE
    assert "nothing damaged" in capsys.readouterr().out
    file = next(file for file in files_of(store, ".lance"))
    file.unlink()
    assert main(arguments) == UNFINISHED
    assert f"data/{file.name}: is gone (3 rows: " in capsys.readouterr().out
    assert main([*arguments, "--json"]) == UNFINISHED
    damaged = json.loads(capsys.readouterr().out)["damaged"]
    assert (damaged[0]["file"], len(damaged[0]["keys"])) == (f"data/{file.name}", 3)
    assert main(["verify", "--root", str(tmp_path / "absent")]) == USAGE
    assert "python -m factory build" in capsys.readouterr().err
