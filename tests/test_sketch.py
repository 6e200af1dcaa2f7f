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
from factory.sketch.engine import SketchConfig, run_tiles, sketch
from factory.sketch.xdog import XDoG, XDoGConfig
from factory.toon import draw, random_scene
from factory.toon.scene import Drawing


@pytest.fixture(scope="module")
def drawing():
    return draw(random_scene(random.Random(5)), (480, 270))


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
    got = XDoG(config, short_side=512)(image)
    assert got.min() >= 0
    assert got.max() <= 1
    np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize("tile", [64, 100, 257])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_result_does_not_depend_on_the_tile_grid(drawing, tile: int, scale: float) -> None:
    height, width = (round(side * scale) for side in drawing.image.shape[:2])
    converter = XDoG(XDoGConfig(), short_side=height)
    whole = run_tiles(drawing.image, converter, size=(height, width), tile=10_000)
    tiled = run_tiles(drawing.image, converter, size=(height, width), tile=tile)
    difference = np.abs(whole.astype(int) - tiled.astype(int))
    assert difference.max() <= 1  # rounding of the enlarged pixels; a seam would be tens
    assert (difference > 0).mean() < 0.001
    naive = run_tiles(drawing.image, _without_halo(converter), size=(height, width), tile=tile)
    assert np.abs(whole.astype(int) - naive.astype(int)).max() > 20  # what the halo is for


def _without_halo(converter: XDoG) -> XDoG:
    naive = XDoG(XDoGConfig(), short_side=1)
    naive._sigma, naive.halo = converter._sigma, 0
    return naive


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


def test_sizes() -> None:
    image = np.random.default_rng(1).integers(0, 256, (90, 160, 3), np.uint8)
    assert sketch(image, SketchConfig(size=640)).shape == (360, 640)
    assert sketch(image, SketchConfig(size=80)).shape == (45, 80)
    page = sketch(image, SketchConfig(size=320, square=True))
    assert page.shape == (320, 320)
    assert (page[:60] == 255).all()
    assert (page[70:250] < 128).any()
    assert sketch(image[:1, :1], SketchConfig()).shape == (1, 1)
    with pytest.raises(ValueError, match=r"sketch\.size"):
        SketchConfig(size=100_000)


def test_levels_make_paper_white_and_ink_black() -> None:
    page = np.full((100, 100), 230, np.uint8)
    page[10:12] = 60
    stretched = tone.levels(page)
    assert stretched[0, 0] == 255
    assert stretched[10, 0] == 0
    assert tone.ink_ratio(stretched) == pytest.approx(0.02)


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
        (("--image", "fine.png", "--output", "text.png/lines.png"), "--output text.png/lines.png: "),
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
