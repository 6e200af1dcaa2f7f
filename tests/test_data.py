"""The order of training, what is drawn for it, and what `samples.lance` must hold."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import lance
import numpy as np
import pytest
import torch
from PIL import Image

from factory import schema
from factory.__main__ import main as factory_main
from trainer import data
from trainer.config import DataConfig
from trainer.data import Sample, Samples, batch_indices, draw, flipped, sample_text, share, spread, square_pixels


def sketch(seed: int, width: int = 96, height: int = 72) -> np.ndarray:
    """Return a drawing (height,width) of dark lines on white, uint8."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width), 255, np.uint8)
    for _ in range(6):
        points = rng.integers(0, [width, height], (3, 2)).astype(np.int32)
        cv2.polylines(picture, [points], False, 0, 2, cv2.LINE_AA)
    return picture


def row(number: int, **changes: object) -> dict:
    sizes = [(96, 72), (72, 96), (80, 80)]
    return {
        "frame_id": f"source-{number:012d}",
        "source_id": "source",
        "training_sketch": cv2.imencode(".png", sketch(number, *sizes[number % 3]))[1].tobytes(),
        "caption": f"drawing {number}",
        "keywords": ["anime sketch", "line art"],
        "split": "train",
        "selected": True,
        **changes,
    }


def write(root: Path, rows: list[dict]) -> str:
    """Write `rows` as the samples table of a new dataset root and return the root."""
    table = schema.to_table("samples", rows)
    lance.write_dataset(table, str(root / "samples.lance"), data_storage_version=schema.STORAGE_VERSION)
    return str(root)


# --- order and chance ----------------------------------------------------------------------------------------------


def test_every_sample_comes_once_per_epoch_and_epochs_differ():
    stream = [i for step in range(15) for i in batch_indices(7, step, 4, 20)]  # three epochs of 20
    epochs = [stream[0:20], stream[20:40], stream[40:60]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream[:4] != batch_indices(8, 0, 4, 20)
    small = [i for step in range(3) for i in batch_indices(7, step, 8, 3)]  # a batch longer than an epoch
    assert Counter(small) == {0: 8, 1: 8, 2: 8}


def test_the_global_batch_does_not_depend_on_the_number_of_workers():
    for step in (0, 3, 11):
        whole = batch_indices(0, step, 8, 30)
        for world_size in (1, 2, 4, 8):
            parts = [whole[place] for rank in range(world_size) for place in share(8, rank, world_size)]
            assert parts == whole


def test_order_and_draws_are_the_same_on_every_machine():
    assert batch_indices(0, 0, 6, 100) == [32, 10, 0, 76, 13, 96]
    first = draw(0, 0, 0, (4, 8, 8), DataConfig())
    assert first.timestep == 369
    assert first.noise_4hw.shape == (4, 8, 8)
    again = draw(0, 0, 0, (4, 8, 8), DataConfig())
    assert torch.equal(first.noise_4hw, again.noise_4hw)
    for other in (draw(1, 0, 0, (4, 8, 8), DataConfig()), draw(0, 1, 0, (4, 8, 8), DataConfig())):
        assert not torch.equal(first.noise_4hw, other.noise_4hw)
    assert not torch.equal(first.noise_4hw, first.posterior_4hw)


def test_drops_happen_at_their_rates():
    config = DataConfig(image_drop_rate=0.1, text_drop_rate=0.2, both_drop_rate=0.3)
    draws = [draw(0, step, 0, (1, 1, 1), config) for step in range(4000)]
    shares = {key: count / 4000 for key, count in Counter((d.drop_image, d.drop_text) for d in draws).items()}
    expected = {(True, False): 0.1, (False, True): 0.2, (True, True): 0.3, (False, False): 0.4}
    assert all(abs(shares[key] - rate) < 0.03 for key, rate in expected.items())  # 4 standard deviations
    times = [d.timestep for d in draws]
    assert min(times) >= 0
    assert max(times) <= 999
    assert abs(np.mean(times) - 499.5) < 20


def test_half_of_the_samples_are_flipped_if_asked_and_nothing_else_changes():
    plain = [draw(0, step, 0, (1, 1, 1), DataConfig()) for step in range(400)]
    draws = [draw(0, step, 0, (1, 1, 1), DataConfig(random_flip=True)) for step in range(400)]
    assert not any(d.flip for d in plain)
    assert 160 < sum(d.flip for d in draws) < 240
    assert all(
        a.timestep == b.timestep and torch.equal(a.noise_4hw, b.noise_4hw) for a, b in zip(plain, draws, strict=True)
    )
    row = np.arange(24, dtype=np.uint8).reshape(1, 8, 3)
    sample = Sample(
        frame_id="f", text="a girl", target=square_pixels(Image.fromarray(row), 8), reference=Image.fromarray(row)
    )
    left, right = flipped([sample, sample], [False, True])
    assert left is sample
    assert torch.equal(right.target, sample.target.flip(-1))
    assert np.array_equal(np.asarray(right.reference), row[:, ::-1])
    assert right.text == sample.text


def test_drop_rates_that_sum_above_one_are_refused():
    with pytest.raises(ValueError, match="at most 1"):
        DataConfig(image_drop_rate=0.5, text_drop_rate=0.4, both_drop_rate=0.2)


# --- pictures and texts --------------------------------------------------------------------------------------------


def test_a_wide_picture_is_padded_with_white_and_nothing_is_cut():
    picture = Image.new("RGB", (64, 32), "black")
    pixels = square_pixels(picture, 32)
    assert pixels.shape == (3, 32, 32)
    assert torch.equal(pixels[:, :8], torch.ones(3, 8, 32))
    assert torch.equal(pixels[:, 8:24], -torch.ones(3, 16, 32))
    assert torch.equal(pixels[:, 24:], torch.ones(3, 8, 32))


def test_the_text_of_a_sample_is_caption_and_keywords():
    assert sample_text("a girl", ["anime sketch", "line art"]) == "a girl, anime sketch, line art"
    assert sample_text("a girl", []) == sample_text("a girl", None) == "a girl"
    assert sample_text(None, ["line art"]) == "line art"


# --- the table -----------------------------------------------------------------------------------------------------


def test_only_selected_rows_of_the_split_with_a_sketch_are_read_sorted(tmp_path: Path):
    rows = [
        row(4),
        row(1),
        row(2, selected=False),
        row(3, split="validation"),
        row(5, training_sketch=None),
        row(6, selected=None),
        row(0),
    ]
    samples = Samples(DataConfig(root=write(tmp_path, rows), resolution=32), "train")
    assert samples.frame_ids == [f"source-{i:012d}" for i in (0, 1, 4)]
    got = samples.read([2, 0, 2])
    assert [sample.text for sample in got] == [f"drawing {i}, anime sketch, line art" for i in (4, 0, 4)]
    assert [sample.reference.size for sample in got] == [(72, 96), (96, 72), (72, 96)]
    picture = Image.fromarray(sketch(4, 72, 96)).convert("RGB")
    assert torch.equal(got[0].target, square_pixels(picture, 32))
    assert torch.equal(got[0].target, got[2].target)
    assert Samples(DataConfig(root=str(tmp_path)), "validation").frame_ids == ["source-000000000003"]


def photo(number: int) -> bytes:
    """Return a PNG of a colour frame, 32x16: red left, green in the middle half, blue right."""
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :8], picture[:, 8:24], picture[:, 24:] = (0, 0, 255 - number), (0, 255, 0), (255, 0, 0)  # BGR
    return cv2.imencode(".png", picture)[1].tobytes()


def test_target_and_reference_are_the_columns_that_are_asked_for(tmp_path: Path):
    rows = [row(0, image=photo(0)), row(1, image=photo(1)), row(2), row(3, image=photo(3), training_sketch=None)]
    root = write(tmp_path, rows)

    def read(**changes: str) -> tuple[list[str], Sample]:
        samples = Samples(DataConfig(root=root, resolution=16, **changes), "train")  # type: ignore[arg-type]
        return [frame[-1] for frame in samples.frame_ids], samples.read([1])[0]

    drawing = Image.fromarray(sketch(1, 72, 96)).convert("RGB")
    frames, colour = read(target="image", reference="training_sketch")
    assert frames == ["0", "1"]
    green = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 16, 16)
    assert torch.equal(colour.target, green)  # the middle, without bars
    assert np.array_equal(np.asarray(colour.reference), np.asarray(drawing))

    frames, lines = read(target="training_sketch", reference="image")
    assert frames == ["0", "1"]
    assert torch.equal(lines.target, square_pixels(drawing, 16))
    assert lines.reference.size == (32, 16)  # whole, with its borders
    assert lines.reference.getpixel((0, 0)) == (254, 0, 0)

    assert read()[0] == ["0", "1", "2"]
    assert read(target="image", reference="image")[0] == ["0", "1", "3"]
    no_sketch = write(tmp_path / "b", [row(0, image=photo(0), training_sketch=None)])
    with pytest.raises(ValueError, match=r"no row of split 'train' with training_sketch at .* factory sketch"):
        Samples(DataConfig(root=no_sketch, target="image"), "train")
    with pytest.raises(ValueError, match=r"no row of split 'train' with image at .* factory build"):
        Samples(DataConfig(root=write(tmp_path / "c", [row(0)]), target="image"), "train")


def test_texts_leave_the_keywords_out_if_asked(tmp_path: Path):
    root = write(tmp_path, [row(0), row(1)])
    plain, bare = (Samples(DataConfig(root=root, keywords=keywords), "train") for keywords in (True, False))
    assert plain.texts == ["drawing 0, anime sketch, line art", "drawing 1, anime sketch, line art"]
    assert bare.texts == ["drawing 0", "drawing 1"]
    assert bare.fingerprint != plain.fingerprint


def test_only_accepted_samples_are_read_if_asked(tmp_path: Path):
    reviews = ["accepted", "pending", "rejected", None, "accepted"]
    rows = [row(number, review=review) for number, review in enumerate(reviews)]
    root = write(tmp_path, rows)
    asked = DataConfig(root=root, accepted_only=True)
    assert [frame[-1] for frame in Samples(asked, "train").frame_ids] == ["0", "4"]
    assert len(Samples(DataConfig(root=root), "train")) == 5
    for name, others, message in (
        ("a", [row(0)], "no selected row that is accepted at version 1. Review it, or train on all: --set data.acc"),
        ("b", [row(0, review="accepted", split="validation"), row(1)], "no accepted row of split 'train'"),
    ):
        with pytest.raises(ValueError, match=message):
            Samples(replace(asked, root=write(tmp_path / name, others)), "train")
    table = schema.to_table("samples", [row(0)]).drop_columns(["review"])
    lance.write_dataset(table, str(tmp_path / "c" / "samples.lance"), data_storage_version=schema.STORAGE_VERSION)
    with pytest.raises(ValueError, match="no column 'review': nothing says which samples are accepted"):
        Samples(replace(asked, root=str(tmp_path / "c")), "train")


def test_a_version_or_tag_stays_as_it_was(tmp_path: Path):
    root = write(tmp_path, [row(0)])
    dataset = lance.dataset(f"{root}/samples.lance")
    dataset.tags.create("first", dataset.version)
    lance.write_dataset(schema.to_table("samples", [row(1)]), f"{root}/samples.lance", mode="append")
    newest = Samples(DataConfig(root=root), "train")
    assert len(newest) == 2
    for version in (1, "first"):
        samples = Samples(DataConfig(root=root, version=version), "train")
        assert (len(samples), samples.version) == (1, 1)
        assert samples.fingerprint != newest.fingerprint
    with pytest.raises(ValueError, match="has no version or tag 'second'; its newest version is 2"):
        Samples(DataConfig(root=root, version="second"), "train")


def test_a_picture_that_is_not_whole_is_named(tmp_path: Path):
    cut = row(1)["training_sketch"][:200]
    samples = Samples(DataConfig(root=write(tmp_path, [row(0), row(1, training_sketch=cut)])), "train")
    samples.read([0])
    with pytest.raises(
        ValueError,
        match=r"'training_sketch' of sample source-000000000001 .* Restore .* factory build SOURCES --root NEW_ROOT",
    ):
        samples.read([1])


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"No table .*samples.lance"):
        Samples(DataConfig(root=str(tmp_path / "absent")), "train")

    table = schema.to_table("samples", [row(0)]).drop_columns(["training_sketch"])
    lance.write_dataset(table, str(tmp_path / "a" / "samples.lance"), data_storage_version=schema.STORAGE_VERSION)
    with pytest.raises(ValueError, match=r"no column 'training_sketch'. Run: python -m factory sketch --root"):
        Samples(DataConfig(root=str(tmp_path / "a")), "train")

    for name, rows, message in (
        ("b", [], "has no rows at version 1. Run: python -m factory build"),
        ("c", [row(0, selected=False)], "no selected rows at version 1. Run: python -m factory select"),
        (
            "d",
            [row(0, training_sketch=None)],
            "no row of split 'train' with training_sketch at version 1. Run: python -m factory sketch",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Samples(DataConfig(root=write(tmp_path / name, rows)), "train")

    with pytest.raises(ValueError, match=r"'split.holdout=\[\"FILM.mkv\"\]' .* --set data.validation_samples=0"):
        Samples(DataConfig(root=write(tmp_path / "e", [row(0)])), "validation")
    with pytest.raises(ValueError, match=r"split 'train' .* --set 'split.validation_share=0'$"):
        Samples(DataConfig(root=write(tmp_path / "f", [row(0, split="validation")])), "train")


def test_every_command_in_a_message_is_a_verb_of_the_factory():
    texts = "".join(path.read_text() for path in Path(data.__file__).parent.glob("*.py"))
    named = set(re.findall(r"_command\(['\"](\w+)|python -m factory (\w+)", texts))
    verbs = {verb or other for verb, other in named} | {*data._VERB.values()}
    assert {"build", "select", "sketch", "caption"} <= verbs
    for verb in verbs:
        with pytest.raises(SystemExit) as stop:
            factory_main([verb, "--help"])
        assert stop.value.code == 0, verb


def test_what_is_chosen_of_many_is_spread_over_them():
    assert spread(4, 100) == [0, 25, 50, 75]
    assert spread(3, 4) == [0, 1, 2]
    assert spread(3, 3) == [0, 1, 2]
