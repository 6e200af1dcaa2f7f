"""XDoG against its formula, and the tile engine against the whole picture."""

from __future__ import annotations

import random
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from factory.__main__ import DONE, USAGE, main
from factory.sketch import engine, tone
from factory.sketch.engine import SketchConfig, sketch
from factory.sketch.xdog import XDoG, XDoGConfig
from factory.toon import draw, random_scene
from factory.toon.scene import Drawing


@pytest.fixture(scope="module")
def drawing():
    return draw(random_scene(random.Random(4)), (480, 270))


def test_xdog_is_the_papers_formula() -> None:
    rng = np.random.default_rng(0)
    image = np.repeat(rng.integers(0, 256, (64, 64, 1), np.uint8), 3, axis=2)
    config = XDoGConfig(sigma=1.1, p=12.0, epsilon=0.4, phi=5.0)
    grey = image[..., 0].astype(np.float64) / 255

    def blurred(sigma: float) -> np.ndarray:
        radius = int(np.ceil(4 * sigma))
        weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
        weights /= weights.sum()
        padded = np.pad(grey, radius, mode="reflect")
        rows = np.apply_along_axis(np.convolve, 0, padded, weights, "valid")
        return np.apply_along_axis(np.convolve, 1, rows, weights, "valid")

    sharp = 13.0 * blurred(1.1) - 12.0 * blurred(1.1 * 1.6)
    expected = np.where(sharp >= 0.4, 1.0, 1.0 + np.tanh(5.0 * (sharp - 0.4)))
    (got,) = XDoG(config, short_side=512)(image[None])
    assert got.min() >= 0
    assert got.max() <= 1
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_lines_lie_where_the_drawing_has_them(drawing) -> None:
    lines = sketch(drawing.image, SketchConfig())
    ink = lines < 128
    near = cv2.dilate((drawing.lines < 128).astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    assert ink.mean() > 0.01
    assert near[ink].mean() > 0.8
    moved = np.roll(near, 40, axis=1)
    assert moved[ink].mean() < 0.6 * near[ink].mean()


def test_paper_is_white_and_a_flat_picture_stays_blank(drawing) -> None:
    lines = sketch(drawing.image, SketchConfig())
    assert (lines == 255).mean() > 0.5
    assert lines.min() == 0
    assert (sketch(np.full((300, 400, 3), 90, np.uint8), SketchConfig()) == 255).all()


def test_levels_make_paper_white_and_ink_black() -> None:
    page = np.full((100, 100), 230, np.uint8)
    page[10:12] = 60
    page[20:30:2] = 226  # noise of the paper, no line
    page[20:30:4] = 234
    stretched, told = tone.level(page)
    assert (stretched[20:30] == 255).all()
    assert (stretched[10:12] == 0).all()
    assert (told.black, told.brightened, told.p01, told.p25) == (60, False, 0, 255)
    assert 200 < told.white < 230
    assert told.ink_ratio == told.clipped_black == pytest.approx(0.02)
    assert told.clipped_white == pytest.approx(0.98)


@pytest.mark.parametrize(("grey", "lighter"), [(100, True), (215, False)])
def test_gamma_brings_the_greys_of_flanks_towards_the_middle(grey: int, lighter: bool) -> None:
    page = np.full((100, 100), 255, np.uint8)
    page[10:30], page[30:34] = 0, grey
    stretched, told = tone.level(page)
    assert (told.gamma > 1) == lighter
    assert (stretched[31, 0] > grey) == lighter
    assert stretched[20, 0] == 0
    assert stretched[90, 0] == 255


def test_a_page_without_ink_stays_as_it_is() -> None:
    page = np.random.default_rng(0).integers(230, 250, (64, 64), np.uint8)
    stretched, told = tone.level(page)
    assert (stretched == page).all()
    assert (told.black, told.white, told.gamma, told.ink_ratio) == (0, 255, 1.0, 0.0)


def test_a_histogram_counts_every_pixel_of_any_height() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1100, 37), np.uint8)
    assert (tone.histogram(picture) == np.bincount(picture.ravel(), minlength=256)).all()


def test_dark_frames_are_brightened_and_others_are_not(drawing: Drawing) -> None:
    dark = (drawing.image * 0.2).astype(np.uint8)
    lighter, is_brightened = tone.brightened(dark, below=0.15)
    assert is_brightened
    assert lighter.std() > 1.1 * dark.std()
    assert engine.draw(dark, SketchConfig()).tone.brightened
    same, is_brightened = tone.brightened(drawing.image, below=0.15)
    assert same is drawing.image
    assert not is_brightened
    assert not engine.draw(dark, SketchConfig(brighten_below=0)).tone.brightened


def test_reduced_keeps_small_pictures() -> None:
    picture = np.zeros((2000, 500), np.uint8)
    assert engine.reduced(picture, 1024).shape == (1024, 256)
    assert engine.reduced(picture[:100], 1024) is not None
    assert engine.reduced(picture[:100], 1024).shape == (100, 500)


def test_one_picture_becomes_one_file(drawing: Drawing, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    picture, output = tmp_path / "a picture.png", tmp_path / "new/lines.png"
    Image.fromarray(drawing.image).save(picture)
    command = ["sketch", "--image", str(picture), "--output", str(output)]
    assert main([*command, "--size", "640", "--tile", "256", "--converter", "xdog"]) == DONE
    config = SketchConfig(converter="xdog", size=640, tile=256)
    assert (cv2.imread(str(output), cv2.IMREAD_UNCHANGED) == sketch(drawing.image, config)).all()
    told = capsys.readouterr().out.splitlines()
    assert told[-2].startswith("sketch   6/6 tiles, ")
    assert told[-1] == f"{output}: 640 x 360 px"
    assert main([*command, "--set", "sketch.size=240"]) == DONE, "the shipped network, over the lines of before"
    assert cv2.imread(str(output), cv2.IMREAD_UNCHANGED).shape == (135, 240)
    assert [path.name for path in output.parent.iterdir()] == ["lines.png"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--image", "gone.png", "--output", "lines.png"), "--image gone.png: No such file or directory."),
        (("--image", "text.png", "--output", "lines.png"), "--image text.png: it is no picture of a kind that is"),
        (("--image", "text.png", "--output", "lines.jpg"), "ends in .png."),
        (("--image", "text.png", "--output", "lines.png", "--tile", "100"), "sketch.tile must be a multiple of 64"),
        (("--image", "s3://b/a.png", "--output", "lines.png"), "--image s3://b/a.png: only a file on this machine"),
        (("--image", "text.png", "--output", "s3://b/lines.png"), "only a file on this machine"),
        (("--image", "", "--output", "lines.png"), "Is a directory"),
        (("--image", "fine.png", "--output", "fine.png"), "is the picture itself"),
        (("--image", "fine.png", "--output", "folder.png"), "folder.png is a folder. Give a file's name."),
        (("--image", "fine.png", "--output", "text.png/lines.png"), "text.png is a file, no folder."),
        (("--image", "damaged.png", "--output", "lines.png"), "--image damaged.png: it is damaged: "),
        (("--image", "text.png"), "--image and --output go together"),
        (("--root", "data", "--output", "lines.png"), "--image and --output go together"),
        (("--root", "data", "--image", "text.png", "--output", "lines.png"), "takes a dataset's --root, or one"),
        ((), "takes a dataset's --root, or one picture: --image FILE --output FILE"),
    ],
)
def test_a_wrong_picture_or_option_is_told(
    arguments: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "fine.png")
    whole = (tmp_path / "fine.png").read_bytes()
    parts = whole.split(b"IDAT")
    assert len(parts) > 2, "else no part but the first can be damaged"
    (tmp_path / "damaged.png").write_bytes(b"IDAT".join(parts[:2]) + b"\0\1\2\3" + b"IDAT".join(parts[2:]))
    try:
        code = main(["sketch", *arguments])
    except SystemExit as left:
        code = left.code
    assert code == USAGE
    assert told in capsys.readouterr().err
    assert not (tmp_path / "lines.png").exists()
    assert (tmp_path / "fine.png").read_bytes() == whole
