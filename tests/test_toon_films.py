"""Drawn films: the edit list, drawings held, fades, files, and their truth."""

import itertools
import json

import av
import cv2
import numpy as np
import pytest

from factory.toon import (
    draw,
    drawings,
    plan_clip,
    write_clip,
    write_clips,
)
from factory.toon.traits import WORDS
from factory.toon.video import finished, truth_path
from tests.test_toon import said

SMALL = {"shots": 6, "fps": 12, "size": (160, 90)}


@pytest.fixture(scope="module")
def film():
    return plan_clip(3, **SMALL)


@pytest.fixture(scope="module")
def video(film, tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("film") / "a.mp4", film)


@pytest.fixture(scope="module")
def drawn(film):
    return list(drawings(film))


def frames_of(path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def luma(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


@pytest.mark.parametrize("seed", range(20))
def test_edit_list_covers_every_frame_once_and_has_what_it_promises(seed):
    plan = plan_clip(seed)
    assert plan == plan_clip(seed)
    assert len(plan.shots) == 12
    assert [shot.start for shot in plan.shots[1:]] == [shot.end for shot in plan.shots[:-1]]
    assert plan.shots[0].start == 0
    assert plan.shots[-1].end == plan.frames
    assert all(plan.fps <= shot.end - shot.start <= 2 * plan.fps for shot in plan.shots)
    transitions = [shot.transition for shot in plan.shots]
    assert transitions.count("cut") >= 9
    assert transitions.count("fade") >= 1
    assert transitions[0] == "cut"
    assert any(shot.dark for shot in plan.shots)
    repeats = [(i, shot.repeats) for i, shot in enumerate(plan.shots) if shot.repeats is not None]
    assert len(repeats) == 1
    back, again = repeats[0]
    assert again < back - 1
    for near in (again, back):  # no fade touches the repeated frames
        assert "fade" not in transitions[near : near + 2]
    assert len({(shot.scene.background, shot.scene.camera) for shot in plan.shots}) == 11


def test_another_seed_is_another_film():
    one, two = plan_clip(0), plan_clip(1)
    assert not {shot.scene for shot in one.shots} & {shot.scene for shot in two.shots}


def test_drawings_are_held_on_twos_and_threes(film, drawn):
    at = 0
    for drawing, first, lights in drawn:
        shot = next(shot for shot in film.shots if shot.start <= first < shot.end)
        assert first == at
        assert (first - shot.start) % shot.hold == 0
        assert len(lights) == min(shot.hold, shot.end - first)
        assert drawing.image.shape == (90, 160, 3)
        at += len(lights)
    assert at == film.frames
    assert {shot.hold for seed in range(5) for shot in plan_clip(seed).shots} == {2, 3}


def test_a_repeated_shot_is_equal_frame_for_frame_and_a_fade_reaches_black(film, drawn):
    shown, light = {}, {}
    for drawing, first, lights in drawn:
        for held, level in enumerate(lights):
            shown[first + held], light[first + held] = drawing, level
    repeat = next(shot for shot in film.shots if shot.repeats is not None)
    original = film.shots[repeat.repeats]
    assert repeat.end - repeat.start == original.end - original.start
    for a, b in zip(range(original.start, original.end), range(repeat.start, repeat.end), strict=True):
        assert np.array_equal(shown[a].image, shown[b].image)
        assert light[a] == light[b] == 1
    assert not np.array_equal(shown[original.start].image, shown[original.end - 1].image)  # it moves
    fades = [shot.start for shot in film.shots if shot.transition == "fade"]
    for boundary in fades:
        assert light[boundary] == light[boundary - 1] == 0
        assert 0 < light[boundary + 1] < light[boundary + 2]
        assert 0 < light[boundary - 2] < light[boundary - 3]
    dimmed = {frame for frame, level in light.items() if level < 1}
    assert dimmed <= {b + i for b in fades for i in range(-film.fade_frames, film.fade_frames)}


def test_video_holds_the_planned_frames_and_its_cuts(film, drawn, video):
    frames = frames_of(video)
    assert len(frames) == film.frames
    assert frames[0].shape == (90, 160, 3)
    step = [0.0] + [np.abs(b.astype(int) - a).mean() for a, b in itertools.pairwise(frames)]
    cuts = {shot.start for shot in film.shots[1:] if shot.transition == "cut"}
    inner = [s for i, s in enumerate(step) if i and i not in {shot.start for shot in film.shots}]
    assert min(step[cut] for cut in cuts) > 20 > np.percentile(inner, 95)
    for shot in film.shots:
        if shot.transition == "fade":
            assert frames[shot.start].mean() < 4
    shown = {first + held: d.image for d, first, lights in drawn for held, level in enumerate(lights) if level == 1}
    error = [np.abs(frames[i].astype(int) - image).mean() for i, image in shown.items()]
    assert max(error) < 12  # chroma is halved and coded: near, not equal


def test_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    one, again, other = (
        write_clip(tmp_path / f"{i}.mp4", plan_clip(s, shots=6, fps=6, size=(64, 64))) for i, s in enumerate((3, 3, 4))
    )
    assert again.read_bytes() == one.read_bytes()
    assert other.read_bytes() != one.read_bytes()
    assert truth_path(again).read_bytes() == truth_path(one).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{i}.{end}" for i in range(3) for end in ("mp4", "truth.json")
    ]


def test_truth_is_written_beside_the_video(film, video):
    truth = json.loads(video.with_name("a.truth.json").read_text())
    assert truth["seed"] == 3
    assert truth["fps"] == 12
    assert truth["size"] == [160, 90]
    assert truth["frames"] == film.frames
    assert len(truth["shots"]) == len(film.shots)
    for entry, shot in zip(truth["shots"], film.shots, strict=True):
        assert (entry["start"], entry["end"], entry["transition"]) == (shot.start, shot.end, shot.transition)
        assert (entry["repeats"], entry["dark"], entry["caption"]) == (shot.repeats, shot.dark, shot.caption)
        assert entry["scene"]["figures"][0]["hair"] == shot.scene.figures[0].hair
        assert said(entry["caption"], WORDS["hair"][entry["scene"]["figures"][0]["hair"]])


def test_shots_of_a_film_look_distinct():
    """64-bit difference hash of each shot's first drawing: all but the repeat are far apart."""
    for seed in (0, 1):
        hashes = []
        for shot in plan_clip(seed).shots:
            if shot.repeats is None:
                small = cv2.resize(luma(draw(shot.scene, (160, 90)).image), (9, 8), interpolation=cv2.INTER_AREA)
                hashes.append((small[:, 1:] > small[:, :-1]).ravel())
        distances = [(a != b).sum() for i, a in enumerate(hashes) for b in hashes[:i]]
        assert len(hashes) == 11
        assert min(distances) > 8


def test_films_already_there_are_kept_and_broken_ones_drawn_anew(tmp_path, capsys):
    settings = {"seed": 7, "size": (64, 64), "shots": 6, "fps": 6, "workers": 2}
    paths = write_clips(tmp_path, 2, **settings)
    assert [path.name for path in paths] == ["toon-00.mp4", "toon-01.mp4"]
    first, second = (path.read_bytes() for path in paths)
    assert first != second
    before = paths[0].stat().st_mtime_ns
    truth_path(paths[1]).unlink()
    paths[1].write_bytes(b"half")
    capsys.readouterr()
    write_clips(tmp_path, 2, **settings)
    assert paths[0].stat().st_mtime_ns == before
    assert paths[1].read_bytes() == second
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2
    assert "already there" in out[0]
    assert "6 shots" in out[1]


def test_flashes_letterbox_and_grain_are_where_the_truth_says(tmp_path):
    plain = plan_clip(4, **SMALL)
    worn = plan_clip(4, **SMALL, flashes=2, letterbox=2.4, grain=6.0)
    assert worn.shots == plain.shots
    assert len(worn.flashes) == 2
    truth = json.loads(worn.to_json())
    bar = truth["bar_height"]
    assert 160 / (90 - 2 * bar) == pytest.approx(2.4, rel=0.03)
    frames = frames_of(write_clip(tmp_path / "worn.mp4", worn))
    assert len(frames) == worn.frames
    top = np.stack([frame[: bar - 1] for frame in frames])
    assert top.mean() < 12
    light = [luma(frame[bar + 2 : -bar - 2]).mean() for frame in frames]
    for first, end in truth["flashes"]:
        assert not any(first <= shot.start <= end for shot in worn.shots)  # no cut is there
        assert light[first] > 247
        assert light[first] > light[first + 1] > light[first + 2] > light[first - 1]
    assert sum(level > 247 for level in light) == 2
    # grain: of two frames of one drawing, all pixels that are not at the end of the scale move
    image = np.full((*worn.picture[::-1], 3), 128, np.uint8)
    one, two = (finished(image, 1.0, worn, frame) for frame in (5, 6))
    assert np.array_equal(one, finished(image, 1.0, worn, 5))
    moved = one[bar:-bar].astype(int) - two[bar:-bar]
    assert moved.std() == pytest.approx(6.0 * 2**0.5, rel=0.1)


@pytest.mark.parametrize("wrong", [{"letterbox": 1.33}, {"letterbox": 0.0}, {"flashes": 99}, {"grain": -1.0}])
def test_a_look_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).rstrip("es")):
        plan_clip(4, **SMALL, **wrong)


def test_odd_sizes_and_short_films_are_refused(film, tmp_path):
    with pytest.raises(ValueError, match="not 161 x 90"):
        write_clip(tmp_path / "x.mp4", film, size=(161, 90))
    with pytest.raises(ValueError, match="at least 6 shots, not 3"):
        plan_clip(0, shots=3)
    assert not list(tmp_path.iterdir())
