"""Draws a whole picture: one or two figures in front of a background, framed by a camera."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import background
from .body import draw_body
from .canvas import Canvas, Colour
from .hair import back_hair
from .head import draw_head
from .traits import Pose, Scene, View

# Head units seen from the top of the frame to its bottom, and the y of the frame's top.
_FRAMING = {"close-up": (2.75, -1.5), "bust": (4.3, -1.75), "half figure": (6.4, -2.0), "full figure": (12.0, -2.1)}
# How far the background's detail is enlarged behind a near figure.
_DEPTH = {"close-up": 1.5, "bust": 1.25, "half figure": 1.1, "full figure": 1.0}
_DARK: Colour = (0.35, 0.38, 0.54)
_TINTS: dict[str, Colour] = {"night": (0.80, 0.82, 0.98), "sunset": (1.0, 0.88, 0.82), "forest": (0.95, 1.0, 0.92)}


@dataclass(frozen=True)
class Drawing:
    """One drawn frame.

    `image`: RGB uint8 (height, width, 3). `lines`: uint8 (height, width), black ink (0) on white (255), the exact
    line art of `image`: same place pixel for pixel, nothing of what another shape hides.
    """

    image: np.ndarray
    lines: np.ndarray


def draw(
    scene: Scene,
    size: tuple[int, int],
    pose: Pose | Sequence[Pose] = Pose(),  # noqa: B008
    view: View = View(),  # noqa: B008
    *,
    line_width: float = 1.0,
) -> Drawing:
    """A scene in a pose -> `Drawing`; size is (width, height) in pixels, each at least 16.

    `pose` holds for all figures, or is a sequence with one pose per figure. `line_width` is a factor of the ink's usual
    width. The same arguments give the same pixels.
    """
    width, height = size
    if min(size) < 16:
        raise ValueError(f"A drawing needs at least 16 x 16 pixels, not {width} x {height}")
    poses = [pose] * len(scene.figures) if isinstance(pose, Pose) else list(pose)
    if len(poses) != len(scene.figures):
        raise ValueError(f"{len(poses)} poses were given for {len(scene.figures)} figures")
    canvas = Canvas(size)
    canvas.line_px *= line_width
    dark = _DARK if scene.lighting == "dark" else (1.0, 1.0, 1.0)

    zoom = 1 + (view.zoom - 1) * 0.5  # what is far moves less
    depth = _DEPTH[scene.camera] * zoom
    canvas.tint = dark
    canvas.place(
        height * depth, width * (0.5 + view.x * 0.5 - 0.06 * scene.place), height * (0.5 - 0.5 * depth + view.y * 0.5)
    )
    wide = width / height / 2 + 0.15
    background.DRAW[scene.background](canvas, wide, random.Random(f"{scene.background}/{scene.layout}"))

    tint = _TINTS.get(scene.background, (1.0, 1.0, 1.0))
    canvas.tint = (dark[0] * tint[0], dark[1] * tint[1], dark[2] * tint[2])
    tall, top = _FRAMING[scene.camera]
    pair = len(scene.figures) == 2
    apart = 2.9 if scene.camera != "close-up" else 2.5  # head units between two figures
    if pair and width / height * tall < apart * 1.8:
        tall = apart * 1.8 * height / width
    scale = height / tall * view.zoom
    canvas.line_px *= 0.55 + 0.6 * min(1.0, 3.2 / tall)  # a small figure is inked finer, so that its face stays clear
    room = max(0.0, width / scale / 2 - 1.5 - (apart / 2 if pair else 0))
    for i, (figure, held) in enumerate(zip(scene.figures, poses, strict=True)):
        if pair or scene.camera == "close-up":
            held = replace(held, wave=0.0)  # no room for a raised arm
        x = width * (0.5 + view.x) + scale * (room * scene.place * 0.6 + (apart * (i - 0.5) if pair else 0))
        y = height * (0.5 + view.y) - scale * (tall / 2 + top + held.bob)

        def head(x: float = x, y: float = y, tilt: float = held.tilt) -> None:
            canvas.place(scale, x, y, tilt, (0, 1.15))

        head()
        back_hair(canvas, figure, held)
        canvas.place(scale, x, y)
        draw_body(canvas, figure, held)
        head()
        draw_head(canvas, figure, held)
    return Drawing(*canvas.reduced())
