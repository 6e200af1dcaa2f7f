"""A canvas of two layers, colour picture and line art: a filled shape hides the lines under it, as ink on cels does."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import cv2
import numpy as np

Colour = tuple[float, float, float]

_SHIFT = 4  # OpenCV draws in fixed point: 4 fractional bits are 1/16 px


def poly(*points: Sequence[float] | np.ndarray) -> np.ndarray:
    """Points (x, y) or (x, y, 1) -> float array (n, 3). The third column marks corners, which stay sharp."""
    return np.array([p if len(p) == 3 else (*p, 0) for p in points], np.float64)


def ellipse(x: float, y: float, rx: float, ry: float, points: int = 12) -> np.ndarray:
    """Centre and radii -> closed polygon (points, 3)."""
    angle = np.arange(points) * (2 * np.pi / points)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle), np.zeros(points)], 1)


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Two opposite corners -> rectangle (4, 3) of sharp corners."""
    return np.array([(x0, y0, 1), (x1, y0, 1), (x1, y1, 1), (x0, y1, 1)], np.float64)


def limb(joints: Sequence[tuple[float, float]] | np.ndarray, widths: tuple[float, ...]) -> np.ndarray:
    """Joints (n, 2) and the half width at each -> closed outline (2n, 3) around them, ends cut square."""
    joints = np.asarray(joints, np.float64)
    along = np.gradient(joints, axis=0)
    along /= np.hypot(along[:, 0], along[:, 1])[:, None]
    normal = np.stack([-along[:, 1], along[:, 0]], 1) * np.asarray(widths)[:, None]
    outline = np.concatenate([joints + normal, (joints - normal)[::-1]])
    corners = np.zeros((len(outline), 1))
    corners[[0, len(joints) - 1, len(joints), -1]] = 1
    return np.hstack([outline, corners])


def moved(shape: np.ndarray, dx: float = 0, dy: float = 0, sx: float = 1, sy: float = 1) -> np.ndarray:
    """A polygon scaled about the origin by (sx, sy), then shifted by (dx, dy)."""
    return shape * (sx, sy, 1) + (dx, dy, 0)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Colour `share` of the way from a to b; share in [0, 1]."""
    red, green, blue = (p + (q - p) * share for p, q in zip(a, b, strict=True))
    return red, green, blue


def shade(colour: Colour, depth: float = 1.0) -> Colour:
    """The cel's one shadow tone: darker and a little towards violet."""
    return mix(colour, (colour[0] * 0.68, colour[1] * 0.60, colour[2] * 0.74), depth)


def ink(colour: Colour) -> Colour:
    """Outline colour for a filled area: its own hue, always dark (at most 70 of 255)."""
    top = max(*colour, 1)
    red, green, blue = (18 + 46 * (part / top) ** 2 * min(1, top / 200) for part in colour)
    return red, green, blue


@lru_cache(maxsize=4096)
def _spline(corners: bytes, closed: bool, steps: int) -> np.ndarray:
    """Uniform Catmull-Rom as a matrix (curve points, control points); `corners` are the points' float64 marks."""
    corner = np.frombuffer(corners) > 0
    n = len(corner)
    index = np.arange(n if closed else n - 1)[:, None] + np.array([-1, 0, 1, 2])
    index = index % n if closed else np.clip(index, 0, n - 1)
    # A corner ends its curve: the tangent there looks only along its own side.
    index[:, 0] = np.where(corner[index[:, 1]], index[:, 1], index[:, 0])
    index[:, 3] = np.where(corner[index[:, 2]], index[:, 2], index[:, 3])
    t = np.arange(steps)[:, None] / steps
    cubic = np.array([[-1, 3, -3, 1], [2, -5, 4, -1], [-1, 0, 1, 0], [0, 2, 0, 0]]) / 2
    weights = np.hstack([t**3, t**2, t, np.ones_like(t)]) @ cubic
    matrix = np.zeros((len(index) * steps + (not closed), n))
    for segment, around in enumerate(index):
        for k in range(4):
            matrix[segment * steps : (segment + 1) * steps, around[k]] += weights[:, k]
    if not closed:
        matrix[-1, -1] = 1
    return np.eye(n) if corner.all() else matrix


def _fixed(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels * (1 << _SHIFT)).astype(np.int32)


@lru_cache(maxsize=256)
def _taper(n: int, taper: str) -> np.ndarray:
    t = np.linspace(0, 1, n)
    return np.abs(np.sin(np.pi * t)) ** 0.7 if taper == "both" else (1 - t) ** 0.7


class Canvas:
    """Colour and lines as the four channels of one array, drawn supersampled, with one affine placement at a time.

    `cels` is uint8 (H * factor, W * factor, 4): red, green, blue, and the line layer (0 ink, 255 paper). A paint covers
    what lies under it in all four, an ink darkens all four: so both layers agree to the pixel.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        short = min(size)
        self.factor = 4 if short <= 128 else 3 if short <= 256 else 2
        self.cels = np.empty((size[1] * self.factor, size[0] * self.factor, 4), np.uint8)
        self.steps = 5 if short < 500 else 8 if short < 1100 else 14
        self.line_px = max(1.0, 0.0042 * short * self.factor)
        self.tint: Colour = (1, 1, 1)  # light that falls on every colour not drawn with glow
        self._linear, self._shift = np.eye(2), np.zeros(2)
        self._offset = np.zeros(2)

    def place(self, scale: float, x: float, y: float, angle: float = 0.0, about: tuple[float, float] = (0, 0)) -> None:
        """Unit -> `scale` picture pixels, origin -> (x, y), after a turn by `angle` radians about a point."""
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]])
        pivot = np.asarray(about)
        self._linear = turn.T * (scale * self.factor)
        self._shift = (np.array([x, y]) + (pivot - turn @ pivot) * scale) * self.factor - 0.5

    def _pixels(self, shape: np.ndarray, closed: bool) -> np.ndarray:
        """Control points (n, 3) -> the curve through them in canvas pixels (m, 2)."""
        points = shape[:, :2] @ self._linear + (self._shift - self._offset)
        return _spline(shape[:, 2].tobytes(), closed, self.steps) @ points

    def shows(self, y: float) -> bool:
        """Whether any of what lies below y, in the units placed now, is within the canvas."""
        return bool(y * self._linear[1, 1] + self._shift[1] < self.cels.shape[0])

    def _lit(self, colour: Colour, lines: int, glow: bool = False) -> tuple[float, ...]:
        if glow:
            return (*colour, lines)
        red, green, blue = self.tint
        return (colour[0] * red, colour[1] * green, colour[2] * blue, lines)

    def _stroke(self, fixed: np.ndarray, closed: bool, line: float, colour: Colour) -> None:
        thickness = max(1, round(line * self.line_px))
        cv2.polylines(self.cels, [fixed], closed, self._lit(ink(colour), 0), thickness, cv2.LINE_AA, _SHIFT)

    def fill(self, shape: np.ndarray, colour: Colour, line: float = 1.0, *, glow: bool = False) -> None:
        """Paint a closed shape and ink its outline; `line` is a multiple of the line width, 0 for none."""
        fixed = _fixed(self._pixels(shape, True))
        cv2.fillPoly(self.cels, [fixed], self._lit(colour, 255, glow), cv2.LINE_AA, _SHIFT)
        if line:
            self._stroke(fixed, True, line, colour)

    def tone(self, shape: np.ndarray, colour: Colour, *, glow: bool = False) -> None:
        """Paint a closed shape without an outline: shadow, light, blush."""
        self.fill(shape, colour, 0, glow=glow)

    def line(self, shape: np.ndarray, colour: Colour, line: float = 1.0, *, closed: bool = False) -> None:
        """Ink an even line, in the outline colour that belongs to `colour`."""
        self._stroke(_fixed(self._pixels(shape, closed)), closed, line, colour)

    def brush(self, shape: np.ndarray, colour: Colour, line: float = 1.0, *, taper: str = "both") -> None:
        """Ink a tapered line; taper is "both" ends, or "end": full at its start, a point at its end."""
        points = self._pixels(shape, False)
        along = np.empty_like(points)
        along[1:-1] = points[2:] - points[:-2]
        along[0], along[-1] = points[1] - points[0], points[-1] - points[-2]
        length = np.sqrt((along * along).sum(1)) + 1e-6
        widths = _taper(len(points), taper) * (max(0.5, line * self.line_px * 0.6) / length)
        half = along[:, ::-1] * (-1, 1) * widths[:, None]
        fixed = _fixed(np.concatenate([points + half, (points - half)[::-1]]))
        cv2.fillPoly(self.cels, [fixed], self._lit(ink(colour), 0), cv2.LINE_AA, _SHIFT)

    @contextmanager
    def shape(self, shape: np.ndarray, colour: Colour, line: float = 1.0) -> Iterator[None]:
        """Paint a closed shape; what the block draws stays inside it; its outline is inked last."""
        pixels = self._pixels(shape, True)
        cels, offset = self.cels, self._offset
        height, width = cels.shape[:2]
        fixed = _fixed(pixels)
        cv2.fillPoly(cels, [fixed], self._lit(colour, 255), cv2.LINE_AA, _SHIFT)
        low = np.clip(np.floor(pixels.min(0)).astype(int) - 1, 0, (width - 1, height - 1))
        high = np.clip(np.ceil(pixels.max(0)).astype(int) + 2, low + 1, (width, height))
        self.cels, self._offset = cels[low[1] : high[1], low[0] : high[0]], offset + low
        before = self.cels.copy()
        outside = np.full(before.shape[:2], 255, np.uint8)
        cv2.fillPoly(outside, [_fixed(pixels - low)], 0, cv2.LINE_8, _SHIFT)
        try:
            yield
        finally:
            cv2.copyTo(before, outside, self.cels)
            self.cels, self._offset = cels, offset
        if line:
            self._stroke(fixed, True, line, colour)

    def gradient(self, *stops: tuple[float, Colour]) -> None:
        """Cover the canvas with a vertical gradient; stops are (share of the height, colour)."""
        at = np.linspace(0, 1, len(self.cels))
        lit = [(share, self._lit(colour, 255)) for share, colour in stops]
        column = [np.interp(at, [share for share, _ in lit], [colour[i] for _, colour in lit]) for i in range(4)]
        self.cels.view(np.uint32)[:] = np.stack(column, 1).round().astype(np.uint8).view(np.uint32)[:, None]

    def reduced(self) -> tuple[np.ndarray, np.ndarray]:
        """The finished layers at picture size: RGB (H, W, 3) and lines (H, W), uint8."""
        small = cv2.resize(self.cels, self.size, interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(small, cv2.COLOR_RGBA2RGB), cv2.extractChannel(small, 3)
