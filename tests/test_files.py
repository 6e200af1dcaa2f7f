"""Files: whole or not at all, and folders whose damage is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from factory.files import SUMS, DamagedFolder, check_sealed, new_folder, write_atomic


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "file"
    write_atomic(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_a_folder_appears_sealed_and_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with new_folder(target) as aside:
        (aside / "x.bin").write_bytes(b"1")
        (aside / "below").mkdir()
        (aside / "below" / "y.bin").write_bytes(b"2")
        assert not target.exists()
    check_sealed(target)
    with new_folder(target) as aside:
        (aside / "x.bin").write_bytes(b"3")
    check_sealed(target)
    assert sorted(p.name for p in target.iterdir()) == [SUMS, "x.bin"]
    with pytest.raises(FileNotFoundError), new_folder(target) as aside:
        (aside / "absent" / "x.bin").write_bytes(b"4")
    assert (target / "x.bin").read_bytes() == b"3"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "unseal"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    target = tmp_path / "folder"
    with new_folder(target) as aside:
        (aside / "x.bin").write_bytes(bytes(100))
    file = target / "x.bin"
    if damage == "flip":
        file.write_bytes(bytes(50) + b"\x01" + bytes(49))
    elif damage == "cut":
        file.write_bytes(bytes(99))
    elif damage == "remove":
        file.unlink()
    else:
        (target / SUMS).unlink()
    with pytest.raises(DamagedFolder, match=SUMS if damage == "unseal" else r"x\.bin"):
        check_sealed(target)
