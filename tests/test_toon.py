"""Drawings: exact truth about pixels, lines and captions."""

import itertools
import random
import re
from dataclasses import replace

import cv2
import numpy as np
import pytest

from factory.toon import (
    Figure,
    Pose,
    Scene,
    View,
    caption,
    draw,
    random_pose,
    random_scene,
)
from factory.toon.canvas import Canvas, box, poly
from factory.toon.traits import BACKGROUNDS, CAMERAS, WORDS


def scenes(count: int, **fixed) -> list[Scene]:
    rng = random.Random(5)
    return [random_scene(rng, **fixed) for _ in range(count)]


def luma(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


# Drawings


def test_same_scene_gives_same_pixels_and_another_seed_gives_others():
    first, again, other = (random_scene(random.Random(seed)) for seed in (1, 1, 2))
    one, two, three = (draw(scene, (160, 96)) for scene in (first, again, other))
    assert np.array_equal(one.image, two.image)
    assert np.array_equal(one.lines, two.lines)
    assert not np.array_equal(one.image, three.image)
    assert one.image.shape == (96, 160, 3)
    assert one.lines.shape == (96, 160)
    assert one.image.dtype == one.lines.dtype == np.uint8


def test_lines_lie_on_dark_pixels_of_the_picture():
    on, beside = [], []
    for scene in scenes(16, lighting="day"):
        drawing = draw(scene, (320, 180))
        dark = luma(drawing.image) < 110
        ink = drawing.lines < 64
        assert ink.sum() > 500
        on.append(dark[ink].mean())
        beside.append(dark[np.roll(ink, (5, 9), (0, 1))].mean())
    assert min(on) > 0.97
    assert np.mean(beside) < 0.5


def test_colour_edges_carry_a_line_at_the_same_place():
    scene = Scene(figures=(Figure(hair="black", clothes="blazer"),), background="beach", camera="half figure")
    drawing = draw(scene, (480, 270))
    gray = luma(drawing.image).astype(np.float32)
    thin_dark = cv2.morphologyEx(gray, cv2.MORPH_BLACKHAT, np.ones((7, 7), np.uint8))
    ink = 255 - drawing.lines.astype(np.float32)
    right = np.corrcoef(thin_dark.ravel(), ink.ravel())[0, 1]
    moved = [
        np.corrcoef(thin_dark.ravel(), np.roll(ink, by, (0, 1)).ravel())[0, 1] for by in ((0, 3), (3, 0), (-3, -3))
    ]
    assert right > 0.6
    assert right > 2 * max(moved)


def test_a_covering_shape_leaves_nothing_of_the_lines_under_it():
    canvas = Canvas((100, 100))
    canvas.gradient((0, (200, 220, 240)), (1, (200, 220, 240)))
    canvas.place(100, 0, 0)
    canvas.line(poly((0, 0.5), (1, 0.5)), (0, 0, 0))
    canvas.fill(box(0.3, 0.3, 0.7, 0.7), (250, 120, 90))
    image, lines = canvas.reduced()
    assert lines[50, 10] < 128
    assert lines[50, 90] < 128
    assert (lines[35:65, 35:65] == 255).all()
    assert (image[35:65, 35:65] == (250, 120, 90)).all()
    assert lines[50, 28:33].min() < 128  # the box's own edge


def test_what_a_block_draws_stays_inside_its_shape():
    canvas = Canvas((100, 100))
    canvas.gradient((0, (255, 255, 255)), (1, (255, 255, 255)))
    canvas.place(100, 0, 0)
    with canvas.shape(box(0.3, 0.3, 0.7, 0.7), (250, 120, 90)):
        canvas.line(poly((0, 0.5), (1, 0.5)), (0, 0, 0))
    image, lines = canvas.reduced()
    assert lines[50, 50] < 128
    assert (lines[:, :28] == 255).all()
    assert (lines[:, 73:] == 255).all()
    assert (image[:, :28] == 255).all()


def test_a_figure_hides_the_background_lines_behind_it():
    face = np.s_[80:140, 145:175]  # eyes to mouth of a centred bust
    figures = (Figure(hair="pink", hair_style="bob"),)
    lines = [
        draw(Scene(figures=figures, background=place, layout=4), (320, 240)).lines
        for place in ("city", "forest", "beach")
    ]
    for other in lines[1:]:
        assert np.array_equal(lines[0][face], other[face])
        assert not np.array_equal(lines[0], other)
    assert (lines[0][face] < 128).any()


@pytest.mark.parametrize("size", [(64, 64), (96, 54), (200, 300), (3840, 2160)])
def test_every_size_shows_the_same_picture(size):
    scene = Scene(figures=(Figure(hair="red", eyes="green"),), background="sky")
    drawing, reference = draw(scene, size), draw(scene, (size[0] * 360 // size[1], 360))
    assert drawing.image.shape == (size[1], size[0], 3)
    thumb = (48, max(16, 48 * size[1] // size[0]))
    for a, b, bound in ((drawing.image, reference.image, 6), (drawing.lines, reference.lines, 12)):
        a, b = (cv2.resize(x, thumb, interpolation=cv2.INTER_AREA).astype(float) for x in (a, b))
        assert np.abs(a - b).mean() < bound


def test_every_value_of_every_attribute_can_be_told_from_every_other():
    base = Scene(figures=(Figure(),), camera="bust")
    for attribute in WORDS:
        scenes = [
            replace(base, **{attribute: value})
            if hasattr(base, attribute)
            else replace(base, figures=(replace(base.figures[0], **{attribute: value}),))
            for value in WORDS[attribute]
        ]
        pictures = [draw(scene, (96, 96)).image.astype(int) for scene in scenes]
        for one, other in itertools.combinations(pictures, 2):
            clearly = (np.abs(one - other).max(-1) > 32).mean()
            assert clearly > 0.003, attribute  # the eyes of a bust are a hundredth of the picture


def test_every_part_of_a_pose_and_a_view_moves_the_drawing():
    scene = Scene(camera="half figure")
    still = draw(scene, (160, 160)).image
    moves = [Pose(**{name: 0.5}) for name in ("yaw", "pitch", "tilt", "sway", "blink", "mouth", "bob", "wave", "gaze")]
    for pose in moves:
        assert not np.array_equal(still, draw(scene, (160, 160), pose).image), pose
    for view in (View(zoom=1.1), View(x=0.05), View(y=0.05)):
        assert not np.array_equal(still, draw(scene, (160, 160), Pose(), view).image), view


def test_dark_scenes_are_dark_and_keep_their_lines():
    for scene in scenes(8, lighting="dark", background="forest"):
        dark, day = draw(scene, (160, 90)), draw(replace(scene, lighting="day"), (160, 90))
        assert luma(dark.image).mean() < 75 < luma(day.image).mean()
        assert np.array_equal(dark.lines, day.lines)


def test_random_scenes_and_poses_draw_in_every_framing():
    rng = random.Random(9)
    for i in range(24):
        scene = random_scene(rng, background=BACKGROUNDS[i % len(BACKGROUNDS)], camera=CAMERAS[i % len(CAMERAS)])
        drawing = draw(scene, (96, 64), [random_pose(rng) for _ in scene.figures])
        assert 0.01 < (drawing.lines < 128).mean() < 0.5


def test_wrong_values_are_refused_by_name():
    with pytest.raises(ValueError, match="hair 'purple' is not known; it is one of: black"):
        Figure(hair="purple")
    with pytest.raises(ValueError, match="background 'moon'"):
        Scene(background="moon")
    with pytest.raises(ValueError, match="not 8 x 8"):
        draw(Scene(), (8, 8))
    with pytest.raises(ValueError, match="2 poses were given for 1 figures"):
        draw(Scene(), (64, 64), [Pose(), Pose()])


def test_line_width_makes_ink_wider_and_moves_nothing():
    scene = scenes(1, camera="bust")[0]
    thin, thick = (draw(scene, (256, 256), line_width=width).lines for width in (0.7, 2.0))
    assert (thick < 128).sum() > 1.5 * (thin < 128).sum()
    assert (thick[thin < 64] < 128).mean() > 0.97


# Captions


def said(text: str, words: tuple[str, ...]) -> bool:
    return any(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) for word in words)


def test_captions_name_what_is_drawn_and_nothing_else():
    rng = random.Random(2)
    for seed in range(400):
        scene = random_scene(random.Random(seed))
        text = caption(scene, rng)
        for attribute in ("background", "camera"):
            true = getattr(scene, attribute)
            named = {value for value, words in WORDS[attribute].items() if said(text, words)}
            assert true in named, (attribute, text)
            for word in sorted(WORDS[attribute][true], key=len, reverse=True):
                text = text.replace(word, "")
        assert said(text, WORDS["lighting"]["dark"]) == (scene.lighting == "dark")
        people = text.split(" beside ")
        assert len(people) == len(scene.figures)
        for figure, words in zip(scene.figures, people, strict=True):
            eyes = {value for value, options in WORDS["eyes"].items() if said(words, options)}
            assert eyes == {figure.eyes}, text
            for option in sorted(WORDS["eyes"][figure.eyes], key=len, reverse=True):
                words = words.replace(option, "")
            assert {value for value, options in WORDS["hair"].items() if said(words, options)} == {figure.hair}, text
            for attribute in ("expression", "accessory", "clothes"):
                named = {value for value, options in WORDS[attribute].items() if options[0] and said(words, options)}
                hidden = attribute == "clothes" and scene.camera == "close-up"
                value = getattr(figure, attribute)
                assert named == (set() if hidden or value == "none" else {value}), (attribute, text)
            styles = {
                style
                for style, templates in WORDS["hair_style"].items()
                if said(
                    words,
                    tuple(
                        t.format(h).replace("a azure", "an azure")
                        for t in templates
                        for h in WORDS["hair"][figure.hair]
                    ),
                )
            }
            assert styles == {figure.hair_style}, text


def test_captions_vary_and_follow_their_seed():
    scene = scenes(1)[0]
    assert caption(scene, random.Random(4)) == caption(scene, random.Random(4))
    assert len({caption(scene, random.Random(seed)) for seed in range(50)}) > 25
    for words in WORDS.values():
        flat = [word for options in words.values() for word in options]
        assert len(flat) == len(set(flat))
