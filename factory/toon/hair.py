"""Draws hair: what hangs behind the body, and what lies over the face. Units and origin are the head's."""

import numpy as np

from .canvas import Canvas, Colour, ellipse, mix, moved, poly, shade
from .traits import Figure, Pose

HAIR_COLOURS: dict[str, Colour] = {
    "black": (66, 60, 84),
    "brown": (150, 98, 66),
    "blonde": (250, 218, 122),
    "red": (208, 62, 58),
    "pink": (252, 164, 194),
    "blue": (86, 132, 226),
    "green": (112, 194, 142),
    "silver": (214, 218, 234),
}
DYES: tuple[tuple[Colour, Colour], ...] = (  # cloth and its accent
    ((62, 78, 134), (222, 62, 72)),
    ((126, 54, 78), (246, 196, 84)),
    ((58, 116, 108), (250, 138, 96)),
    ((104, 88, 158), (112, 204, 216)),
)
WHITE: Colour = (250, 250, 252)

_CAP = poly(  # outer edge of the hair, from left temple over the crown to the right one
    *((-0.97, 0.28, 1), (-1.06, -0.1), (-1.05, -0.5), (-0.9, -0.9), (-0.55, -1.2), (-0.06, -1.31), (0.45, -1.24)),
    *((0.86, -0.95), (1.04, -0.5), (1.06, -0.1), (0.97, 0.28, 1)),
)
# Front hair, right to left: valleys (between locks) and the tips that hang between two of them.
_LOCKS = {
    "straight": (
        ((0.64, -0.3), (0.4, -0.42), (0.14, -0.4), (-0.14, -0.42), (-0.4, -0.42), (-0.65, -0.28)),
        ((0.56, -0.04), (0.27, -0.14), (0.0, 0.02), (-0.28, -0.14), (-0.57, -0.04)),
    ),
    "swept": (
        ((0.66, -0.22), (0.34, -0.44), (0.02, -0.5), (-0.34, -0.66), (-0.62, -0.34)),
        ((0.62, 0.06), (0.34, -0.06), (0.06, 0.0), (-0.62, 0.06)),
    ),
    "parted": (
        ((0.67, -0.16), (0.42, -0.46), (0.06, -0.86), (-0.1, -0.84), (-0.44, -0.46), (-0.68, -0.16)),
        ((0.66, 0.12), (0.4, -0.12), (-0.03, -0.14), (-0.44, -0.12), (-0.68, 0.12)),
    ),
}
_SIDE_LOCK = {"short": 0.62, "bob": 0.98, "long": 1.45, "ponytail": 0.92, "twintails": 1.1}


def turned(shape: np.ndarray, pose: Pose, depth: float = 1.0) -> np.ndarray:
    """A shape on the front of the head, moved as the head turns: most in the middle, nothing at the silhouette."""
    out = np.array(shape, np.float64)
    near = np.clip(1 - (out[:, 0] / 1.2) ** 2, 0, 1) * depth
    out[:, 0] += 0.27 * pose.yaw * near
    out[:, 1] += 0.13 * pose.pitch * near
    return out


def swayed(shape: np.ndarray, pose: Pose, top: float, reach: float) -> np.ndarray:
    """Hair below `top` moved aside by the sway, the more the lower it is."""
    out = np.array(shape, np.float64)
    drop = np.clip(out[:, 1] - top, 0, None)
    out[:, 0] += 0.16 * pose.sway * reach * drop**1.3
    return out


def back_hair(canvas: Canvas, figure: Figure, pose: Pose) -> None:
    """What lies behind neck and shoulders: the mass of long hair, a ponytail, twintails."""
    hair = HAIR_COLOURS[figure.hair]
    dark = shade(hair)
    style = figure.hair_style
    if style == "ponytail":
        tail = poly(
            *((0.5, -1.15), (0.95, -1.38), (1.5, -1.12), (1.8, -0.4), (1.78, 0.6), (1.55, 1.6), (1.2, 2.5, 1)),
            *((1.26, 1.75), (1.18, 1.2), (0.98, 1.75, 1), (1.06, 0.9), (1.2, 0.1), (1.1, -0.5), (0.7, -0.8)),
        )
        tail = swayed(tail, pose, -0.8, 1.3)
        with canvas.shape(tail, hair):
            canvas.tone(
                swayed(poly((1.05, -0.6), (1.38, 0.0), (1.3, 1.1), (1.0, 2.3), (0.8, 1.5), (0.9, 0)), pose, -0.8, 1.3),
                dark,
            )
            canvas.tone(poly((1.42, -0.75), (1.62, -0.35), (1.66, 0.1), (1.56, -0.3)), mix(hair, WHITE, 0.5))
        for x in (1.35, 1.55):
            canvas.brush(
                swayed(poly((x - 0.35, -1.0), (x, -0.5), (x + 0.08, 0.4), (x - 0.12, 1.5)), pose, -0.8, 1.3), hair, 0.7
            )
    elif style == "twintails":
        for side in (-1, 1):
            tail = poly(
                *((0.92, -0.72), (1.4, -0.86), (1.85, -0.45), (2.02, 0.4), (1.95, 1.4), (1.62, 2.5), (1.5, 3.0, 1)),
                *((1.46, 2.4), (1.34, 1.95), (1.12, 2.5, 1), (1.16, 1.6), (1.3, 0.7), (1.25, 0.0), (1.02, -0.42)),
            )
            tail = swayed(moved(tail, sx=side), pose, -0.5, 1.2)
            inner = moved(poly((1.0, -0.4), (1.44, 0.1), (1.56, 1.0), (1.36, 2.1), (1.0, 2.6), (1.1, 0.8)), sx=side)
            light = moved(poly((1.52, -0.42), (1.78, 0.0), (1.84, 0.36), (1.68, 0.06)), sx=side)
            with canvas.shape(tail, hair):
                canvas.tone(swayed(inner, pose, -0.5, 1.2), dark)
                canvas.tone(light, mix(hair, WHITE, 0.5))
            for x in (1.44, 1.66):
                strand = poly((x - 0.3, -0.55), (x, -0.1), (x + 0.12, 0.8), (x - 0.1, 1.9))
                canvas.brush(swayed(moved(strand, sx=side), pose, -0.5, 1.2), hair, 0.7)
    if style == "long":
        mass = poly(
            *((0, -1.2), (0.8, -0.95), (1.12, -0.2), (1.2, 0.8), (1.34, 1.9), (1.42, 2.9), (1.5, 3.75, 1)),
            *((1.2, 3.3), (1.02, 3.2), (0.9, 3.9, 1), (0.6, 3.35), (0.4, 3.3), (0.12, 3.95, 1), (-0.2, 3.35)),
            *((-0.42, 3.3), (-0.7, 3.9, 1), (-0.95, 3.25), (-1.1, 3.2), (-1.46, 3.8, 1)),
            *((-1.42, 2.9), (-1.34, 1.9), (-1.2, 0.8), (-1.12, -0.2), (-0.8, -0.95)),
        )
        mass = swayed(mass, pose, 0.2, 0.7)
    elif style == "bob":
        mass = poly(
            *((0, -1.2), (0.8, -0.95), (1.12, -0.2), (1.2, 0.5), (1.12, 1.0), (0.86, 1.24, 1), (0.5, 1.12), (0, 1.1)),
            *((-0.5, 1.12), (-0.86, 1.24, 1), (-1.12, 1.0), (-1.2, 0.5), (-1.12, -0.2), (-0.8, -0.95)),
        )
        mass = swayed(mass, pose, 0.2, 0.7)
    else:
        mass = poly(
            *((0, -1.2), (0.8, -0.95), (1.06, -0.2), (1.04, 0.4), (1.0, 0.95, 1), (0.78, 0.72), (0.62, 1.1, 1)),
            *((0.3, 0.85), (-0.3, 0.85), (-0.62, 1.1, 1), (-0.78, 0.72), (-1.0, 0.95, 1), (-1.04, 0.4)),
            *((-1.06, -0.2), (-0.8, -0.95)),
        )
    with canvas.shape(mass, dark):
        for side in (-1, 1) if style == "long" else ():
            lit = moved(poly((1.0, -0.6), (1.2, 0.8), (1.3, 2.6), (1.62, 3.9), (1.8, 1), (1.4, -0.6)), sx=side)
            canvas.tone(swayed(lit, pose, 0.2, 0.7), hair)
    if style == "long":
        for x in (-1.1, -0.7, 0.7, 1.1):
            strand = poly((x * 0.85, 1.2), (x * 0.97, 2.1), (x * 1.0, 2.8), (x * 0.98, 3.3))
            canvas.brush(swayed(strand, pose, 0.2, 0.7), hair, 0.7)


def front_outline(figure: Figure, pose: Pose) -> tuple[np.ndarray, list[np.ndarray]]:
    """Outline of the hair over the face, and the strands drawn on it."""
    valleys, tips = (np.array(points, np.float64) for points in _LOCKS[figure.fringe])
    low = _SIDE_LOCK[figure.hair_style]
    edge: list[tuple[float, ...]] = []
    sway = 0.1 * pose.sway
    right_lock = [(1.02, 0.28 + low * 0.3), (0.92 + sway * low, low, 1), (0.74 + sway * low * 0.4, low * 0.5)]
    edge += [*right_lock, (*valleys[0], 1)]
    for i, tip in enumerate(tips):
        start, end = valleys[i], valleys[i + 1]
        swing = tip + np.array((sway * 0.3, 0))
        edge.append((*(start + (swing - start) * (0.5, 0.62)), 0))
        edge.append((*swing, 1))
        edge.append((*(end + (swing - end) * (0.5, 0.6)), 0))
        edge.append((*end, 1))
    edge += [(-0.74 + sway * low * 0.4, low * 0.5), (-0.92 + sway * low, low, 1), (-1.02, 0.28 + low * 0.3)]
    below = turned(poly(*edge), pose, 0.75)
    crown = np.array((0.06, -1.16))
    strands = []
    for valley in valleys[1:-1]:
        start = turned(poly(valley), pose, 0.75)[0, :2]
        middle = start + (crown - start) * 0.5 + ((start[0] - crown[0]) * 0.22, 0)
        strands.append(poly(start, start + (middle - start) * 0.5, middle))
    cap = _CAP.copy()
    cap[[0, -1], 2] = 0
    return np.concatenate([cap, below]), strands


def front_hair(canvas: Canvas, figure: Figure, front: np.ndarray, strands: list[np.ndarray], pose: Pose) -> None:
    """Hair over the face, as `front_outline` gave it: shadow at the sides, a band of light, strands."""
    hair = HAIR_COLOURS[figure.hair]
    glint = mix(hair, WHITE, 0.3 if figure.hair == "black" else 0.55)
    with canvas.shape(front, hair):
        canvas.tone(poly((0.78, -1.2), (0.84, -0.7), (0.86, 0.0), (0.84, 1.6), (1.3, 1.6), (1.3, -1.2)), shade(hair))
        canvas.tone(poly((-0.98, -0.9), (-0.95, -0.2), (-0.88, 1.6), (-1.3, 1.6), (-1.3, -0.9)), shade(hair, 0.7))
        band = [(-0.78, -0.62), (-0.4, -0.82), (0.0, -0.88), (0.4, -0.83), (0.74, -0.64, 1)]
        jags = [(0.66 - 0.165 * i, (-0.55 if i % 2 else -0.7) - 0.13 * (1 - abs(i - 4.0) / 4), 1) for i in range(9)]
        canvas.tone(turned(poly(*band, *jags), pose, 0.5), glint)
        canvas.tone(turned(ellipse(-0.3, -1.02, 0.16, 0.025, 8), pose, 0.5), glint)
    for strand in strands:
        canvas.brush(strand, hair, 1.0, taper="end")
    for side in (-1, 1):
        canvas.brush(poly((0.86 * side, 0.5), (0.93 * side, 0.1), (0.92 * side, -0.4)), hair, 0.8, taper="end")
    canvas.brush(poly((0.06, -1.3), (0.03, -1.12), (0.1, -0.98)), hair, 0.8, taper="end")
    if figure.hair_style in ("short", "bob"):  # a stray lock on the crown
        canvas.fill(poly((0.0, -1.27, 1), (-0.04, -1.48), (-0.26, -1.6, 1), (0.02, -1.58), (0.12, -1.28, 1)), hair)
