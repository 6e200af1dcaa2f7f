"""Near-duplicates: pairs of pictures whose truth is known, and how well the selection tells them apart.

`make bench ARGS=duplicates` prints the tables of docs/selection.md.

The truth of a pair is its changed area: the share of the picture in which the clean drawings differ by more than 24
levels and not by a shift of one pixel. At most SAME: the same picture, however it was encoded; at least OTHER: another
picture. Between them either answer is right, and the pair is left out.
"""

from __future__ import annotations

import io
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import av
import cv2
import numpy as np

from factory.picture import decode_image, encode_jpeg
from factory.scores import scores
from factory.selection import SelectionConfig
from factory.signature import changed_share
from factory.toon import Pose, Scene, draw, random_figure, random_pose, random_scene
from factory.toon.traits import BACKGROUNDS, CLOTHES, EXPRESSIONS, HAIR
from tests.selecting import select

SIZE = (640, 360)
SAME, OTHER = 0.002, 0.0035
TUNED_ON, SCORED_ON = range(40), range(40, 100)
ALL_ELSE_OFF = {name: None for name in SelectionConfig.__dataclass_fields__ if not name.startswith("duplicate_")}


@dataclass(frozen=True)
class Pair:
    """Two pictures (RGB uint8) as a dataset would hold them, what was done, and whether they are the same."""

    kind: str
    first: np.ndarray
    second: np.ndarray
    same: bool


def pairs(seed: int) -> Iterator[Pair]:
    """Yield the pairs of one random scene: first the same drawing treated otherwise, then other drawings."""
    rng = random.Random(f"duplicates/{seed}")
    scene, pose = random_scene(rng), random_pose(rng)
    clean = draw(scene, SIZE, pose).image
    for kind, treat in TREATMENTS.items():
        yield Pair(kind, _jpeg(clean, rng), treat(clean, rng), True)
    figure = scene.figures[0]
    elsewhere = replace(scene, background=_other(rng, BACKGROUNDS, scene.background))
    others = {
        "mouth": (scene, replace(pose, mouth=rng.choice((0.3, 0.55, 1.0)))),
        "blink": (scene, replace(pose, blink=1.0)),
        "other expression": (_with_first(scene, expression=_other(rng, EXPRESSIONS, figure.expression)), pose),
        "other hair colour": (_with_first(scene, hair=_other(rng, HAIR, figure.hair)), pose),
        "other clothes": (_with_first(scene, clothes=_other(rng, CLOTHES, figure.clothes)), pose),
        "other figure": (replace(scene, figures=(random_figure(rng), *scene.figures[1:])), pose),
        "other pose": (scene, random_pose(rng)),
        "other background": (elsewhere, pose),
    }
    for kind, drawing in others.items():
        picture = draw(drawing[0], SIZE, drawing[1]).image
        changed = changed_area(clean, picture)
        if changed <= SAME or changed >= OTHER:
            same = changed <= SAME
            treat = rng.choice(list(TREATMENTS.values()))
            yield Pair(f"{kind}, {'held' if same else 'changed'}", _jpeg(clean, rng), treat(picture, rng), same)
    backdrop = _painted(rng)
    one = _composite(scene, pose, backdrop)
    two = _composite(replace(scene, figures=(random_figure(rng),)), pose, backdrop)
    for kind, picture, same in (("composited", one, True), ("composited, other figure", two, False)):
        yield Pair(kind, _jpeg(one, rng), rng.choice(list(TREATMENTS.values()))(picture, rng), same)


def changed_area(first: np.ndarray, second: np.ndarray) -> float:
    """Return the share of pixels (0 to 1) of `second` that differ by over 24 levels from all 3x3 around in `first`."""
    square = np.ones((3, 3), np.uint8)
    above, below = cv2.subtract(second, cv2.dilate(first, square)), cv2.subtract(cv2.erode(first, square), second)
    return float((cv2.max(above, below).max(2) > 24).mean())


def _with_first(scene: Scene, **changes: str) -> Scene:
    return replace(scene, figures=(replace(scene.figures[0], **changes), *scene.figures[1:]))


def _other(rng: random.Random, values: tuple[str, ...], present: str) -> str:
    return rng.choice([value for value in values if value != present])


def _composite(scene: Scene, pose: Pose, backdrop: np.ndarray) -> np.ndarray:
    """The scene's figures, cut out where drawings before two backgrounds agree, laid over `backdrop`."""
    first, second = (draw(replace(scene, background=name), SIZE, pose).image for name in ("sky", "classroom"))
    figure = cv2.morphologyEx((cv2.absdiff(first, second).max(2) < 8).astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5)))
    return np.where(figure[..., None] > 0, first, backdrop)


def _painted(rng: random.Random) -> np.ndarray:
    """A soft picture without lines: coloured noise of several sizes."""
    noise = np.random.default_rng(rng.randrange(1 << 30))
    total = np.zeros((SIZE[1], SIZE[0], 3), np.float32)
    for cells in (2, 4, 8, 16, 64):
        octave = noise.normal(0, 1 / cells**0.5, (cells, cells, 3)).astype(np.float32)
        total += cv2.resize(octave, SIZE, interpolation=cv2.INTER_CUBIC)
    return (128 + 60 * total).clip(0, 255).astype(np.uint8)


def _jpeg(image: np.ndarray, rng: random.Random) -> np.ndarray:
    return decode_image(encode_jpeg(image, rng.randint(30, 90)))


def _h264(image: np.ndarray, rng: random.Random) -> np.ndarray:
    with io.BytesIO() as file:
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=24, options={"crf": str(rng.randint(24, 34))})
            stream.height, stream.width = image.shape[:2]
            stream.pix_fmt = "yuv420p"
            stream.thread_count = 1
            for packet in (*stream.encode(av.VideoFrame.from_ndarray(image)), *stream.encode()):
                container.mux(packet)
        file.seek(0)
        with av.open(file) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24")


def _scaled(image: np.ndarray, rng: random.Random) -> np.ndarray:
    width = 16 * rng.randint(24, 80)
    way = cv2.INTER_AREA if width < SIZE[0] else cv2.INTER_CUBIC
    return _jpeg(cv2.resize(image, (width, width * 9 // 16), interpolation=way), rng)


def _brightened(image: np.ndarray, rng: random.Random) -> np.ndarray:
    return _jpeg(cv2.convertScaleAbs(image, alpha=rng.uniform(0.92, 1.08), beta=rng.uniform(0, 6)), rng)


def _grain(image: np.ndarray, rng: random.Random) -> np.ndarray:
    noise = np.random.default_rng(rng.randrange(1 << 30)).normal(0, rng.uniform(3, 8), image.shape[:2])
    return _jpeg((image + noise[..., None]).clip(0, 255).astype(np.uint8), rng)


def _shifted(image: np.ndarray, rng: random.Random) -> np.ndarray:
    x, y = rng.choice(((0, 1), (1, 0), (1, 1), (-1, 1)))
    moved = cv2.warpAffine(image, np.array([[1, 0, x], [0, 1, y]], np.float32), SIZE, borderMode=cv2.BORDER_REPLICATE)
    return _jpeg(moved, rng)


def _everything(image: np.ndarray, rng: random.Random) -> np.ndarray:
    return _scaled(_shifted(_grain(_brightened(image, rng), rng), rng), rng)


TREATMENTS: dict[str, Callable[[np.ndarray, random.Random], np.ndarray]] = {
    "JPEG": _jpeg,
    "H.264": _h264,
    "scaled": _scaled,
    "brightened": _brightened,
    "grain": _grain,
    "shifted": _shifted,
    "all of these": _everything,
}


@dataclass(frozen=True)
class Measured:
    """What the methods see of a pair: differing bits, changed share of cells, cosine of the colour layouts."""

    kind: str
    same: bool
    bits: int
    changed: float
    cosine: float
    found: bool  # what select() decided with its defaults


def measured(seeds: Iterable[int]) -> list[Measured]:
    """Return all pairs of the seeds, measured."""
    found = []
    for seed in seeds:
        for pair in pairs(seed):
            one, two = (_row(name, image) for name, image in (("a", pair.first), ("b", pair.second)))
            decisions = select([one, two], SelectionConfig(**ALL_ELSE_OFF))
            found.append(
                Measured(
                    kind=pair.kind,
                    same=pair.same,
                    bits=((one["phash"] ^ two["phash"]) & (2**64 - 1)).bit_count(),
                    changed=float(changed_share(one["signature"], [two["signature"]])[0]),
                    cosine=float(np.dot(one["embedding"], two["embedding"])),
                    found=any(decision["reason"] == "duplicate" for decision in decisions.values()),
                )
            )
    return found


def _row(name: str, image: np.ndarray) -> dict:
    height, width = image.shape[:2]
    return {"frame_id": name, "status": None, "width": width, "height": height, **scores(image)}


def precision_recall(pairs: list[Measured], found: Callable[[Measured], bool]) -> tuple[float, float]:
    """Return precision and recall of the pairs that `found` calls the same."""
    called = [pair for pair in pairs if found(pair)]
    right = sum(pair.same for pair in called)
    return right / max(len(called), 1), right / sum(pair.same for pair in pairs)


def duplicates() -> Iterator[str]:
    """Tune every method on the same seeds, score it once on the others; yield the lines of the tables."""
    cv2.setNumThreads(1)
    tuning, scoring = measured(TUNED_ON), measured(SCORED_ON)
    methods: dict[str, list[Callable[[Measured], bool]]] = {
        "perceptual hash alone": [lambda p, b=b: p.bits <= b for b in range(21)],
        "colour layout alone": [lambda p, c=c: p.cosine >= c for c in 1 - np.geomspace(1e-6, 1e-1, 51)],
        "hash, then colour layout": [
            lambda p, b=b, c=c: p.bits <= b and p.cosine >= c
            for b in range(0, 21, 2)
            for c in 1 - np.geomspace(1e-6, 1e-1, 51)
        ],
        "hash, then signature": [
            lambda p, b=b, c=c: p.bits <= b and p.changed <= c / 1024 for b in range(0, 21, 2) for c in range(17)
        ],
    }
    yield "| method, tuned | precision | recall |"
    yield "|---|---|---|"
    for name, variants in methods.items():
        best = max(variants, key=lambda found: min(precision_recall(tuning, found)))
        yield "| {} | {:.3f} | {:.3f} |".format(name, *precision_recall(scoring, best))
    yield "| selection, defaults | {:.3f} | {:.3f} |".format(*precision_recall(scoring, lambda p: p.found))
    yield ""
    yield "| pair | truth | pairs | called the same |"
    yield "|---|---|---|---|"
    kinds: dict[tuple[bool, str], list[bool]] = defaultdict(list)
    for pair in scoring:
        kinds[not pair.same, pair.kind].append(pair.found)
    for (other, kind), calls in sorted(kinds.items()):
        yield f"| {kind} | {'other' if other else 'same'} | {len(calls)} | {sum(calls)} |"
