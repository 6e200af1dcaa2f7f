"""Draws a head: face, eyes, mouth, front hair, accessory. Unit: half a face's height, from its middle, y down."""

import numpy as np

from .canvas import Canvas, Colour, ellipse, limb, mix, moved, poly, shade
from .hair import DYES, HAIR_COLOURS, WHITE, front_hair, front_outline, turned
from .traits import Figure, Pose

EYE_COLOURS: dict[str, Colour] = {
    "blue": (52, 132, 236),
    "green": (40, 168, 92),
    "amber": (232, 158, 30),
    "red": (216, 44, 62),
}
SKIN_COLOURS: dict[str, Colour] = {"fair": (255, 232, 216), "tan": (242, 205, 172), "brown": (196, 142, 108)}
_FACE = poly(
    *((0, -1.02), (-0.5, -0.95), (-0.8, -0.6), (-0.86, -0.1), (-0.83, 0.25), (-0.7, 0.56), (-0.42, 0.84), (-0.12, 1.0)),
    *((0.0, 1.02), (0.12, 1.0), (0.42, 0.84), (0.7, 0.56), (0.83, 0.25), (0.86, -0.1), (0.8, -0.6), (0.5, -0.95)),
)


def _lids(figure: Figure, pose: Pose) -> tuple[np.ndarray, np.ndarray, float]:
    """Upper lid, lower lid (inner to outer corner, right eye) and how far the eye is open."""
    upper = poly((0.15, 0.17, 1), (0.18, 0.0), (0.27, -0.11), (0.4, -0.15), (0.53, -0.1), (0.61, 0.03), (0.645, 0.2, 1))
    lower = poly((0.17, 0.3), (0.24, 0.4), (0.38, 0.44), (0.52, 0.4), (0.61, 0.3))
    slant = (upper[:, 0] - 0.4) / 0.25
    if figure.expression == "angry":
        upper[:, 1] += 0.09 - 0.11 * slant
    elif figure.expression == "sad":
        upper[:, 1] += 0.05 + 0.07 * slant
    elif figure.expression == "surprised":
        upper[1:-1, 1] -= 0.08
        lower[:, 1] += 0.04
    elif figure.expression == "smiling":
        lower[:, 1] -= 0.025
    opening = 1 - pose.blink
    shut = 0.31 + 0.09 * (1 - ((upper[:, 0] - 0.4) / 0.25) ** 2)
    upper[:, 1] = shut + (upper[:, 1] - shut) * opening
    shut = 0.31 + 0.09 * (1 - ((lower[:, 0] - 0.4) / 0.25) ** 2)
    lower[:, 1] = shut + (lower[:, 1] - shut) * opening
    return upper, lower, opening


def _eye(canvas: Canvas, figure: Figure, pose: Pose, side: int) -> None:
    colour = EYE_COLOURS[figure.eyes]
    skin = SKIN_COLOURS[figure.skin]
    upper, lower, opening = _lids(figure, pose)

    def put(shape: np.ndarray) -> np.ndarray:
        return turned(moved(shape, sx=side), pose)

    if opening > 0.2:
        white = put(np.concatenate([upper, lower[::-1]]))
        small = 0.78 if figure.expression == "surprised" else 1.0
        centre = turned(poly((0.385 * side + 0.05 * pose.gaze, 0.15)), pose)[0]
        narrow = 1 - 0.12 * max(0.0, side * pose.yaw)  # the eye that turns away is seen narrower
        x, y, rx, ry = centre[0], centre[1], 0.2 * small * narrow, 0.285 * small
        with canvas.shape(white, WHITE, 0):
            canvas.tone(moved(white, dy=-0.4 * opening), mix(WHITE, (150, 140, 190), 0.5))
            with canvas.shape(ellipse(x, y, rx, ry), colour, 0.9):
                canvas.tone(ellipse(x, y - ry * 0.85, rx * 1.3, ry * 0.75), mix(shade(colour), (20, 14, 50), 0.35))
                canvas.tone(ellipse(x, y + ry * 0.72, rx * 0.72, ry * 0.42), mix(colour, (255, 255, 220), 0.5))
            canvas.fill(ellipse(x, y + ry * 0.02, rx * 0.3, ry * 0.34, 8), mix(shade(colour), (10, 6, 30), 0.75), 0.5)
            canvas.fill(ellipse(x - rx * 0.38, y - ry * 0.42, rx * 0.36, ry * 0.28, 8), (255, 255, 255), 0.4)
            canvas.tone(ellipse(x + rx * 0.42, y + ry * 0.45, rx * 0.2, ry * 0.15, 8), (255, 255, 255))
        canvas.brush(put(lower[1:]), skin, 0.8)
    lash_ink = mix((40, 24, 30), HAIR_COLOURS[figure.hair], 0.12)
    thickness = np.array([0.015, 0.055, 0.075, 0.08, 0.085, 0.09, 0.03]) * (0.55 + 0.45 * opening)
    top = upper.copy()
    top[:, 1] -= thickness
    top[0, :2] = upper[0, :2] + (-0.02, 0.0)
    wing = upper[-1, :2] + ((0.1, -0.1) if opening > 0.2 else (0.07, 0.05))
    lash = np.concatenate([upper, [(*wing, 1)], top[-2::-1]])
    canvas.fill(put(lash), lash_ink, 0)
    canvas.brush(put(np.concatenate([upper[:2] - (0.0, 0.02, 0), upper[2:-1] - (0, 0.04, 0)])), lash_ink, 2.4)
    for start, end in (((0.58, -0.07), (0.73, -0.14)), ((0.61, 0.0), (0.76, -0.03))):
        lift = (0, (1 - opening) * 0.38, 0)
        flick = poly(start, ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.02), end) + lift
        canvas.brush(put(flick), lash_ink, 1.6, taper="end")
    if opening > 0.2:
        crease = upper[2:-1] - (0.0, 0.17, 0)
        canvas.brush(put(crease), shade(skin), 0.6)


def _brow(canvas: Canvas, figure: Figure, pose: Pose, side: int) -> None:
    inner, outer, lift = {
        "smiling": (0.0, 0.0, -0.05),
        "neutral": (0.0, 0.0, 0.0),
        "surprised": (-0.04, 0.0, -0.17),
        "sad": (-0.16, 0.12, 0.0),
        "angry": (0.24, -0.12, 0.02),
    }[figure.expression]
    brow = poly((0.17, -0.33 + inner), (0.34, -0.41 + 0.4 * inner), (0.5, -0.41 + 0.5 * outer), (0.66, -0.32 + outer))
    thick = 3.4 if figure.expression == "angry" else 1.9
    canvas.brush(turned(moved(brow, dy=lift, sx=side), pose), shade(HAIR_COLOURS[figure.hair]), thick)


def _mouth(canvas: Canvas, figure: Figure, pose: Pose) -> None:
    skin, talk = SKIN_COLOURS[figure.skin], pose.mouth
    red, tongue = (176, 62, 70), (242, 138, 138)

    def open_mouth(shape: np.ndarray, teeth: bool = True) -> None:
        shape = turned(shape, pose)
        low, high = shape[:, 1].max(), shape[:, 1].min()
        middle = shape[:, 0].mean()
        with canvas.shape(shape, red, 0.9):
            canvas.tone(ellipse(middle, low, 0.13, (low - high) * 0.45), tongue)
            if teeth:
                canvas.tone(ellipse(middle, high - 0.02, 0.3, 0.065), WHITE)

    if figure.expression == "smiling":
        drop = 0.25 + 0.08 * talk
        open_mouth(
            poly(
                (-0.29, 0.6, 1),
                (-0.13, 0.65),
                (0, 0.66),
                (0.13, 0.65),
                (0.29, 0.6, 1),
                (0.18, 0.62 + drop * 0.85),
                (0, 0.62 + drop),
                (-0.18, 0.62 + drop * 0.85),
            )
        )
    elif figure.expression == "surprised":
        open_mouth(ellipse(0, 0.75, 0.125 + 0.02 * talk, 0.155 + 0.04 * talk, 10), teeth=False)
    elif figure.expression == "angry":  # teeth set together, the corners drawn down
        low = 0.82 + 0.07 * talk
        shape = poly((-0.24, 0.8, 1), (-0.13, 0.68), (0.13, 0.68), (0.24, 0.8, 1), (0.14, low), (-0.14, low))
        canvas.fill(turned(shape, pose), WHITE)
        canvas.brush(turned(poly((-0.2, 0.755), (0.0, 0.75), (0.2, 0.755)), pose), red, 1.0)
    elif talk > 0.15:
        wide = 0.15
        bend = {"sad": -0.04}.get(figure.expression, 0.0)
        low = 0.7 + 0.05 + 0.12 * talk
        open_mouth(
            poly((-wide, 0.7 - bend, 1), (0, 0.69 + bend), (wide, 0.7 - bend, 1), (wide * 0.6, low), (-wide * 0.6, low))
        )
    elif figure.expression == "neutral":
        canvas.brush(
            turned(poly((-0.12, 0.71), (-0.05, 0.73), (0.0, 0.722), (0.05, 0.73), (0.12, 0.71)), pose), skin, 1.3
        )
    else:
        canvas.brush(turned(poly((-0.16, 0.82), (-0.06, 0.73), (0.06, 0.73), (0.16, 0.82)), pose), skin, 2.0)


def _bow(canvas: Canvas, x: float, y: float, size: float, colour: Colour, angle: float = 0.0) -> None:
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    def put(shape: np.ndarray) -> np.ndarray:
        return np.hstack([shape[:, :2] @ turn * size + (x, y), shape[:, 2:]])

    for side in (-1, 1):
        canvas.fill(
            put(
                moved(
                    poly((0.05, 0.05, 1), (0.3, 0.5), (0.6, 0.95, 1), (0.5, 0.72), (0.75, 0.75, 1), (0.45, 0.3)),
                    sx=side,
                )
            ),
            shade(colour, 0.6),
        )
    for side in (-1, 1):
        loop = moved(poly((0, 0, 1), (0.35, -0.45), (0.85, -0.55), (1.0, -0.1), (0.85, 0.4), (0.35, 0.25)), sx=side)
        with canvas.shape(put(loop), colour):
            canvas.tone(
                put(moved(poly((0.2, 0.1), (0.6, 0.0), (0.9, 0.1), (0.8, 0.34), (0.4, 0.2)), sx=side)), shade(colour)
            )
        canvas.brush(put(moved(poly((0.12, -0.03), (0.35, -0.1), (0.55, -0.12)), sx=side)), colour, 0.8, taper="end")
    canvas.fill(put(ellipse(0, 0, 0.2, 0.23, 8)), colour)


def _accessory(canvas: Canvas, figure: Figure, pose: Pose) -> None:
    accent = DYES[figure.dye][1]
    if figure.accessory == "ribbon":
        _bow(canvas, 0.55 + 0.1 * pose.yaw, -1.1, 0.62, accent, 0.35)
    elif figure.accessory == "headphones":
        arch = limb(
            [(-1.1, 0.0), (-1.16, -0.55), (-0.88, -1.12), (0, -1.42), (0.88, -1.12), (1.16, -0.55), (1.1, 0.0)],
            (0.06,) * 7,
        )
        canvas.fill(arch, (86, 86, 104))
        for side in (-1, 1):
            canvas.fill(ellipse(1.08 * side, 0.12, 0.21, 0.4), (74, 74, 92))
            canvas.fill(ellipse(1.12 * side, 0.12, 0.13, 0.28), accent, 0.8)
    elif figure.accessory == "cat ears":
        hair = HAIR_COLOURS[figure.hair]
        for side in (-1, 1):
            ear = moved(
                poly((0.28, -1.2, 1), (0.42, -1.62), (0.72, -1.88, 1), (0.92, -1.5), (0.94, -0.98, 1), (0.6, -1.12)),
                sx=side,
            )
            canvas.fill(ear, hair)
            inner = moved(
                poly((0.44, -1.26, 1), (0.52, -1.52), (0.69, -1.7, 1), (0.79, -1.42), (0.8, -1.14, 1)), sx=side
            )
            canvas.fill(inner, (255, 188, 196), 0.7)
    if figure.hair_style == "twintails":
        for side in (-1, 1):
            canvas.fill(ellipse(1.02 * side, -0.6, 0.17, 0.2, 8), accent)
    elif figure.hair_style == "ponytail":
        canvas.fill(ellipse(0.78, -1.1, 0.16, 0.14, 8), accent)


def _glasses(canvas: Canvas, pose: Pose) -> None:
    frame = (60, 44, 60)
    for side in (-1, 1):
        lens = poly(
            (0.11, -0.02),
            (0.2, -0.15),
            (0.42, -0.19),
            (0.64, -0.13),
            (0.71, 0.05),
            (0.67, 0.36),
            (0.5, 0.49),
            (0.26, 0.47),
            (0.13, 0.3),
        )
        canvas.line(turned(moved(lens, sx=side), pose), frame, 2.3, closed=True)
        canvas.line(turned(poly((0.71 * side, 0.02), (0.85 * side, -0.02)), pose, 0.8), frame, 1.8)
    canvas.line(turned(poly((-0.11, 0.06), (0, 0.01), (0.11, 0.06)), pose), frame, 1.9)


def _anger(canvas: Canvas) -> None:
    """The mark of anger that comics draw over the temple: four bent strokes."""
    for across, down in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
        stroke = moved(poly((0.05, 0.25), (0.06, 0.06, 1), (0.25, 0.05)), sx=across, sy=down)
        canvas.line(moved(stroke, dx=-0.62, dy=-0.86), (226, 30, 40), 2.2)


def draw_head(canvas: Canvas, figure: Figure, pose: Pose) -> None:
    """The head without its back hair, over whatever the canvas holds."""
    skin = SKIN_COLOURS[figure.skin]
    front, strands = front_outline(figure, pose)
    if figure.hair_style in ("short", "ponytail", "twintails"):
        for side in (-1, 1):
            canvas.fill(moved(poly((0.8, 0.05), (0.95, 0.0), (1.0, 0.18), (0.92, 0.42), (0.78, 0.42)), sx=side), skin)
    face = _FACE.copy()
    face[:, 0] += 0.1 * pose.yaw * np.clip(face[:, 1] + 0.1, 0, None)
    with canvas.shape(face, skin):
        canvas.tone(moved(front, dx=0.03, dy=0.11), shade(skin, 0.55))
        blush = mix(skin, (255, 110, 120), 0.5 if figure.expression in ("smiling", "surprised") else 0.26)
        for side in (-1, 1):
            canvas.tone(turned(ellipse(0.52 * side, 0.54, 0.19, 0.085), pose), mix(skin, blush, 0.5))
            canvas.tone(turned(ellipse(0.52 * side, 0.54, 0.13, 0.05), pose), blush)
    if figure.expression == "smiling":
        for side in (-1, 1):
            for x in (0.47, 0.55):
                canvas.brush(
                    turned(poly(((x + 0.02) * side, 0.51), ((x - 0.02) * side, 0.57)), pose), (230, 80, 80), 0.6
                )
    canvas.brush(turned(poly((0.0, 0.47), (0.035, 0.535), (-0.015, 0.55)), pose, 1.2), shade(skin), 0.9)
    _mouth(canvas, figure, pose)
    for side in (-1, 1):
        _eye(canvas, figure, pose, side)
    if figure.expression == "sad":  # a tear runs down from each eye
        for side in (-1, 1):
            tear = poly(
                (0.33, 0.4, 1), (0.49, 0.4, 1), (0.54, 0.62), (0.51, 0.82), (0.41, 0.86), (0.31, 0.8), (0.3, 0.6)
            )
            canvas.fill(turned(moved(tear, sx=side), pose), (158, 214, 255), 0.7)
    front_hair(canvas, figure, front, strands, pose)
    for side in (-1, 1):
        _brow(canvas, figure, pose, side)
    if figure.expression == "angry":
        _anger(canvas)
    if figure.accessory == "glasses":
        _glasses(canvas, pose)
    _accessory(canvas, figure, pose)
