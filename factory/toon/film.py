"""Drawn films with known truth: the plan of shots, which is the edit list, and their drawings on twos and threes."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

from .scene import Drawing, draw
from .traits import BACKGROUNDS, CAMERAS, EXPRESSIONS, HAIR, Figure, Pose, Scene, View, caption, random_figure

# Raised when the same seed would give other pixels or bytes, so that films drawn before are drawn anew.
CODE = "toon-3"
ACTIONS = ("talk", "turn", "nod", "sway", "wave")
MOVES = ("still", "still", "zoom in", "zoom out", "pan left", "pan right", "tilt")
FADE_SECONDS = 1 / 3  # on each side of a fade through black
FLASH = (2.0, 1.7, 1.3)  # light of a flash's frames: 1 is the picture itself, 2 is white


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One shot of a film, from its first frame `start` to the frame after its last, `end`."""

    start: int
    end: int
    # How it follows the shot before it: "cut", or "fade" through black, half before `start` and half after.
    transition: str
    scene: Scene
    caption: str
    # Frames that each drawing is held: 2 or 3.
    hold: int
    # What the figures do, and what the camera does.
    action: str
    move: str
    # Chooses the phases of the movement.
    seed: int
    # Index of the earlier shot that this one shows again, frame for frame.
    repeats: int | None = None

    @property
    def dark(self) -> bool:
        """Whether the scene is lit dimly."""
        return self.scene.lighting == "dark"


@dataclass(frozen=True, kw_only=True)
class EditList:
    """A film: its shots in order, covering frames 0 to `frames` exactly once, and the truth about each of them."""

    seed: int
    fps: int
    # Width and height in pixels.
    size: tuple[int, int] = (640, 360)
    shots: tuple[Shot, ...] = field(default=())
    # First frame of each flash of light, which lasts as many frames as FLASH has; no cut is there.
    flashes: tuple[int, ...] = ()
    # Aspect ratio of the picture between black bars; none: it fills the frame.
    letterbox: float | None = None
    # Standard deviation of the film grain, in levels of 255.
    grain: float = 0.0

    @property
    def picture(self) -> tuple[int, int]:
        """Width and height of the drawn picture, without the letterbox's bars; the height is even."""
        width, height = self.size
        inner = height if self.letterbox is None else min(height, round(width / self.letterbox / 2) * 2)
        return width, inner

    @property
    def frames(self) -> int:
        """Number of frames of the whole film."""
        return self.shots[-1].end if self.shots else 0

    @property
    def fade_frames(self) -> int:
        """Frames that a fade darkens on each side of its boundary."""
        return round(FADE_SECONDS * self.fps)

    def to_json(self) -> str:
        """The truth as JSON: film facts, and one entry per shot with its scene, caption, transition and repeat."""
        shots = [
            asdict(shot) | {"index": i, "scene": shot.scene.attributes(), "dark": shot.dark}
            for i, shot in enumerate(self.shots)
        ]
        facts = {
            "code": CODE,
            "seed": self.seed,
            "fps": self.fps,
            "size": self.size,
            "frames": self.frames,
            "fade_frames": self.fade_frames,
            "flashes": [[first, first + len(FLASH)] for first in self.flashes],
            "letterbox": self.letterbox,
            "bar_height": (self.size[1] - self.picture[1]) // 2,
            "grain": self.grain,
            "shots": shots,
        }
        return json.dumps(facts, indent=1) + "\n"


def plan_clip(
    seed: int,
    *,
    shots: int = 12,
    fps: int = 24,
    size: tuple[int, int] = (640, 360),
    flashes: int = 0,
    letterbox: float | None = None,
    grain: float = 0.0,
) -> EditList:
    """A seed -> the plan of a film of `shots` shots, 1 to 2 s each, at `fps` frames per second.

    Every film has hard cuts, one or two fades through black, one shot shown twice, and one or two dark scenes; all
    other shots differ in who is seen, where and how near. `flashes` of light fall into the midst of shots; `letterbox`
    is the picture's aspect ratio between black bars, `grain` the film's noise in levels of 255.
    """
    if shots < 6:
        raise ValueError(f"A film needs at least 6 shots, not {shots}")
    if fps < 6:
        raise ValueError(f"A film needs at least 6 frames per second, not {fps}")
    if letterbox is not None and not size[0] / size[1] <= letterbox <= 10:
        raise ValueError(
            f"letterbox is the aspect ratio of a picture that is wider than the film's {size[0]} x {size[1]}, such as "
            f"2.39, not {letterbox}"
        )
    if min(flashes, grain) < 0:
        raise ValueError(f"flashes and grain are 0 or more, not {flashes} and {grain}")
    rng = random.Random(f"film/{seed}")
    scenes = _scenes(rng, shots - 1)
    again = rng.randrange(0, shots - 4)  # the shot shown twice, and where it comes back
    back = rng.randrange(again + 2, shots)
    order: list[tuple[int, int | None]] = [(i, None) for i in range(shots - 1)]
    order.insert(back, (again, again))
    free = [i for i in range(1, shots) if not {i - 1, i} & {again, back}]  # a fade would darken the repeated frames
    fades = set(rng.sample(free, min(len(free), 1 if shots < 10 else 2)))

    planned: list[Shot] = []
    for index, (which, repeats) in enumerate(order):
        start = planned[-1].end if planned else 0
        if repeats is not None:
            first = planned[repeats]
            transition = "cut"
            planned.append(
                replace(first, start=start, end=start + first.end - first.start, transition=transition, repeats=repeats)
            )
            continue
        near_fade = bool({index, index + 1} & fades)
        length = rng.randint(math.ceil(fps * (1.4 if near_fade else 1.0)), 2 * fps)
        pair = len(scenes[which].figures) == 2
        planned.append(
            Shot(
                start=start,
                end=start + length,
                transition="fade" if index in fades else "cut",
                scene=scenes[which],
                caption=caption(scenes[which], rng),
                hold=rng.choice((2, 2, 3)),
                action=rng.choice(ACTIONS[:2] if pair else ACTIONS),
                move=rng.choice(MOVES),
                seed=rng.randrange(1 << 30),
            )
        )
    free = [shot for i, shot in enumerate(planned) if not {i, i + 1} & fades and i != back and i != again]
    if flashes > len(free):
        raise ValueError(f"Of this film's {shots} shots, {len(free)} have room for a flash, not {flashes}")
    lit = random.Random(f"flashes/{seed}").sample(free, flashes)
    return EditList(
        seed=seed,
        fps=fps,
        size=size,
        shots=tuple(planned),
        flashes=tuple(sorted((shot.start + shot.end) // 2 for shot in lit)),
        letterbox=letterbox,
        grain=grain,
    )


def _scenes(rng: random.Random, count: int) -> list[Scene]:
    """Scenes of one film: a cast of five seen in changing places and framings, no place and framing twice."""
    hairs = rng.sample(HAIR, 5)
    cast = [
        random_figure(rng, hair=hair, skin="fair" if i < 3 else rng.choice(("fair", "tan", "brown")))
        for i, hair in enumerate(hairs)
    ]
    pairs = [(place, camera) for place in BACKGROUNDS for camera in CAMERAS]
    rng.shuffle(pairs)
    used: list[tuple[str, str]] = []
    while len(used) < count:  # places and framings alternate; only very long films run out and begin again
        options = [p for p in pairs if p not in used[-len(pairs) + 1 :]] or pairs
        last = used[-1] if used else ("", "")
        recent = {p for p, _ in used[-5:]}
        used.append(next((p for p in options if p[1] != last[1] and p[0] not in recent), options[0]))
    dark = set(rng.sample(range(count), 1 if count < 9 else 2))
    double = set(rng.sample(range(count), max(1, count // 6)))
    scenes = []
    for i, (place, camera) in enumerate(used):
        lead = cast[(i + i // len(cast)) % len(cast)]
        other = cast[(i + i // len(cast) + 2) % len(cast)]
        figures: tuple[Figure, ...] = (lead, other) if i in double else (lead,)
        scenes.append(
            Scene(
                figures=tuple(replace(figure, expression=rng.choice(EXPRESSIONS)) for figure in figures),
                background=place,
                camera=camera,
                lighting="dark" if i in dark else "day",
                place=rng.choice((-1, 1)) * rng.uniform(0.1, 1.0) * (0.4 if camera == "close-up" else 1.0),
                layout=rng.randrange(1 << 16),
            )
        )
    return scenes


def _held(shot: Shot, seconds: float, length: float) -> tuple[tuple[Pose, ...], View]:
    """Poses and view of a shot `seconds` after its start; `length` is the whole shot's, in seconds."""
    rng = random.Random(shot.seed)
    poses = []
    for i in range(len(shot.scene.figures)):
        facing = rng.uniform(-0.7, 0.7) if len(shot.scene.figures) == 1 else (0.55 if i == 0 else -0.55)
        phase, rate = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 0.9)
        blink_at = rng.uniform(0.15, max(0.2, length - 0.3))
        tilt = rng.uniform(-0.07, 0.07)
        swing = math.sin(2 * math.pi * rate * seconds + phase)
        blink = max(0.0, 1 - abs(seconds - blink_at - 0.1) / 0.13)
        yaw, pitch, mouth, wave = facing, 0.0, 0.0, 0.0
        if shot.action == "talk" and (len(poses) == 0 or len(shot.scene.figures) == 1):
            mouth = (0.0, 0.55, 1.0, 0.3, 0.8, 0.15)[int(seconds * 9 + phase) % 6]
        elif shot.action == "turn":
            share = min(1.0, max(0.0, (seconds - 0.2) / max(0.4, length - 0.6)))
            share = share * share * (3 - 2 * share)
            yaw = facing + (-1.4 if facing > 0 else 1.4) * share * (0.5 if len(shot.scene.figures) == 2 else 1.0)
            blink = max(blink, 1 - abs(share - 0.5) * 5)
        elif shot.action == "nod":
            pitch = 0.7 * math.sin(math.pi * min(1.0, seconds / 0.9)) * (1 if phase > 3 else -1)
        elif shot.action == "wave":
            wave = 0.75 + 0.25 * math.sin(2 * math.pi * 1.6 * seconds + phase)
        poses.append(
            Pose(
                yaw=max(-1.0, min(1.0, yaw + 0.05 * swing)),
                pitch=pitch,
                tilt=tilt + (0.07 if shot.action == "sway" else 0.015) * swing,
                sway=(0.9 if shot.action == "sway" else 0.4) * math.sin(2 * math.pi * rate * seconds + phase - 0.8),
                blink=min(1.0, blink),
                mouth=mouth,
                bob=0.03 * swing,
                wave=wave,
                gaze=0.5 * max(-1.0, min(1.0, yaw)),
            )
        )
    share = seconds / length
    speed = rng.uniform(0.6, 1.0)
    zoom, x, y = 1.0, 0.0, 0.0
    if shot.move == "zoom in":
        zoom = 1 + 0.14 * speed * share
    elif shot.move == "zoom out":
        zoom = 1.14 - 0.14 * speed * share
    elif shot.move.startswith("pan"):
        x = (0.5 - share) * 0.1 * speed * (1 if shot.move == "pan right" else -1)
    elif shot.move == "tilt":
        y = (share - 0.5) * 0.1 * speed
    return tuple(poses), View(zoom=zoom, x=x, y=y)


def drawings(film: EditList) -> Iterator[tuple[Drawing, int, tuple[float, ...]]]:
    """A film -> its drawings in order, each with its first frame and the light of every frame that it is held for.

    The light is 1, falls to 0 and back towards the boundary of a fade, and is above 1 in a flash; see `finished`.
    """
    fade = film.fade_frames
    flash = {first + i: level for first in film.flashes for i, level in enumerate(FLASH)}
    for index, shot in enumerate(film.shots):
        length = (shot.end - shot.start) / film.fps
        fades_out = index + 1 < len(film.shots) and film.shots[index + 1].transition == "fade"
        for frame in range(shot.start, shot.end, shot.hold):
            poses, view = _held(shot, (frame - shot.start) / film.fps, length)
            light = []
            for held in range(frame, min(frame + shot.hold, shot.end)):
                level = 1.0
                if shot.transition == "fade":
                    level = min(level, (held - shot.start) / fade)
                if fades_out:
                    level = min(level, (shot.end - 1 - held) / fade)
                light.append(flash.get(held, level))
            yield draw(shot.scene, film.picture, poses, view), frame, tuple(light)
