"""Draws what lies behind the figures. Unit: the frame's height; x from its middle, y down from its top."""

import math
import random
from collections.abc import Callable

import numpy as np

from .canvas import Canvas, Colour, box, ellipse, mix, poly, shade


def _sky_colour(canvas: Canvas, y: float) -> Colour:
    """The colour that the canvas holds at a share `y` of its height, at its left edge."""
    row = min(len(canvas.cels) - 1, int(y * len(canvas.cels)))
    red, green, blue = canvas.cels[row, 0, :3].tolist()
    return red, green, blue


def _cloud(canvas: Canvas, x: float, y: float, size: float, colour: Colour, rng: random.Random) -> None:
    """Round puffs on a flat base, `size` to each side of x; sharp notches where two puffs meet."""
    puffs = rng.randint(4, 6)
    half = size / puffs
    outline: list[tuple[float, ...]] = [(x - size * 1.04, y - 0.02 * size), (x - size, y - size * 0.1, 1)]
    for i in range(puffs):
        middle = x - size + half * (2 * i + 1)
        rise = size * (0.1 + 0.42 * math.sin(math.pi * (i + 0.5) / puffs) * rng.uniform(0.6, 1))
        for angle in (2.6, 2.0, 1.57, 1.1, 0.55):
            outline.append((middle + 1.12 * half * math.cos(angle), y - rise - half * math.sin(angle)))
        following = size * (0.1 + 0.3 * math.sin(math.pi * (i + 1) / puffs))
        outline.append((middle + half, y - min(rise, following) - half * 0.3, 1))
    outline += [(x + size * 1.04, y - 0.02 * size), (x + size * 0.9, y), (x - size * 0.9, y)]
    cloud = poly(*outline)
    with canvas.shape(cloud, colour, 0.6):
        for i in range(puffs + 1):
            cx = x - size + 2 * half * i
            canvas.tone(ellipse(cx, y + size * 0.02, half * 1.3, size * 0.16, 10), mix(colour, (150, 180, 230), 0.35))


def _hills(
    canvas: Canvas, wide: float, y: float, height: float, colour: Colour, rng: random.Random, line: float = 0.6
) -> None:
    xs = np.linspace(-wide - 0.2, wide + 0.2, 9)
    ridge = [(x, y - height * rng.random()) for x in xs]
    canvas.fill(poly((xs[0], 1.4, 1), (xs[0], y, 1), *ridge, (xs[-1], y, 1), (xs[-1], 1.4, 1)), colour, line)


def _crown(x: float, y: float, rx: float, ry: float, rng: random.Random, bumps: int = 9) -> np.ndarray:
    """A tree's foliage: a ring of round bumps with sharp notches between them."""
    points = []
    for i in range(bumps):
        a = 2 * math.pi * i / bumps
        r = rng.uniform(0.9, 1.1)
        points.append((x + rx * r * math.cos(a), y + ry * r * math.sin(a), 0))
        b = a + math.pi / bumps
        points.append((x + rx * 0.84 * math.cos(b), y + ry * 0.84 * math.sin(b), 1))
    return poly(*points)


def _tree(
    canvas: Canvas, x: float, ground: float, height: float, leaf: Colour, bark: Colour, rng: random.Random
) -> None:
    w = height * 0.07
    canvas.fill(
        poly(
            (x - w, ground, 1),
            (x - w * 0.6, ground - height * 0.6, 1),
            (x + w * 0.6, ground - height * 0.6, 1),
            (x + w, ground, 1),
        ),
        bark,
        0.7,
    )
    crown = _crown(x, ground - height * 0.7, height * 0.32, height * 0.34, rng)
    with canvas.shape(crown, leaf, 0.7):
        canvas.tone(
            _crown(x + height * 0.07, ground - height * 0.58, height * 0.3, height * 0.26, rng, 7), shade(leaf, 0.6)
        )
        canvas.tone(
            _crown(x - height * 0.1, ground - height * 0.86, height * 0.14, height * 0.09, rng, 6),
            mix(leaf, (255, 255, 200), 0.3),
        )


def _grass(canvas: Canvas, wide: float, y: float, colour: Colour, rng: random.Random) -> None:
    for _ in range(14):
        x, base = rng.uniform(-wide, wide), rng.uniform(y, 1.0)
        for lean in (-0.012, 0.0, 0.012):
            canvas.brush(
                poly((x + lean, base), (x + lean * 1.8, base - 0.02), (x + lean * 3, base - 0.035)),
                colour,
                0.6,
                taper="end",
            )


def _sky(canvas: Canvas, wide: float, rng: random.Random) -> None:
    canvas.gradient((0, (84, 164, 244)), (0.7, (190, 228, 255)), (1, (220, 242, 255)))
    for _ in range(3):
        _cloud(canvas, rng.uniform(-wide, wide), rng.uniform(0.12, 0.5), rng.uniform(0.12, 0.3), (255, 255, 255), rng)
    _hills(canvas, wide, 0.8, 0.14, (142, 204, 176), rng)
    _hills(canvas, wide, 0.92, 0.1, (126, 204, 110), rng)
    _grass(canvas, wide, 0.94, (70, 150, 80), rng)


def _night(canvas: Canvas, wide: float, rng: random.Random) -> None:
    canvas.gradient((0, (16, 20, 66)), (0.6, (50, 54, 126)), (1, (116, 96, 160)))
    for _ in range(34):
        x, y, r = rng.uniform(-wide, wide), rng.uniform(0, 0.7), rng.choice((0.003, 0.004, 0.006))
        canvas.tone(ellipse(x, y, r, r, 6), (255, 252, 224), glow=True)
    x, y = rng.choice((-1, 1)) * rng.uniform(0.35, 0.8) * wide, rng.uniform(0.12, 0.28)
    canvas.tone(ellipse(x, y, 0.15, 0.15), mix(_sky_colour(canvas, y), (255, 244, 190), 0.18), glow=True)
    canvas.fill(ellipse(x, y, 0.1, 0.1), (255, 244, 190), 0.6, glow=True)
    for dx, dy, r in ((-0.03, -0.02, 0.022), (0.035, 0.03, 0.03), (0.02, -0.045, 0.014)):
        canvas.tone(ellipse(x + dx, y + dy, r, r, 8), (240, 222, 160), glow=True)
    _hills(canvas, wide, 0.82, 0.16, (44, 44, 96), rng)
    x = -wide - 0.1
    while x < wide + 0.1:
        w, h = rng.uniform(0.1, 0.2), rng.uniform(0.12, 0.3)
        canvas.fill(box(x, 1.02 - h, x + w, 1.3), (34, 32, 70), 0.6)
        for column in range(2):
            for row in range(int(h / 0.07)):
                if rng.random() < 0.5:
                    left, top = x + w * (0.2 + 0.4 * column), 1.05 - h + row * 0.07
                    canvas.fill(box(left, top, left + w * 0.2, top + 0.035), (255, 214, 120), 0.4, glow=True)
        x += w + rng.uniform(0, 0.04)


def _sunset(canvas: Canvas, wide: float, rng: random.Random) -> None:
    canvas.gradient(
        (0, (112, 84, 160)),
        (0.35, (240, 124, 110)),
        (0.68, (255, 206, 120)),
        (0.7, (240, 150, 110)),
        (1, (120, 74, 120)),
    )
    x = rng.uniform(-0.7, 0.7) * wide
    canvas.tone(ellipse(x, 0.55, 0.24, 0.24, 16), (255, 196, 120), glow=True)
    canvas.fill(ellipse(x, 0.56, 0.16, 0.16, 16), (255, 240, 184), 0.6, glow=True)
    for _ in range(3):
        _cloud(canvas, rng.uniform(-wide, wide), rng.uniform(0.1, 0.45), rng.uniform(0.1, 0.22), (255, 176, 150), rng)
    sea = mix(_sky_colour(canvas, 0.8), (120, 80, 130), 0.3)
    canvas.fill(box(-wide - 0.3, 0.69, wide + 0.3, 1.4), sea, 0.6, glow=True)
    for i in range(7):
        y, half = 0.72 + 0.04 * i, 0.16 - 0.012 * i + rng.uniform(0, 0.04)
        canvas.tone(ellipse(x + rng.uniform(-0.03, 0.03), y, half, 0.009, 8), (255, 226, 160), glow=True)
    for _ in range(10):
        px, py = rng.uniform(-wide, wide), rng.uniform(0.74, 1)
        canvas.brush(poly((px, py), (px + 0.04, py - 0.006), (px + 0.08, py)), (90, 50, 90), 0.5)


def _forest(canvas: Canvas, wide: float, rng: random.Random) -> None:
    canvas.gradient((0, (176, 224, 170)), (0.6, (222, 246, 196)), (1, (150, 206, 120)))
    for i in range(6):
        x = -wide + (i + rng.uniform(0.1, 0.9)) * wide / 3
        _tree(canvas, x, 0.84, rng.uniform(0.5, 0.7), (128, 190, 130), (150, 130, 110), rng)
    _hills(canvas, wide, 0.86, 0.05, (124, 186, 96), rng)
    for side in (-1, 1):
        for _ in range(2):
            _tree(
                canvas,
                side * rng.uniform(0.35, 1.0) * wide,
                rng.uniform(0.92, 1.0),
                rng.uniform(0.8, 1.1),
                (62, 140, 84),
                (116, 84, 66),
                rng,
            )
    _grass(canvas, wide, 0.9, (60, 120, 60), rng)


def _classroom(canvas: Canvas, wide: float, rng: random.Random) -> None:
    canvas.gradient((0, (250, 240, 222)), (0.76, (240, 224, 200)), (1, (224, 190, 150)))
    side = rng.choice((-1, 1))

    def wall(x0: float, y0: float, x1: float, y1: float, colour: Colour, line: float = 0.7, glow: bool = False) -> None:
        canvas.fill(box(x0 * side, y0, x1 * side, y1), colour, line, glow=glow)

    shift = rng.uniform(-0.15, 0.15)
    wall(-1.0 + shift, 0.12, 0.3 + shift, 0.62, (150, 110, 80))
    wall(-0.97 + shift, 0.15, 0.27 + shift, 0.59, (62, 108, 92))
    for i in range(3):
        y = 0.24 + 0.1 * i
        canvas.brush(
            poly(((-0.85 + shift) * side, y), ((-0.7 + shift) * side, y + 0.02), ((-0.5 + shift + 0.1 * i) * side, y)),
            (226, 240, 232),
            0.8,
        )
    wall(0.42 + shift, 0.06, 1.3 + shift, 0.66, (236, 236, 240))
    for left in (0.46, 0.9):
        wall(left + shift, 0.1, left + 0.38 + shift, 0.62, (158, 212, 250), glow=False)
        x = (left + 0.19 + shift) * side
        _cloud(canvas, x, 0.34, 0.12, (255, 255, 255), rng)
    wall(-3, 0.76, 3, 1.5, (222, 184, 142), 0.6)
    canvas.line(poly((-3, 0.72), (3, 0.72)), (180, 150, 120), 0.5)
    for i in range(4):
        x = (-0.9 + 0.62 * i + shift * 2) * 1.0
        canvas.fill(
            poly((x, 0.86, 1), (x + 0.34, 0.86, 1), (x + 0.38, 0.92, 1), (x - 0.04, 0.92, 1)), (206, 158, 108), 0.7
        )
        for dx in (0.0, 0.31):
            canvas.fill(box(x + dx, 0.92, x + dx + 0.03, 1.1), (120, 120, 130), 0.6)


def _city(canvas: Canvas, wide: float, rng: random.Random) -> None:
    canvas.gradient((0, (120, 190, 246)), (0.7, (214, 236, 252)), (1, (226, 226, 230)))
    _cloud(canvas, rng.uniform(-wide, wide) * 0.6, 0.22, 0.2, (255, 255, 255), rng)
    x = -wide - 0.2
    while x < wide + 0.2:  # the far row, pale
        w = rng.uniform(0.12, 0.24)
        canvas.fill(box(x, rng.uniform(0.3, 0.5), x + w, 1.0), (190, 206, 228), 0.5)
        x += w
    for side in (-1, 1):
        x = 0.3 + rng.uniform(0, 0.15)
        while x < wide + 0.2:
            w, top = rng.uniform(0.26, 0.4), rng.uniform(0.02, 0.32)
            colour = rng.choice(((232, 206, 180), (206, 190, 200), (180, 196, 206), (226, 222, 206)))
            canvas.fill(box(side * x, top, side * (x + w), 1.0), colour, 0.7)
            rows = int((0.8 - top) / 0.13)
            for row in range(rows):
                for column in range(3):
                    left, y = x + w * (0.1 + 0.3 * column), top + 0.05 + row * 0.13
                    canvas.fill(box(side * left, y, side * (left + w * 0.2), y + 0.075), (120, 160, 200), 0.5)
            x += w
    canvas.fill(
        poly((-wide - 0.3, 0.86, 1), (wide + 0.3, 0.86, 1), (wide + 0.3, 1.4, 1), (-wide - 0.3, 1.4, 1)),
        (150, 152, 164),
        0.7,
    )
    for i in range(-4, 5):
        canvas.fill(
            poly(
                (i * 0.4 - 0.1, 0.94, 1),
                (i * 0.4 + 0.08, 0.94, 1),
                (i * 0.42 + 0.1, 0.97, 1),
                (i * 0.42 - 0.12, 0.97, 1),
            ),
            (246, 246, 246),
            0.5,
        )


def _beach(canvas: Canvas, wide: float, rng: random.Random) -> None:
    canvas.gradient((0, (96, 190, 250)), (0.5, (206, 240, 255)), (1, (206, 240, 255)))
    for _ in range(2):
        _cloud(canvas, rng.uniform(-wide, wide), rng.uniform(0.22, 0.42), rng.uniform(0.16, 0.32), (255, 255, 255), rng)
    canvas.fill(box(-wide - 0.3, 0.5, wide + 0.3, 1.4), (56, 150, 214), 0.6)
    for _ in range(16):
        x, y = rng.uniform(-wide, wide), rng.uniform(0.54, 0.74)
        canvas.tone(ellipse(x, y, 0.05, 0.005, 6), (190, 232, 250))
    xs = np.linspace(-wide - 0.3, wide + 0.3, 8)
    shore = [(x, 0.78 + rng.uniform(-0.03, 0.03)) for x in xs]
    foam = [(x, y - 0.035) for x, y in shore]
    canvas.fill(poly((xs[0], 1.4, 1), *foam, (xs[-1], 1.4, 1)), (236, 250, 255), 0.5)
    canvas.fill(poly((xs[0], 1.4, 1), *shore, (xs[-1], 1.4, 1)), (250, 226, 176), 0.6)
    side = rng.choice((-1, 1))
    base = side * wide * 0.8
    trunk = poly(
        (base - 0.05, 1.05, 1),
        (base - 0.07, 0.6),
        (base - 0.12 * side - 0.02, 0.2, 1),
        (base - 0.12 * side + 0.02, 0.2, 1),
        (base - 0.01, 0.6),
        (base + 0.04, 1.05, 1),
    )
    canvas.fill(trunk, (166, 126, 88), 0.7)
    x, y = base - 0.12 * side, 0.2
    for angle in (-2.9, -2.3, -0.9, -0.25, 0.35, 2.75):
        dx, dy = math.cos(angle), math.sin(angle)
        canvas.fill(
            poly(
                (x, y, 1),
                (x + dx * 0.2, y + dy * 0.2 - 0.06),
                (x + dx * 0.4, y + dy * 0.3 + 0.06, 1),
                (x + dx * 0.2, y + dy * 0.16 + 0.02),
            ),
            (70, 164, 96),
            0.7,
        )


def _blossoms(canvas: Canvas, wide: float, rng: random.Random) -> None:
    canvas.gradient((0, (168, 214, 250)), (0.7, (240, 234, 250)), (1, (250, 226, 236)))
    _hills(canvas, wide, 0.82, 0.1, (176, 200, 190), rng)
    _hills(canvas, wide, 0.9, 0.05, (164, 206, 130), rng)
    for i in range(3):
        x = (-0.9 + 0.9 * i + rng.uniform(-0.25, 0.25)) * wide
        _tree(canvas, x, rng.uniform(0.9, 0.98), rng.uniform(0.75, 1.05), (255, 196, 216), (122, 88, 90), rng)
    for side in (-1, 1):
        for _ in range(3):
            canvas.fill(
                _crown(side * rng.uniform(0.4, 1.0) * wide, rng.uniform(-0.05, 0.1), 0.26, 0.16, rng),
                (255, 208, 224),
                0.7,
            )
    for _ in range(26):
        x, y, a = rng.uniform(-wide, wide), rng.uniform(0.1, 1), rng.uniform(0, 3)
        dx, dy = 0.016 * math.cos(a), 0.016 * math.sin(a)
        canvas.fill(
            poly((x - dx, y - dy, 1), (x - dy * 0.6, y + dx * 0.6), (x + dx, y + dy, 1), (x + dy * 0.6, y - dx * 0.6)),
            (255, 178, 204),
            0.4,
        )


# Each draws over the whole canvas: x from -wide to wide, y from 0 (top) to 1 (bottom).
DRAW: dict[str, Callable[[Canvas, float, random.Random], None]] = {
    "sky": _sky,
    "night": _night,
    "sunset": _sunset,
    "forest": _forest,
    "classroom": _classroom,
    "city": _city,
    "beach": _beach,
    "blossoms": _blossoms,
}
