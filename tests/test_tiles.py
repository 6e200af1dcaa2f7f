"""The tile engine against the whole picture: no grid shows, whatever the converter, offset, batch and size."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from factory.models import WEIGHTS
from factory.settings import UsageError
from factory.sketch import sheet, tone
from factory.sketch.anime2sketch import Anime2Sketch, new_network
from factory.sketch.converter import Converter
from factory.sketch.engine import SketchConfig, enlarged, fitted, new_converter, run_tiles, sketch
from factory.sketch.generator import Generator
from factory.sketch.hed import HED, Pencil
from factory.sketch.xdog import XDoG, XDoGConfig
from factory.toon import draw, random_scene


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return draw(random_scene(random.Random(4)), (480, 270)).image


@pytest.fixture(scope="module")
def converters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converter]:
    """Each converter by name; those that are not shipped with random weights, which pass on every pixel they see."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    hed = HED()
    for conv in (module for module in hed.modules() if isinstance(module, torch.nn.Conv2d)):
        torch.nn.init.kaiming_normal_(conv.weight)
    hed.fuse.weight.data *= 0.05
    published = new_network("default")
    for name, state in (("hed", hed.state_dict()), ("anime2sketch", published.state_dict())):
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors")
    (folder / "anime2sketch" / "config.json").write_text('{"layout": "default"}')
    return {
        "xdog": XDoG(XDoGConfig(), short_side=270),
        "micro": Generator(WEIGHTS / "sketch"),
        "hed": Pencil(folder / "hed"),
        "anime2sketch": Anime2Sketch(folder / "anime2sketch"),
    }


def _difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other.astype(int))


@pytest.mark.parametrize("name", ["xdog", "micro", "hed"])
@pytest.mark.parametrize(
    "grid", [{"tile": 64}, {"tile": 192, "offset": 37}, {"tile": 256, "batch": 3, "overlap": 100, "offset": 255}]
)
def test_no_grid_shows(name: str, grid: dict[str, int], image: np.ndarray, converters: dict[str, Converter]) -> None:
    converter = converters[name]
    whole = run_tiles(image, converter, size=(270, 480), tile=1024)
    difference = _difference(whole, run_tiles(image, converter, size=(270, 480), **grid))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001
    halo = converter.halo
    try:
        converter.halo = 0
        naive = _difference(whole, run_tiles(image, converter, size=(270, 480), tile=64))
    finally:
        converter.halo = halo
    assert naive.max() > 20  # what the halo is for


@pytest.mark.parametrize("size", [(675, 1200), (400, 400), (90, 700), (101, 180)])
def test_no_grid_shows_at_other_sizes(
    size: tuple[int, int], image: np.ndarray, converters: dict[str, Converter]
) -> None:
    whole = run_tiles(image, converters["xdog"], size=size, tile=2048)
    assert whole.shape == size
    difference = _difference(whole, run_tiles(image, converters["xdog"], size=size, tile=100, offset=13))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001


def test_a_pixel_of_the_enlarged_picture_does_not_depend_on_its_box(image: np.ndarray) -> None:
    size = (733, 1303)
    whole = enlarged(image, (0, 733, 0, 1303), size)
    for top, left in ((0, 0), (1, 5), (300, 777), (733 - 64, 1303 - 64)):
        assert (
            enlarged(image, (top, top + 64, left, left + 64), size) == whole[top : top + 64, left : left + 64]
        ).all()
    beyond = enlarged(image, (-20, 753, -20, 1323), size)
    assert (beyond == np.pad(whole, ((20, 20), (20, 20), (0, 0)), mode="reflect")).all()


def test_enlarging_is_lanczos(image: np.ndarray) -> None:
    expected = cv2.resize(image, (960, 540), interpolation=cv2.INTER_LANCZOS4)
    got = enlarged(image, (0, 540, 0, 960), (540, 960))
    assert _difference(got, expected)[8:-8, 8:-8].mean() < 0.2  # places are rounded to 1/32


def test_pictures_wider_than_opencv_takes(converters: dict[str, Converter]) -> None:
    ribbon = np.random.default_rng(0).integers(0, 256, (4, 40_000, 3), np.uint8)
    assert run_tiles(ribbon, converters["xdog"], size=(6, 60_000), tile=1024).shape == (6, 60_000)


class _Average(Converter):
    """Lines that follow the rest of the tile, as a network with instance normalisation gives them."""

    stride, overlap = 32, 96

    def __init__(self) -> None:
        self.shown: list[tuple[int, ...]] = []

    def calibrate(self, tiles) -> None:
        self.shown = [tile.shape for tile in tiles()]

    def __call__(self, tiles_BHW3: np.ndarray) -> np.ndarray:
        grey = tiles_BHW3[..., 1] / np.float32(255)
        return 0.5 * grey + 0.5 * grey.mean((1, 2), keepdims=True)


def _step_over_borders(lines: np.ndarray, borders: Iterable[int]) -> float:
    """The mean step over the columns `borders`, as a share of that over others."""
    steps = np.abs(np.diff(lines.astype(float), axis=1)).mean(0)
    there = [border - 1 for border in borders]
    return float(steps[there].mean() / np.delete(steps, there).mean())


def test_tiles_that_differ_are_blended() -> None:
    ramp = np.repeat(np.tile(np.linspace(0, 255, 640).astype(np.uint8), (320, 1))[..., None], 3, axis=2)
    converter = _Average()
    naive = run_tiles(ramp, converter, size=(320, 640), tile=160, overlap=0)
    blended = run_tiles(ramp, converter, size=(320, 640), tile=192)
    assert _step_over_borders(naive, range(160, 640, 160)) > 20
    assert _step_over_borders(blended, range(96, 640, 96)) < 1.6
    assert np.abs(np.diff(blended.astype(int), axis=1)).max() <= 3


def test_tiles_are_as_small_as_they_may_be(image: np.ndarray) -> None:
    class Counted(_Average):
        overlap, seen = 0, 0

        def __call__(self, tiles_BHW3: np.ndarray) -> np.ndarray:
            self.seen += tiles_BHW3[..., 0].size
            return super().__call__(tiles_BHW3)

    for size in ((1080, 1920), (300, 500), (1025, 1025), (33, 2047)):
        converter = Counted()
        run_tiles(image, converter, size=size, tile=1024)
        least = size[0] * size[1]
        assert converter.seen < 1.15 * (size[0] + 32) * (size[1] + 32)
        assert converter.seen >= least


@pytest.mark.parametrize("sweeps", [0, 2])
def test_progress_counts_tiles_and_those_looked_at_before(sweeps: int, image: np.ndarray) -> None:
    class Calibrated(_Average):
        def calibrate(self, tiles) -> None:
            for _ in range(self.sweeps):
                super().calibrate(tiles)

    converter, told = Calibrated(), []
    converter.sweeps = sweeps
    run_tiles(image, converter, size=(270, 480), tile=192, batch=2, watch=lambda *counts: told.append(counts))
    drawn = len(converter.shown) * sweeps + 2 * 4
    assert told[0] == (0, drawn)
    assert told[-1] == (drawn, drawn)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_every_weight_is_far_from_nothing() -> None:
    """A Gaussian window's corners come to nothing in half precision, and a picture's corner lies in one tile alone."""
    white = np.full((300, 500, 3), 255, np.uint8)
    for offset in (0, 5, 63, 191):
        assert (run_tiles(white, _Average(), size=(300, 500), tile=192, overlap=96, offset=offset) == 255).all()


def test_statistics_come_from_tiles_that_cover_the_picture_once() -> None:
    converter = _Average()
    run_tiles(np.zeros((320, 640, 3), np.uint8), converter, size=(320, 640), tile=192)
    assert sum(height * width for height, width, _ in converter.shown) == 320 * 640
    assert all(height % 32 == width % 32 == 0 for height, width, _ in converter.shown)


def test_with_frozen_statistics_a_tile_does_not_follow_the_rest(
    image: np.ndarray, converters: dict[str, Converter]
) -> None:
    network = converters["anime2sketch"]
    flat = np.full((256, 512, 3), 128, np.uint8)
    half = np.concatenate([flat[:, :256], cv2.resize(image, (256, 256))], axis=1)
    network.calibrate(lambda: [half[:, :256], half[:, 256:]])
    (alone,) = network(flat[None, :, :256])
    network.calibrate(lambda: [flat])
    (other,) = network(flat[None, :, :256])
    assert np.abs(alone - other).max() > 0.01  # the statistics of the picture count
    network.calibrate(lambda: [half[:, :256], half[:, 256:]])
    (again,) = network(flat[None, :, :256])
    assert (again == alone).all()  # and nothing is left of the picture before
    assert np.isfinite(network(np.zeros((1, 256, 256, 3), np.uint8))).all()  # variance 0


def test_pooled_statistics_of_one_tile_are_its_own(image: np.ndarray, converters: dict[str, Converter]) -> None:
    network = converters["anime2sketch"]
    tile = cv2.resize(image, (256, 256))
    for norm in network._norms():  # type: ignore[attr-defined]
        norm.thaw()
    (own,) = network(tile[None])
    network.calibrate(lambda: [tile])
    np.testing.assert_allclose(network(tile[None])[0], own, atol=1e-4)


def test_sizes(image: np.ndarray) -> None:
    assert sketch(image, SketchConfig(size=640)).shape == (360, 640)
    assert sketch(image, SketchConfig(size=80)).shape == (45, 80)
    page = sketch(image, SketchConfig(size=320, square="pad"))
    assert page.shape == (320, 320)
    assert (page[:70] == 255).all()
    assert (page[70:250] < 128).any()
    assert sketch(image, SketchConfig(size=320, square="crop")).shape == (320, 320)
    assert sketch(image, SketchConfig(size=320, square="stretch")).shape == (320, 320)
    part, size = fitted(image, SketchConfig(size=320, square="crop"))
    assert (part == image[:, 105:375]).all()
    assert size == (320, 320)
    assert sketch(image[:1, :1], SketchConfig()).shape == (1, 1)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"converter": "hedd"}, r"one of xdog, micro, hed, anime2sketch, got 'hedd'"),
        ({"size": 100_000}, r"sketch\.size"),
        ({"square": "pad"}, r"sketch\.square"),
        ({"tile": 100}, r"sketch\.tile must"),
        ({"overlap": 600}, r"sketch\.overlap"),
        ({"tile_offset": 1024}, r"sketch\.tile_offset"),
        ({"batch": 0}, r"sketch\.batch"),
        ({"brighten_below": 2.0}, r"sketch\.brighten_below"),
    ],
)
def test_what_can_not_be_is_refused(wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SketchConfig(**wrong)


def test_lines_that_are_no_numbers_are_refused(image: np.ndarray) -> None:
    class Broken(_Average):
        def __call__(self, tiles_BHW3: np.ndarray) -> np.ndarray:
            return super().__call__(tiles_BHW3) * np.nan

    with pytest.raises(UsageError, match="weights are damaged"):
        run_tiles(image, Broken(), size=(270, 480), tile=192)


@pytest.mark.parametrize("wrong", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3), np.float32), "frame.png"])
def test_what_is_no_picture_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"RGB uint8 \(H,W,3\)"):
        sketch(wrong, SketchConfig())


@pytest.mark.parametrize("square", [None, "pad", "crop", "stretch"])
def test_the_sheet_shows_the_same_place_by_each_converter(square, image: np.ndarray) -> None:
    config = SketchConfig(converter="micro", size=600, square=square)
    configs = sheet.variants(config)
    assert {"micro", "xdog"} <= configs.keys()
    assert "anime2sketch" not in configs
    box = sheet.busiest(image, config, 120)
    found = sheet.crops(image, box, configs)
    assert all(picture.shape[:2] == (120, 120) for picture in found.values())
    whole, size = run_tiles, fitted(image, config)[1]
    part = fitted(image, config)[0]
    raw = whole(part, new_converter(config, short_side=min(size)), size=size, tile=1024)
    expected = tone.level(raw[box[0] : box[1], box[2] : box[3]])[0]
    assert _difference(found["micro"], expected).max() <= 3
    assert sheet.sheet([found, found]).shape == (2 * (22 + 126), len(found) * 126, 3)


def test_the_network_of_a_converter(tmp_path: Path) -> None:
    assert SketchConfig(converter="micro").network == "animesketch/sketch"
    assert SketchConfig(converter="hed").network == "animesketch/hed"
    assert SketchConfig(converter="hed", model="/models/hed").network == "/models/hed"
