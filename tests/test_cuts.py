"""Where shots start in films with cuts, fades, dissolves, flashes and pans, and which frame stands for each."""

from __future__ import annotations

import functools

import cv2
import numpy as np
import pytest

from factory.cuts import starts_shot
from factory.shots import Shot, find_shots
from factory.video import VideoConfig

CONFIG = VideoConfig()
SIZE = (160, 90)  # pixels


def picture(seed: int, shift: float = 0.0) -> np.ndarray:
    """Flat shapes in front of a wide ground, moved to the left by `shift` pixels."""
    rng = np.random.default_rng(seed)
    image = np.full((SIZE[1], SIZE[0], 3), rng.integers(60, 220, 3), np.uint8)
    for _ in range(120):
        x, y, size = rng.uniform(-100, 700), rng.uniform(0, SIZE[1]), rng.uniform(6, 30)
        colour = tuple(int(level) for level in rng.integers(20, 250, 3))
        cv2.ellipse(image, (round(x - shift), round(y)), (round(size), round(size / 2)), 30, 0, 360, colour, -1)
    return image


def still(seed: int, count: int = 24) -> list[np.ndarray]:
    return [picture(seed)] * count


def mixed(before: np.ndarray, after: np.ndarray, count: int) -> list[np.ndarray]:
    """`count` frames that lead from one picture to the other, neither of them among them."""
    shares = [(i + 1) / (count + 1) for i in range(count)]
    return [cv2.addWeighted(before, 1 - share, after, share, 0) for share in shares]


def shots(frames: list[np.ndarray], *, fps: float = 24.0, first: int = 0) -> list[Shot]:
    """The shots of `frames` as decoded from frame `first` on."""
    decoded = ((i, i / fps, frames[i]) for i in range(first, len(frames)))
    return list(find_shots(decoded, functools.partial(starts_shot, config=CONFIG), CONFIG))


def starts(frames: list[np.ndarray], fps: float = 24.0) -> list[int]:
    return sorted({round(shot.start * fps) for shot in shots(frames, fps=fps)})


BLACK, WHITE = (np.full((SIZE[1], SIZE[0], 3), level, np.uint8) for level in (0, 255))


@pytest.mark.parametrize("hold", [1, 2, 3])
@pytest.mark.parametrize("fps", [12, 24, 60])
def test_a_cut_is_found_at_its_frame_and_held_poses_are_none(hold: int, fps: int) -> None:
    def moving(seed: int) -> list[np.ndarray]:
        return [picture(seed, 6.0 * (i // hold)) for i in range(fps)]

    assert starts([*moving(1), *moving(2), *moving(3)], fps) == [0, fps, 2 * fps]


@pytest.mark.parametrize("light", [BLACK, WHITE], ids=["black", "white"])
@pytest.mark.parametrize("rest", [0, 3, 40])
def test_a_fade_parts_two_shots_once_and_is_not_chosen(light: np.ndarray, rest: int) -> None:
    out, into = mixed(picture(1), light, 8), mixed(light, picture(2), 8)
    frames = [*still(1), *out, *[light] * rest, *into, *still(2)]
    one, two = shots(frames)
    assert 24 < round(two.start * 24) < 24 + 16 + rest
    assert one.best.look.index < 24
    assert two.best.look.index >= 24 + 16 + rest


@pytest.mark.parametrize("length", [6, 12, 24])
def test_a_dissolve_parts_two_shots_in_its_middle_and_is_not_chosen(length: int) -> None:
    blurred = cv2.GaussianBlur(picture(1), (0, 0), 2)  # a mixture of both is sharper
    frames = [*[blurred] * 36, *mixed(blurred, picture(2), length), *still(2, 36)]
    one, two = shots(frames)
    assert abs(round(two.start * 24) - 36 - length / 2) <= 2
    assert one.best.look.index < 36
    assert two.best.look.index >= 36 + length


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_flash_makes_no_cut_and_is_not_chosen(count: int) -> None:
    negative = [255 - picture(1), picture(7), WHITE, BLACK]
    for lit in negative:
        (shot,) = shots([*still(1), *[lit] * count, *still(1)])
        assert not 24 <= shot.best.look.index < 24 + count


def test_a_flash_between_two_pictures_is_one_cut() -> None:
    frames = [*still(1), *[WHITE] * 2, *mixed(WHITE, picture(2), 3), *still(2)]
    assert len(starts(frames)) == 2


def test_a_mixed_frame_at_a_cut_is_not_chosen() -> None:
    sharp = [cv2.GaussianBlur(picture(seed), (0, 0), 1) for seed in (1, 2)]
    half = cv2.addWeighted(picture(1), 0.5, picture(2), 0.5, 0)
    found = shots([*[sharp[0]] * 24, half, *[sharp[1]] * 24])
    assert len(found) == 2
    assert all(shot.best.look.index != 24 for shot in found)


@pytest.mark.parametrize("speed", [1, 3, 8])
def test_a_pan_is_no_cut_and_gives_a_frame_for_each_picture_on_its_way(speed: int) -> None:
    found = shots([picture(1, speed * i) for i in range(min(72, 560 // speed))])
    assert {shot.start for shot in found} == {0.0}
    assert len(found) >= 2
    assert [shot.best.look.index for shot in found] == sorted({shot.best.look.index for shot in found})


def test_a_slow_morph_is_no_cut_and_gives_both_pictures() -> None:
    found = shots([*still(2), *mixed(picture(2), picture(3), 120), *still(3)])
    assert [shot.start for shot in found] == [0.0, 0.0]
    assert found[0].best.look.index < 60 < found[1].best.look.index


def test_letterbox_and_grain_hide_no_cut_and_make_none() -> None:
    rng = np.random.default_rng(0)

    def filmed(seed: int, i: int) -> np.ndarray:
        noisy = picture(seed, i) + rng.normal(0, 10, (SIZE[1], SIZE[0], 1))
        image = noisy.clip(0, 255).astype(np.uint8)
        image[:11], image[-11:] = 0, 0
        return image

    fade = [(filmed(2, 24) * (1 - share)).astype(np.uint8) for share in np.linspace(0, 1, 8)]
    frames = [*(filmed(1, i) for i in range(24)), *(filmed(2, i) for i in range(24)), *fade]
    frames += [*fade[::-1], *(filmed(3, i) for i in range(24))]
    assert len(starts(frames)) == 3


def test_shots_are_the_same_wherever_decoding_began() -> None:
    """What lies further back than the least overlap of segments has no say."""
    dark = mixed(picture(3), BLACK, 8)
    frames = [
        *still(1, 30),
        *[WHITE] * 2,
        *still(1, 20),
        *still(2, 9),
        *still(3, 40),
        *dark,
        *mixed(BLACK, picture(4), 8),
    ]
    frames += [
        *still(4, 30),
        *mixed(picture(4), picture(5), 12),
        *still(5, 30),
        *(picture(6, 4 * i) for i in range(60)),
    ]
    whole = [(shot.start, shot.end, shot.best.look.index) for shot in shots(frames)]
    assert len(whole) >= 6
    for first in range(1, len(frames), 7):
        sure = first / 24 + 2 * CONFIG.reach_seconds
        part = [(shot.start, shot.end, shot.best.look.index) for shot in shots(frames, first=first)]
        assert [shot for shot in part if shot[0] >= sure] == [shot for shot in whole if shot[0] >= sure]


def test_a_film_without_a_picture_has_no_shots() -> None:
    assert shots([BLACK, WHITE] * 12) == []
    assert shots([]) == []


def test_the_settings_of_cuts_are_checked() -> None:
    with pytest.raises(ValueError, match="overlap_seconds must be at least 1,"):
        VideoConfig(overlap_seconds=0.5)
    with pytest.raises(ValueError, match="transition_seconds must be above 0"):
        VideoConfig(transition_seconds=0)
