"""What can be drawn: the attributes of a figure, a scene and a pose, and the words a caption has for them."""

import random
from dataclasses import asdict, dataclass, replace

HAIR = ("black", "brown", "blonde", "red", "pink", "blue", "green", "silver")
HAIR_STYLES = ("short", "bob", "long", "ponytail", "twintails")
EYES = ("blue", "green", "amber", "red")
EXPRESSIONS = ("smiling", "neutral", "surprised", "sad", "angry")
ACCESSORIES = ("none", "glasses", "ribbon", "headphones", "cat ears")
CLOTHES = ("sailor uniform", "blazer", "hoodie", "summer dress", "kimono")
SKINS = ("fair", "tan", "brown")
FRINGES = ("straight", "swept", "parted")
BACKGROUNDS = ("sky", "night", "sunset", "forest", "classroom", "city", "beach", "blossoms")
CAMERAS = ("close-up", "bust", "half figure", "full figure")
LIGHTINGS = ("day", "dark")

# Every value of an attribute has its own words: no word stands for two values, so that a caption can be checked.
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "hair": {
        "black": ("black", "jet-black"),
        "brown": ("brown", "chestnut"),
        "blonde": ("blonde", "golden"),
        "red": ("red", "crimson"),
        "pink": ("pink", "rose-pink"),
        "blue": ("blue", "azure"),
        "green": ("green", "mint-green"),
        "silver": ("silver", "silvery white"),
    },
    "hair_style": {
        "short": ("short {} hair", "{} hair cut short"),
        "bob": ("a {} bob", "{} bobbed hair"),
        "long": ("long {} hair", "long flowing {} hair"),
        "ponytail": ("a {} ponytail", "{} hair in a ponytail"),
        "twintails": ("{} twintails", "{} hair in twintails"),
    },
    "eyes": {
        "blue": ("blue eyes", "sky-blue eyes"),
        "green": ("green eyes", "emerald eyes"),
        "amber": ("amber eyes", "honey-coloured eyes"),
        "red": ("red eyes", "ruby eyes"),
    },
    "expression": {
        "smiling": ("smiling", "cheerful"),
        "neutral": ("calm", "serene"),
        "surprised": ("surprised", "astonished"),
        "sad": ("sad", "tearful"),
        "angry": ("angry", "frowning"),
    },
    "accessory": {
        "none": ("",),
        "glasses": ("glasses", "spectacles"),
        "ribbon": ("a hair ribbon", "a bow in her hair"),
        "headphones": ("headphones", "a pair of headphones"),
        "cat ears": ("cat ears", "a cat-ear headband"),
    },
    "clothes": {
        "sailor uniform": ("a sailor uniform", "a sailor-collar school uniform"),
        "blazer": ("a blazer and tie", "a school blazer"),
        "hoodie": ("a hoodie", "a hooded sweatshirt"),
        "summer dress": ("a summer dress", "a light sundress"),
        "kimono": ("a kimono", "a yukata"),
    },
    "background": {
        "sky": ("under a blue sky", "in a meadow under white clouds"),
        "night": ("under a starry night sky", "on a moonlit night"),
        "sunset": ("at sunset", "in the evening glow over the sea"),
        "forest": ("in a forest", "among the trees"),
        "classroom": ("in a classroom", "in front of a blackboard"),
        "city": ("in the city", "on a street between tall buildings"),
        "beach": ("on a beach", "by the seaside"),
        "blossoms": ("under cherry blossoms", "among falling petals"),
    },
    "camera": {
        "close-up": ("close-up", "close-up portrait"),
        "bust": ("bust shot", "head and shoulders"),
        "half figure": ("half figure", "waist-up view"),
        "full figure": ("full figure", "full-body view"),
    },
    "lighting": {"day": ("",), "dark": ("dim light", "dark lighting")},
}


def _known(attribute: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise ValueError(f"{attribute} {value!r} is not known; it is one of: {', '.join(values)}")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One character. Each field is one of the module's values; `fringe`, `dye` and `skin` are never captioned."""

    hair: str = "brown"
    hair_style: str = "long"
    eyes: str = "blue"
    expression: str = "smiling"
    accessory: str = "none"
    clothes: str = "sailor uniform"
    skin: str = "fair"
    # Shape of the front hair.
    fringe: str = "straight"
    # Which of the colour sets clothes and ribbons take, 0 to 3.
    dye: int = 0

    def __post_init__(self) -> None:
        for attribute, values in _FIGURE.items():
            _known(attribute, getattr(self, attribute), values)


_FIGURE = {
    "hair": HAIR,
    "hair_style": HAIR_STYLES,
    "eyes": EYES,
    "expression": EXPRESSIONS,
    "accessory": ACCESSORIES,
    "clothes": CLOTHES,
    "skin": SKINS,
    "fringe": FRINGES,
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture without its pose: who, where, in what framing and light."""

    figures: tuple[Figure, ...] = (Figure(),)
    background: str = "sky"
    camera: str = "bust"
    lighting: str = "day"
    # Where the figures stand, -1 (left edge) to 1 (right edge) of the room that the frame leaves them.
    place: float = 0.0
    # Chooses the layout of the background: clouds, trees, houses.
    layout: int = 0

    def __post_init__(self) -> None:
        if len(self.figures) not in (1, 2):
            raise ValueError(f"A scene has one or two figures, not {len(self.figures)}")
        _known("background", self.background, BACKGROUNDS)
        _known("camera", self.camera, CAMERAS)
        _known("lighting", self.lighting, LIGHTINGS)

    def attributes(self) -> dict:
        """The scene as plain JSON values."""
        return asdict(self) | {"figures": [asdict(figure) for figure in self.figures]}


@dataclass(frozen=True, kw_only=True)
class Pose:
    """How one figure is held in one drawing. All zeros: facing the camera with open eyes."""

    # Head turned to the picture's right (positive) or left, -1 to 1.
    yaw: float = 0.0
    # Head down (positive) or up, -1 to 1.
    pitch: float = 0.0
    # Head tilted clockwise, radians, about -0.2 to 0.2.
    tilt: float = 0.0
    # Hair ends moved aside, -1 to 1.
    sway: float = 0.0
    # 0 open eyes, 1 closed.
    blink: float = 0.0
    # 0 mouth as its expression has it, 1 wide open in speech.
    mouth: float = 0.0
    # Whole figure raised by this many head units (half a face's height).
    bob: float = 0.0
    # Right arm: 0 hanging, 1 raised in a greeting.
    wave: float = 0.0
    # Pupils, -1 to 1.
    gaze: float = 0.0


@dataclass(frozen=True, kw_only=True)
class View:
    """Camera movement within a shot: zoom factor about the centre, and shift in picture widths and heights."""

    zoom: float = 1.0
    x: float = 0.0
    y: float = 0.0


def random_figure(rng: random.Random, **fixed) -> Figure:
    """A figure with every attribute chosen by `rng`, except those given."""
    chosen = {attribute: rng.choice(values) for attribute, values in _FIGURE.items()}
    chosen |= {"skin": rng.choices(SKINS, (5, 2, 1))[0], "dye": rng.randrange(4)}
    return Figure(**(chosen | fixed))


def random_scene(rng: random.Random, **fixed) -> Scene:
    """A scene with everything chosen by `rng` (an eighth dark, a sixth with two figures), except what is given."""
    first = random_figure(rng)
    figures = (first,)
    if rng.random() < 1 / 6:
        other = rng.choice([hair for hair in HAIR if hair != first.hair])
        figures = (first, random_figure(rng, hair=other))
    chosen = {
        "figures": figures,
        "background": rng.choice(BACKGROUNDS),
        "camera": rng.choice(CAMERAS),
        "lighting": "dark" if rng.random() < 1 / 8 else "day",
        "place": rng.uniform(-0.8, 0.8),
        "layout": rng.randrange(1 << 16),
    }
    return Scene(**(chosen | fixed))


def random_pose(rng: random.Random) -> Pose:
    """A pose within the natural range, eyes open; one arm is raised in one of four."""
    pose = Pose(
        yaw=rng.uniform(-0.8, 0.8),
        pitch=rng.uniform(-0.5, 0.5),
        tilt=rng.uniform(-0.1, 0.1),
        sway=rng.uniform(-0.7, 0.7),
        gaze=rng.uniform(-0.6, 0.6),
    )
    return replace(pose, wave=1.0) if rng.random() < 1 / 4 else pose


def _words(rng: random.Random, attribute: str, value: str) -> str:
    return rng.choice(WORDS[attribute][value])


def _looks(figure: Figure, rng: random.Random) -> str:
    hair = _words(rng, "hair_style", figure.hair_style).format(_words(rng, "hair", figure.hair))
    parts = [hair.replace("a azure", "an azure"), _words(rng, "eyes", figure.eyes)]
    return " and ".join(parts if rng.random() < 0.75 else parts[::-1])


def _worn(figure: Figure, camera: str, rng: random.Random) -> list[str]:
    worn = [_words(rng, "accessory", figure.accessory)] if figure.accessory != "none" else []
    if camera != "close-up":  # a close-up ends at the collar
        worn.append(_words(rng, "clothes", figure.clothes))
    rng.shuffle(worn)
    return worn


def _noun(figure: Figure, rng: random.Random) -> str:
    mood = _words(rng, "expression", figure.expression)
    return f"{'an' if mood[0] in 'aeiou' else 'a'} {mood} {rng.choice(('girl', 'young girl', 'anime girl'))}"


def caption(scene: Scene, rng: random.Random) -> str:
    """A scene in words -> one English sentence without a full stop; true to the scene, its wording chosen by `rng`."""
    where = _words(rng, "background", scene.background)
    framing = _words(rng, "camera", scene.camera)
    people = []
    for figure in scene.figures:
        worn = " and ".join(_worn(figure, scene.camera, rng))
        people.append(f"{_noun(figure, rng)} with {_looks(figure, rng)}" + (f", wearing {worn}" if worn else ""))
    who = " beside ".join(people)
    light = f" in {_words(rng, 'lighting', 'dark')}" if scene.lighting == "dark" else ""
    order = rng.randrange(4)
    if order == 0:
        return f"{framing} of {who}, {where}{light}"
    if order == 1:
        return f"{where}{light}, {who}, {framing}"
    if order == 2:
        return f"{who}, {where}{light}, {framing}"
    return f"{who} {where}{light}, {framing}" if "wearing" not in people[-1] else f"{framing}, {who}, {where}{light}"
