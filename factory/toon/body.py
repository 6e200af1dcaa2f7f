"""Draws a body below its head, in the head's units: shoulders at y 1.7, waist at 3.3, feet at 9.2."""

import numpy as np

from .canvas import Canvas, Colour, ellipse, limb, mix, moved, poly, shade
from .hair import DYES, WHITE
from .head import SKIN_COLOURS
from .traits import Figure, Pose

FEET = 9.3  # y of the soles


def _arm(pose: Pose, side: int) -> np.ndarray:
    """Shoulder, upper arm, elbow, forearm, wrist: (5, 2)."""
    down = np.array([(0.86, 1.86), (1.12, 2.5), (1.27, 3.15), (1.28, 3.8), (1.2, 4.4)])
    if side == -1 and pose.wave:
        up = np.array([(0.86, 1.9), (1.4, 2.3), (1.9, 2.45), (2.1, 1.7), (2.15, 1.05)])
        up[3:, 0] += 0.16 * np.sin(6.3 * pose.wave)  # the hand swings between half and fully raised
        down = down + (up - down) * min(1.0, pose.wave * 2)
    return down * (side, 1)


def _draw_arm(
    canvas: Canvas, figure: Figure, pose: Pose, side: int, sleeve: Colour, reach: float, loose: float
) -> None:
    """An arm whose sleeve covers `reach` (0 to 1) of its length and is `loose` wide at its end."""
    skin = SKIN_COLOURS[figure.skin]
    joints = _arm(pose, side)
    end, before = joints[-1], joints[-2]
    along = (end - before) / np.hypot(*(end - before))
    across = np.array((-along[1], along[0]))

    def at(u: float, v: float) -> tuple[float, float]:
        return tuple(end + along * u + across * v)

    canvas.fill(limb(joints, (0.27, 0.24, 0.2, 0.18, 0.14)), skin)
    thumb = side if joints[-1][1] > 3 else -side
    canvas.fill(
        poly(at(0.05, 0.1 * thumb), at(0.2, 0.24 * thumb), at(0.4, 0.26 * thumb), at(0.34, 0.1 * thumb)), skin, 0.8
    )
    hand = poly(
        at(-0.04, -0.14),
        at(0.25, -0.2),
        at(0.52, -0.17),
        at(0.66, -0.05),
        at(0.62, 0.09),
        at(0.4, 0.18),
        at(0.2, 0.17),
        at(-0.04, 0.14),
    )
    canvas.fill(hand, skin, 0.8)
    for v in (-0.07, 0.02):
        canvas.brush(poly(at(0.62, v), at(0.5, v), at(0.38, v)), skin, 0.6, taper="end")
    if joints[-1][1] < 3:  # a wide sleeve slides down a raised arm
        reach, loose = min(reach, 1 - loose), loose / 2
    last = max(2, round(reach * 4) + 1)
    widths = (0.34, 0.31, 0.29, 0.27, 0.25)[: last - 1]
    cloth = limb(joints[:last], (*widths, widths[-1] + loose))
    with canvas.shape(cloth, sleeve):
        inner = joints[:last] - (0.17 * side, 0)
        canvas.tone(limb(inner, (0.14,) * last), shade(sleeve))


def _legs(canvas: Canvas, figure: Figure, sock: Colour, shoe: Colour, sock_top: float) -> None:
    if not canvas.shows(4.4):
        return
    skin = SKIN_COLOURS[figure.skin]
    for side in (-1, 1):
        leg = poly(
            (0.08, 4.4, 1),
            (0.92, 4.4, 1),
            (0.84, 5.6),
            (0.68, 6.6),
            (0.7, 7.3),
            (0.56, 8.75, 1),
            (0.24, 8.75, 1),
            (0.2, 7.3),
            (0.2, 6.6),
            (0.1, 5.6),
        )
        leg = moved(leg, sx=side)
        with canvas.shape(leg, skin):
            canvas.tone(moved(poly((0.0, 4.4, 1), (1.2, 4.4, 1), (1.0, 5.9), (0.0, 5.9)), sx=side), shade(skin, 0.7))
            canvas.fill(
                moved(poly((-0.2, sock_top, 1), (1.2, sock_top, 1), (1.2, 9, 1), (-0.2, 9, 1)), sx=side), sock, 0.8
            )
            canvas.tone(
                moved(poly((0.0, sock_top, 1), (0.3, sock_top, 1), (0.32, 9), (0.0, 9)), sx=side), shade(sock, 0.6)
            )
        foot = poly((0.2, 8.62, 1), (0.6, 8.62, 1), (0.72, 8.95), (0.74, 9.2), (0.62, FEET), (0.2, FEET), (0.14, 9.1))
        canvas.fill(moved(foot, sx=side), shoe)


def _skirt(canvas: Canvas, colour: Colour, pose: Pose, hem: float, flare: float, trim: Colour | None = None) -> None:
    if not canvas.shows(3.2):
        return
    swing = 0.08 * pose.sway
    pleats = 7
    xs = np.linspace(flare, -flare, pleats + 1) + swing
    bottom = []
    for i, x in enumerate(xs):
        dip = 0.12 * (1 - (2 * i / pleats - 1) ** 2)
        bottom.append((x, hem + dip, 1))
        if i < pleats:
            bottom.append(((x + xs[i + 1]) / 2 + 0.06, hem + dip + 0.09, 1))
    skirt = poly((-0.72, 3.25, 1), (0.72, 3.25, 1), (1.0, 3.9), *bottom, (-1.0, 3.9))
    with canvas.shape(skirt, colour):
        for i in range(pleats):
            x = xs[i] - 0.05
            fold = poly((x * 0.62, 3.5, 1), (x, hem + 0.4, 1), (x - 0.14 * flare, hem + 0.4, 1))
            canvas.tone(fold, shade(colour))
        if trim:
            band = moved(poly(*bottom), dy=-0.2)
            canvas.tone(np.concatenate([band, moved(band, dy=-0.09)[::-1]]), trim)
    for x in xs[1:-1]:
        canvas.brush(poly((x, hem + 0.06), (x * 0.8, (hem + 3.6) / 2), (x * 0.66, 3.6)), colour, 0.8, taper="end")


def _torso(canvas: Canvas, colour: Colour, hem: float = 3.45, wide: float = 0.74) -> np.ndarray:
    half = ((0.3, 1.36, 1), (0.66, 1.5), (1.02, 1.72), (1.1, 2.0), (0.92, 2.5), (wide + 0.02, 3.0), (wide, hem, 1))
    torso = poly(*half, *((-x, y, *rest) for x, y, *rest in half[::-1]))
    with canvas.shape(torso, colour):
        canvas.tone(poly((0.62, 1.9), (0.55, 2.6), (0.5, hem, 1), (1.3, hem, 1), (1.3, 1.8)), shade(colour))
        canvas.tone(poly((-0.9, 2.1), (-0.68, 2.6), (-0.64, hem, 1), (-1.3, hem, 1), (-1.3, 2.0)), shade(colour))
        canvas.brush(poly((-0.5, 2.75), (-0.2, 2.86), (0.1, 2.84)), colour, 0.6)
    return torso


def _neck(canvas: Canvas, figure: Figure) -> None:
    skin = SKIN_COLOURS[figure.skin]
    neck = poly(
        (-0.27, 0.7, 1),
        (0.27, 0.7, 1),
        (0.29, 1.25),
        (0.6, 1.5),
        (0.5, 2.1),
        (0, 2.3),
        (-0.5, 2.1),
        (-0.6, 1.5),
        (-0.29, 1.25),
    )
    with canvas.shape(neck, skin):
        canvas.tone(poly((-0.4, 0.6), (0.4, 0.6), (0.36, 1.12), (0.05, 1.38), (-0.3, 1.2)), shade(skin, 0.75))
    for side in (-1, 1):
        canvas.brush(moved(poly((0.1, 1.62), (0.3, 1.54), (0.5, 1.52)), sx=side), skin, 0.6)


def _open_neck(canvas: Canvas, figure: Figure, depth: float, wide: float = 0.36) -> None:
    """Skin seen in the neck of a garment: an inked V with the neck's shadow in it."""
    skin = SKIN_COLOURS[figure.skin]
    opening = poly((-wide, 1.32, 1), (wide, 1.32, 1), (0, depth, 1))
    canvas.fill(opening, skin, 0)
    canvas.tone(poly((-wide + 0.06, 1.3, 1), (wide - 0.06, 1.3, 1), (0.08, 1.5), (-0.1, 1.48)), shade(skin, 0.75))
    canvas.line(opening[[0, 2, 1]], skin, 0.8)


def _collar(canvas: Canvas, colour: Colour, outer: float, point: float, depth: float, line: float = 1.0) -> None:
    """Two collar flaps along a V neck; `outer` is their width at the shoulder, `point` the tips' y."""
    for side in (-1, 1):
        flap = poly(
            (0.3, 1.24, 1), (0.44, 1.3), (outer, 1.52, 1), (outer * 0.72, point, 1), (0.0, depth, 1), (0.2, 1.6)
        )
        canvas.fill(moved(flap, sx=side), colour, line)


def draw_body(canvas: Canvas, figure: Figure, pose: Pose) -> None:
    """The whole body; what lies outside the frame costs little."""
    cloth, accent = DYES[figure.dye]
    _neck(canvas, figure)
    if not canvas.shows(1.1):
        return
    for side in (-1, 1):
        sleeve, reach, loose = {
            "sailor uniform": (WHITE, 0.3, 0.06),
            "blazer": (cloth, 1.0, 0.0),
            "hoodie": (mix(accent, WHITE, 0.25), 1.0, 0.05),
            "summer dress": (mix(accent, WHITE, 0.72), 0.25, 0.12),
            "kimono": (mix(cloth, WHITE, 0.35), 0.75, 0.4),
        }[figure.clothes]
        if not (side == -1 and pose.wave):
            _draw_arm(canvas, figure, pose, side, sleeve, reach, loose)
    if figure.clothes == "sailor uniform":
        _legs(canvas, figure, (64, 62, 86), (110, 66, 58), 6.2)
        _skirt(canvas, cloth, pose, 5.5, 1.45, mix(cloth, WHITE, 0.8))
        _torso(canvas, WHITE, 3.55, 0.8)
        _open_neck(canvas, figure, 2.2)
        _collar(canvas, cloth, 0.98, 2.05, 2.36)
        for side in (-1, 1):
            canvas.line(
                moved(poly((0.86, 1.58, 1), (0.66, 1.93, 1), (0.08, 2.2, 1)), sx=side), mix(cloth, WHITE, 0.8), 0.5
            )
        for side in (-1, 1):
            canvas.fill(
                moved(poly((0.0, 2.3, 1), (0.16, 2.5), (0.42, 2.98, 1), (0.22, 2.94), (0.08, 3.06, 1)), sx=side),
                shade(accent, 0.5),
            )
            canvas.fill(
                moved(poly((0, 2.3, 1), (0.24, 2.16), (0.46, 2.24), (0.44, 2.46), (0.2, 2.44)), sx=side), accent
            )
        canvas.fill(ellipse(0, 2.32, 0.11, 0.12, 8), accent)
    elif figure.clothes == "blazer":
        _legs(canvas, figure, WHITE, (84, 56, 52), 6.9)
        _skirt(canvas, mix(accent, (90, 80, 100), 0.5), pose, 5.4, 1.35, WHITE)
        _torso(canvas, cloth, 3.95, 0.95)
        canvas.fill(poly((-0.4, 1.3, 1), (0.4, 1.3, 1), (0.0, 2.85, 1)), WHITE)
        _open_neck(canvas, figure, 1.62, 0.28)
        canvas.fill(
            poly((-0.07, 1.75, 1), (0.07, 1.75, 1), (0.13, 2.45, 1), (0, 2.72, 1), (-0.13, 2.45, 1)), accent, 0.8
        )
        canvas.fill(poly((-0.12, 1.58, 1), (0.12, 1.58, 1), (0.07, 1.78, 1), (-0.07, 1.78, 1)), accent, 0.8)
        _collar(canvas, WHITE, 0.46, 1.95, 1.6, 0.8)
        for side in (-1, 1):
            lapel = poly(
                (0.42, 1.32, 1),
                (0.72, 1.6, 1),
                (0.74, 1.95, 1),
                (0.58, 1.96, 1),
                (0.6, 2.1, 1),
                (0.0, 2.9, 1),
                (0.2, 2.3),
            )
            canvas.fill(moved(lapel, sx=side), mix(cloth, WHITE, 0.12))
        canvas.brush(poly((0, 2.9), (0.04, 3.4), (0.02, 3.95)), cloth, 1.0)
        for y in (3.1, 3.45):
            canvas.fill(ellipse(0.12, y, 0.05, 0.05, 8), (250, 214, 120), 0.6)
    elif figure.clothes == "hoodie":
        main = mix(accent, WHITE, 0.25)
        _legs(canvas, figure, (70, 74, 96), (240, 240, 246), 4.5)
        _torso(canvas, main, 4.6, 1.08)
        pocket = poly((-0.5, 3.3, 1), (0.5, 3.3, 1), (0.74, 4.1, 1), (-0.74, 4.1, 1))
        canvas.fill(pocket, mix(main, WHITE, 0.1), 0.8)
        canvas.fill(poly((-1.08, 4.38, 1), (1.08, 4.38, 1), (1.04, 4.66), (-1.04, 4.66)), shade(main, 0.5), 0.9)
        _open_neck(canvas, figure, 1.85)
        hood = poly((0.3, 1.16, 1), (0.62, 1.2), (0.84, 1.5), (0.62, 1.86), (0.0, 2.12, 1), (0.1, 1.82), (0.3, 1.5))
        for side in (-1, 1):
            canvas.fill(moved(hood, sx=side), main)
            canvas.tone(moved(poly((0.34, 1.3), (0.54, 1.32), (0.4, 1.66), (0.12, 1.94)), sx=side), shade(main))
            canvas.line(moved(poly((0.2, 1.98), (0.24, 2.3), (0.2, 2.7)), sx=side), WHITE, 1.3)
    elif figure.clothes == "summer dress":
        main = mix(accent, WHITE, 0.72)
        _legs(canvas, figure, WHITE, accent, 8.1)
        _skirt(canvas, main, pose, 6.1, 1.7, accent)
        _torso(canvas, main, 3.4, 0.7)
        canvas.fill(
            poly((-0.71, 3.2, 1), (0, 3.26), (0.71, 3.2, 1), (0.73, 3.48, 1), (0, 3.55), (-0.73, 3.48, 1)), accent, 0.9
        )
        _open_neck(canvas, figure, 1.7)
        _collar(canvas, WHITE, 0.66, 1.95, 1.72)
        for side in (-1, 1):
            canvas.fill(moved(poly((0, 1.8, 1), (0.2, 1.68), (0.34, 1.78), (0.3, 1.96)), sx=side), accent, 0.8)
        for y in (2.3, 2.65):
            canvas.fill(ellipse(0, y, 0.05, 0.05, 8), accent, 0.6)
    else:
        main = mix(cloth, WHITE, 0.35)
        _legs(canvas, figure, WHITE, (120, 70, 60), 7.6)
        robe = poly(
            (-0.74, 3.3, 1),
            (0.74, 3.3, 1),
            (1.05, 4.4),
            (1.0, 6.5),
            (0.9, 8.35, 1),
            (0, 8.45),
            (-0.9, 8.35, 1),
            (-1.0, 6.5),
            (-1.05, 4.4),
        )
        with canvas.shape(robe, main):
            canvas.tone(poly((0.5, 3.3), (0.62, 6), (0.5, 8.6), (1.3, 8.6), (1.3, 3.3)), shade(main))
            for x, y in ((-0.5, 4.6), (0.3, 5.3), (-0.35, 6.4), (0.4, 7.2), (-0.6, 7.7)):
                _flower(canvas, x, y, 0.2, mix(accent, WHITE, 0.5))
        canvas.brush(poly((0.12, 8.4), (0.2, 6.5), (-0.1, 4.2)), main, 1.0, taper="end")
        _torso(canvas, main, 3.4, 0.76)
        for x, y in ((-0.68, 2.3), (0.62, 2.55)):
            _flower(canvas, x, y, 0.17, mix(accent, WHITE, 0.5))
        _open_neck(canvas, figure, 2.1)
        for side in (-1, 1):  # the picture's right side lies over the left one
            band = poly((0.28, 1.2, 1), (0.52, 1.3, 1), (0.36, 1.8), (-0.22, 2.7, 1), (-0.42, 2.62, 1), (0.1, 1.9))
            canvas.fill(moved(band, sx=side), WHITE if side == -1 else mix(accent, WHITE, 0.6))
        obi = poly((-0.78, 2.62, 1), (0.78, 2.62, 1), (0.8, 3.5, 1), (-0.8, 3.5, 1))
        canvas.fill(obi, accent)
        canvas.tone(poly((0.45, 2.64, 1), (0.77, 2.64, 1), (0.79, 3.48, 1), (0.45, 3.48, 1)), shade(accent))
        canvas.fill(poly((-0.79, 2.98, 1), (0.79, 2.98, 1), (0.79, 3.14, 1), (-0.79, 3.14, 1)), WHITE, 0.8)
    if pose.wave:
        _draw_arm(canvas, figure, pose, -1, sleeve, reach, loose)


def _flower(canvas: Canvas, x: float, y: float, size: float, colour: Colour) -> None:
    angle = np.arange(10) * np.pi / 5
    radius = size * np.where(np.arange(10) % 2, 0.45, 1.0)
    canvas.fill(np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle), np.zeros(10)], 1), colour, 0.5)
