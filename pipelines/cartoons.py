"""Cartoon heads drawn from a seed: the built-in example data.

Geometry is in unit coordinates: x runs right and y runs down, both from 0 to 1 over the picture, so
that every resolution shows the same picture. Colours are RGB triples of 0 to 255.
"""

import io
import json
import math
import multiprocessing
import random
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import NamedTuple

from PIL import Image, ImageDraw

from pipelines import storage
from pipelines.config import DrawConfig, Outcome, identity, what
from pipelines.progress import Progress

VERSION = 1

Colour = tuple[int, int, int]
Point = tuple[float, float]

SMALLEST_RESOLUTION = 8
DRAWING_SIDE = 256
EDGE = 0.02
STROKE = 0.04

PAINTS: dict[str, Colour] = {
    "ink": (38, 32, 54),
    "white": (255, 255, 255),
    "cream": (255, 236, 208),
    "pink": (255, 120, 150),
    "red": (222, 44, 64),
    "throat": (150, 24, 48),
    "gold": (255, 200, 40),
    "amber": (255, 150, 30),
    "screen": (30, 40, 70),
    "glow": (130, 245, 255),
}
BACKGROUNDS: dict[str, Colour] = {
    "blue": (105, 190, 250),
    "yellow": (255, 226, 105),
    "pink": (255, 170, 200),
    "green": (150, 222, 140),
    "purple": (190, 160, 245),
    "orange": (255, 178, 100),
    "white": (246, 246, 252),
}
HAIR: dict[str, Colour] = {
    "black": (48, 42, 52),
    "brown": (120, 70, 38),
    "blond": (250, 208, 84),
    "red": (214, 84, 36),
    "purple": (132, 66, 190),
}
HEADS: dict[str, Point] = {
    "round": (1.0, 1.0),
    "square": (1.0, 1.0),
    "wide": (1.13, 0.87),
    "tall": (0.87, 1.08),
}
MOODS: dict[str, str] = {"smile": "smiling", "frown": "frowning", "open": "open-mouthed"}


class Kind(NamedTuple):
    """What one character is made of.

    `y` and `axes` are the head's middle and half-axes. `eye` is the distance from the middle, the height and
    the radius, `mouth` the height, the half-width and the depth; heights are fractions of the half-axis.
    `face` and `muzzle` name the paint under the eyes and under the mouth.
    """

    colours: dict[str, Colour]
    y: float
    axes: Point
    eye: tuple[float, float, float]
    mouth: tuple[float, float, float]
    crown: float = -0.95
    pupil: float = 0.66
    eye_power: float = 2.0
    sclera: str = "white"
    face: str = "main"
    muzzle: str = "main"
    heads: tuple[str, ...] = ("round", "wide", "tall")
    eyes: tuple[str, ...] = ("round", "sleepy", "wink")
    accessories: tuple[str, ...] = ("glasses", "hat", "crown", "bow tie")


KINDS: dict[str, Kind] = {
    "person": Kind(
        {"light": (255, 220, 190), "tan": (236, 182, 134), "brown": (178, 116, 74), "dark": (112, 72, 52)},
        0.57,
        (0.32, 0.35),
        (0.14, 0.02, 0.088),
        (0.54, 0.13, 0.08),
        crown=-0.9,
    ),
    "cat": Kind(
        {
            "orange": (248, 146, 44),
            "grey": (148, 154, 172),
            "black": (66, 62, 80),
            "white": (252, 249, 244),
            "brown": (158, 100, 62),
        },
        0.6,
        (0.37, 0.31),
        (0.17, -0.16, 0.095),
        (0.5, 0.1, 0.06),
        muzzle="cream",
    ),
    "bear": Kind(
        {
            "brown": (150, 92, 52),
            "golden": (228, 168, 76),
            "white": (250, 248, 246),
            "black": (64, 58, 66),
            "grey": (140, 142, 156),
        },
        0.56,
        (0.37, 0.35),
        (0.165, -0.26, 0.082),
        (0.62, 0.1, 0.06),
        muzzle="cream",
    ),
    "robot": Kind(
        {
            "silver": (190, 200, 214),
            "blue": (64, 120, 226),
            "red": (228, 70, 66),
            "yellow": (252, 204, 50),
            "teal": (38, 172, 166),
            "purple": (150, 86, 210),
        },
        0.6,
        (0.34, 0.31),
        (0.145, -0.2, 0.088),
        (0.42, 0.14, 0.08),
        pupil=0.42,
        eye_power=5.0,
        sclera="glow",
        face="screen",
        muzzle="screen",
        heads=("square", "wide", "tall"),
        accessories=("glasses", "bow tie"),
    ),
    "frog": Kind(
        {
            "green": (84, 184, 66),
            "lime": (172, 216, 50),
            "teal": (30, 164, 140),
            "blue": (60, 122, 226),
            "orange": (250, 130, 40),
        },
        0.6,
        (0.39, 0.28),
        (0.23, -0.9, 0.11),
        (0.34, 0.2, 0.1),
        accessories=("glasses", "bow tie"),
    ),
    "rabbit": Kind(
        {
            "white": (252, 250, 250),
            "grey": (160, 164, 180),
            "brown": (164, 112, 76),
            "pink": (252, 150, 184),
            "beige": (236, 204, 158),
        },
        0.66,
        (0.33, 0.275),
        (0.16, -0.16, 0.088),
        (0.44, 0.13, 0.07),
        crown=-0.9,
    ),
    "penguin": Kind(
        {
            "black": (50, 52, 66),
            "navy": (38, 62, 132),
            "grey": (106, 118, 142),
            "purple": (100, 66, 160),
            "teal": (20, 112, 124),
        },
        0.52,
        (0.33, 0.37),
        (0.125, -0.22, 0.085),
        (0.48, 0.12, 0.07),
        crown=-0.88,
        face="white",
        muzzle="white",
    ),
    "monster": Kind(
        {
            "purple": (156, 84, 216),
            "green": (66, 190, 96),
            "pink": (242, 92, 164),
            "orange": (252, 132, 48),
            "blue": (58, 132, 236),
        },
        0.58,
        (0.34, 0.33),
        (0.0, -0.2, 0.16),
        (0.5, 0.17, 0.11),
        eyes=("round", "sleepy", "closed"),
        accessories=("monocle", "hat", "crown", "bow tie"),
    ),
}
CHARACTERS: tuple[str, ...] = tuple(KINDS)


@dataclass(frozen=True)
class Cartoon:
    """What one picture shows: named attributes, and a small continuous variation.

    `colour` is the skin of a person; `hair` and `hair_style` are empty for every other character.
    `dx` and `dy` are in picture widths, `scale` and `tint` (brightness) are factors, `tilt` is in degrees.
    """

    character: str
    colour: str
    head: str
    eyes: str
    mouth: str
    accessory: str
    background: str
    hair: str = ""
    hair_style: str = ""
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    tilt: float = 0.0
    tint: float = 1.0

    @property
    def caption(self) -> str:
        """One English phrase that names every attribute; without an accessory it says nothing of one."""
        person = bool(self.hair)
        subject = f"{MOODS[self.mouth]} {self.character if person else f'{self.colour} {self.character}'}"
        looks = [f"{self.colour} skin", _hair_words(self.hair, self.hair_style)] if person else []
        looks += [_with_article(f"{self.head} head"), _eye_words(self.character, self.eyes)]
        if self.accessory != "none":
            looks.append(self.accessory if self.accessory == "glasses" else _with_article(self.accessory))
        listed = f"{', '.join(looks[:-1])} and {looks[-1]}"
        return f"{_with_article(subject)} with {listed} on {_with_article(f'{self.background} background')}"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _hair_words(hair: str, style: str) -> str:
    return f"{hair} {style}" if style == "pigtails" else f"{style} {hair} hair"


def _eye_words(character: str, eyes: str) -> str:
    if eyes == "wink":
        return "a winking eye"
    return f"one {eyes} eye" if character == "monster" else f"{eyes} eyes"


def cartoon(seed: int, index: int) -> Cartoon:
    """The cartoon at `index` of the endless series named by `seed`; the same arguments give the same cartoon.

    Characters take turns, so any run of `len(CHARACTERS)` indices holds each once.
    Raises ValueError if `index` is negative.
    """
    _require("index", index, 0)
    dice = random.Random(f"cartoon {seed} {index}")
    character = CHARACTERS[index % len(CHARACTERS)]
    kind = KINDS[character]
    colour = dice.choice(list(kind.colours))
    person = character == "person"
    hair = dice.choice(list(HAIR)) if person else ""
    taken = [(colour, kind.colours[colour]), *([(hair, HAIR[hair])] if person else [])]
    return Cartoon(
        character,
        colour,
        head=dice.choice(kind.heads),
        eyes=dice.choice(kind.eyes),
        mouth=dice.choice(list(MOODS)),
        accessory=dice.choice(kind.accessories) if dice.random() < 0.5 else "none",
        background=dice.choice(_backgrounds(taken)),
        hair=hair,
        hair_style=dice.choice(list(HAIR_STYLES)) if person else "",
        dx=dice.uniform(-0.02, 0.02),
        dy=dice.uniform(-0.015, 0.015),
        scale=dice.uniform(0.95, 1.02),
        tilt=dice.uniform(-5.0, 5.0),
        tint=dice.uniform(0.94, 1.04),
    )


def _backgrounds(taken: list[tuple[str, Colour]]) -> list[str]:
    """Names of the backgrounds that differ from the colours taken by the head, in name and to the eye."""
    return [
        name
        for name, rgb in BACKGROUNDS.items()
        if all(name != other and math.dist(rgb, colour) > 90 for other, colour in taken)
    ]


def _require(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _tinted(colour: Colour, tint: float) -> Colour:
    red, green, blue = (min(255, round(part * tint)) for part in colour)
    return red, green, blue


@cache
def _unit_blob(power: float) -> tuple[Point, ...]:
    """Outline of a superellipse: power 2 is a circle, more is squarer."""
    turns = [math.tau * step / 48 for step in range(48)]
    return tuple((_root(math.cos(turn), power), _root(math.sin(turn), power)) for turn in turns)


def _root(value: float, power: float) -> float:
    return math.copysign(abs(value) ** (2 / power), value)


def _blob(at: Point, axes: Point, power: float = 2.0, turn: float = 0.0) -> list[Point]:
    """Outline of a superellipse about `at`, turned clockwise by `turn` radians."""
    (x, y), (rx, ry), cos, sin = at, axes, math.cos(turn), math.sin(turn)
    return [(x + u * rx * cos - v * ry * sin, y + u * rx * sin + v * ry * cos) for u, v in _unit_blob(power)]


def _dot(rx: float, ry: float, power: float = 2.0, turn: float = 0.0) -> list[Point]:
    return _blob((0, 0), (rx, ry), power, turn)


def _star(points: int, inner: float, outer: float, spread: float) -> list[Point]:
    """A zigzag about the origin, `spread` radians to either side of straight up."""
    turns = [spread * (2 * step / (points - 1) - 1) for step in range(points)]
    ranges = [outer if step % 2 else inner for step in range(points)]
    return [(far * math.sin(turn), -far * math.cos(turn)) for turn, far in zip(turns, ranges, strict=True)]


def _bow(at: Point, half: float, depth: float) -> list[Point]:
    """A shallow curve through `at`, its middle lower than its ends by `depth`."""
    x, y = at
    return [(x + half * t / 5, y + depth * (0.5 - t * t / 25)) for t in range(-5, 6)]


class Shape(NamedTuple):
    """A filled polygon, or a line where `width` is given, in named paints.

    `points` are fractions of the head's half-axes; where `at` is such a point, they are distances from it in
    picture widths instead. A `pair` is drawn again with left and right exchanged.
    """

    points: Sequence[Point]
    paint: str
    edge: str = ""
    at: Point | None = None
    pair: bool = False
    width: float = 0.0


HEAD = Shape(_dot(1, 1, 2.2), "main", "edge")
CHEEKS = Shape(_dot(0.06, 0.045), "blush", at=(0.66, 0.36), pair=True)
PARTING: list[Point] = [(0.95, -0.3), (0.45, -0.42), (0.2, -0.62), (-0.3, -0.4), (-0.95, -0.3)]
CAP = Shape(_blob((0, -0.2), (1.1, 0.94)), "hair", "hair edge")
CURLS: list[Point] = [
    (1.02 * math.sin(turn), -0.1 - 0.95 * math.cos(turn)) for turn in (0.47 * step for step in range(-4, 5))
]
HAIR_STYLES: dict[str, tuple[Shape, ...]] = {
    "short": (CAP,),
    "long": (Shape(_blob((0, -0.06), (1.26, 1.02), 2.8), "hair", "hair edge"),),
    "curly": (
        *(Shape(_dot(0.12, 0.12), "hair edge", at=curl) for curl in CURLS),
        *(Shape(_dot(0.1, 0.1), "hair", at=curl) for curl in CURLS),
    ),
    "spiky": (Shape(_star(11, 0.98, 1.38, 1.45), "hair", "hair edge"),),
    "pigtails": (Shape(_dot(0.085, 0.16, turn=-0.3), "hair", "hair edge", (1.2, 0.25), pair=True), CAP),
}
HORN: list[Point] = [(0.86, -0.5), (1.15, -1.0), (1.0, -1.45), (0.74, -1.05), (0.32, -0.8)]
PARTS: dict[str, tuple[Shape, ...]] = {
    "person": (
        Shape(_dot(0.06, 0.07), "main", "edge", (1.0, 0.08), pair=True),
        HEAD,
        Shape([*((1.07 * u, 1.07 * v) for u, v in HEAD.points if v < -0.3), *PARTING], "hair"),
        Shape(PARTING, "hair edge", width=0.025),
        CHEEKS,
        Shape(_dot(0.035, 0.028), "blush", at=(0, 0.28)),
    ),
    "cat": (
        Shape([(0.98, -0.15), (0.92, -1.5), (0.18, -0.85)], "main", "edge", pair=True),
        Shape([(0.85, -0.5), (0.8, -1.22), (0.42, -0.85)], "inner", pair=True),
        HEAD,
        Shape([(0.2, -0.92), (0.16, -0.66)], "stripe", pair=True, width=0.04),
        Shape([(0, -0.95), (0, -0.62)], "stripe", width=0.04),
        Shape(_dot(0.18, 0.125), "cream", at=(0, 0.46)),
        Shape([(-0.05, -0.02), (0.05, -0.02), (0, 0.045)], "pink", "ink", at=(0, 0.24)),
        Shape([(0.78, 0.3), (1.22, 0.2)], "ink", pair=True, width=0.025),
        Shape([(0.78, 0.52), (1.22, 0.62)], "ink", pair=True, width=0.025),
    ),
    "bear": (
        Shape(_dot(0.125, 0.125), "main", "edge", (0.76, -0.78), pair=True),
        Shape(_dot(0.07, 0.07), "inner", at=(0.76, -0.78), pair=True),
        HEAD,
        Shape(_dot(0.195, 0.165), "cream", at=(0, 0.42)),
        Shape(_dot(0.085, 0.06), "ink", at=(0, 0.2)),
        Shape(_dot(0.022, 0.015), "white", at=(-0.07, 0.14)),
    ),
    "robot": (
        Shape([(0, 0), (0, -0.13)], "edge", at=(0, -1), width=0.05),
        Shape(_blob((0, -0.14), (0.055, 0.055)), "red", "edge", (0, -1)),
        Shape(_dot(0.045, 0.1, 6.0), "shade", "edge", (1.06, 0), pair=True),
        Shape(_dot(1, 1, 7.0), "main", "edge"),
        Shape(_blob((0, 0.04), (0.84, 0.8), 6.0), "screen"),
    ),
    "frog": (
        Shape(_blob((0.23, 0), (0.155, 0.155)), "main", "edge", (0, -0.87), pair=True),
        HEAD,
        Shape(_blob((0, 0.45), (0.76, 0.46)), "belly"),
        Shape(_dot(0.02, 0.02), "edge", at=(0.14, -0.14), pair=True),
    ),
    "rabbit": (
        Shape(_blob((0.155, -0.11), (0.085, 0.21), turn=0.16), "main", "edge", (0, -0.95), pair=True),
        Shape(_blob((0.155, -0.11), (0.042, 0.145), turn=0.16), "inner", at=(0, -0.95), pair=True),
        HEAD,
        CHEEKS,
        Shape([(-0.045, -0.02), (0.045, -0.02), (0, 0.035)], "pink", "edge", (0, 0.16)),
    ),
    "penguin": (
        Shape(_dot(0.12, 0.055), "amber", "edge", (0.45, 1.02), pair=True),
        Shape(_dot(0.07, 0.17, turn=-0.45), "main", "edge", (0.99, 0.3), pair=True),
        HEAD,
        Shape(_blob((0.36, -0.2), (0.46, 0.42)), "white", pair=True),
        Shape(_blob((0, 0.32), (0.78, 0.6)), "white"),
        CHEEKS,
        Shape([(-0.085, -0.03), (0, -0.06), (0.085, -0.03), (0, 0.06)], "amber", "ink", (0, 0.16)),
    ),
    "monster": (
        Shape(HORN, "cream", "edge", pair=True),
        Shape(_star(33, 0.95, 1.1, math.pi), "main", "edge"),
    ),
}
FANG = Shape([(-0.04, 0), (0.04, 0), (0, 0.075)], "white")
TEETH: dict[str, tuple[Shape, tuple[float, ...]]] = {
    "rabbit": (Shape(_blob((0, 0.05), (0.035, 0.04), 5.0), "white", "ink"), (0.0,)),
    "monster": (FANG, (-0.09, 0.09)),
}
HAT = (
    Shape([(-0.1, 0), (-0.115, -0.15), (0.115, -0.15), (0.1, 0)], "red", "ink"),
    Shape([(-0.1, -0.01), (-0.105, -0.06), (0.105, -0.06), (0.1, -0.01)], "gold"),
    Shape(_blob((0, 0.01), (0.18, 0.028), 3.0), "red", "ink"),
)
TINES: list[Point] = [(-0.16, -0.15), (-0.07, -0.07), (0, -0.18), (0.07, -0.07), (0.16, -0.15)]
CROWN = (
    Shape([(-0.13, 0.02), *TINES, (0.13, 0.02)], "gold", "ink"),
    Shape(_blob((0, -0.03), (0.03, 0.03)), "red"),
)
BOW_TIE = (
    Shape([(0, 0), (0.17, -0.068), (0.17, 0.068)], "red", "ink", pair=True),
    Shape(_dot(0.04, 0.045), "gold", "ink"),
)
# Headwear moves the whole picture down a little and a bow tie moves it up, so that neither is cut off.
LIFTS: dict[str, float] = {"hat": 0.03, "crown": 0.03, "bow tie": -0.025}


class Sketch:
    """One cartoon on its way to paper: a canvas, the head's place, and the paints in use."""

    def __init__(self, image: Image.Image, cartoon: Cartoon) -> None:
        """Take an RGB `image`, square and already filled with the background."""
        self.cartoon, self.kind = cartoon, KINDS[cartoon.character]
        self.paints = _paints(cartoon)
        wide, tall = HEADS[cartoon.head]
        self.axes = self.kind.axes[0] * wide, self.kind.axes[1] * tall
        self._canvas = ImageDraw.Draw(image)
        self._side = image.width
        turn, grow = math.radians(cartoon.tilt), image.width * cartoon.scale
        self._cos, self._sin = grow * math.cos(turn), grow * math.sin(turn)
        drop = cartoon.dy + LIFTS.get(cartoon.accessory, 0.0)
        self._middle = (0.5 + cartoon.dx) * self._side, (0.55 + drop) * self._side

    def at(self, u: float, v: float) -> Point:
        """The point at fractions `u`, `v` of the head's half-axes from its centre."""
        return 0.5 + u * self.axes[0], self.kind.y + v * self.axes[1]

    def draw(self, shape: Shape, about: Point | None = None) -> None:
        """Draw `shape`, its points taken as distances from `about` where that is given."""
        for side in (1, -1) if shape.pair else (1,):
            points = [(side * x, y) for x, y in shape.points]
            origin = about or (self.at(side * shape.at[0], shape.at[1]) if shape.at else None)
            points = [(origin[0] + x, origin[1] + y) if origin else self.at(x, y) for x, y in points]
            if shape.width:
                self.line(points, shape.paint, shape.width)
            else:
                self.fill(points, shape.paint, shape.edge)

    def fill(self, points: Sequence[Point], paint: str, edge: str = "") -> None:
        """Fill a polygon, with an outline around it where `edge` is given."""
        placed = self._placed(points)
        if edge:
            ring = [*placed, *placed[:2]]
            self._canvas.line(ring, self.paints[edge], round(2 * EDGE * self._side), joint="curve")
        self._canvas.polygon(placed, self.paints[paint])

    def line(self, points: Sequence[Point], paint: str, width: float = STROKE) -> None:
        """Draw a line with round ends."""
        placed = self._placed(points)
        self._canvas.line(placed, self.paints[paint], round(width * self._side), joint="curve")
        for end in (placed[0], placed[-1]):
            self._canvas.circle(end, width * self._side / 2, self.paints[paint])

    def ink(self, ground: str) -> str:
        """The paint for lines that have to show on the paint `ground`."""
        if ground == "screen":
            return "glow"
        return "ink" if sum(self.paints[ground]) > 300 else "cream"

    def _placed(self, points: Sequence[Point]) -> list[Point]:
        cos, sin, (left, top) = self._cos, self._sin, self._middle
        offsets = [(x - 0.5, y - 0.55) for x, y in points]
        return [(left + x * cos - y * sin, top + x * sin + y * cos) for x, y in offsets]


def _paints(cartoon: Cartoon) -> dict[str, Colour]:
    main = _tinted(KINDS[cartoon.character].colours[cartoon.colour], cartoon.tint)
    hair = _tinted(HAIR[cartoon.hair], cartoon.tint) if cartoon.hair else main
    face = PAINTS.get(KINDS[cartoon.character].face, main)
    ink, white, cream, pink = (PAINTS[name] for name in ("ink", "white", "cream", "pink"))
    return PAINTS | {
        "main": main,
        "edge": _mix(main, ink, 0.8),
        "shade": _mix(main, ink, 0.35),
        "inner": _mix(main, pink, 0.6),
        "blush": _mix(face, pink, 0.5),
        "belly": _mix(main, cream, 0.5),
        "stripe": _mix(main, ink if sum(main) > 300 else white, 0.35),
        "lid": _mix(face, white if face == PAINTS["screen"] else ink, 0.2),
        "hair": hair,
        "hair edge": _mix(hair, ink, 0.75),
    }


def _round_eye(s: Sketch, at: Point, r: float) -> None:
    (x, y), power, pupil = at, s.kind.eye_power, s.kind.pupil * r
    s.fill(_blob(at, (r * 0.92, r), power), s.kind.sclera, "edge")
    s.fill(_blob((x, y + 0.08 * r), (pupil, pupil * 1.1), power), "ink")
    s.fill(_blob((x - 0.36 * pupil, y - 0.36 * pupil), (pupil * 0.45, pupil * 0.45)), "white")


def _sleepy_eye(s: Sketch, at: Point, r: float) -> None:
    x, y = at
    _round_eye(s, at, r)
    s.fill([(px, min(py, y + 0.12 * r)) for px, py in _blob(at, (r * 0.92, r), s.kind.eye_power)], "lid")
    s.line([(x - r, y + 0.12 * r), (x + r, y + 0.12 * r)], s.ink(s.kind.face), 0.035)


def _closed_eye(s: Sketch, at: Point, r: float) -> None:
    s.line(_bow(at, r * 0.95, -r * 0.9), s.ink(s.kind.face), 0.045)


EYES: dict[str, tuple[Callable[[Sketch, Point, float], None], ...]] = {
    "round": (_round_eye, _round_eye),
    "sleepy": (_sleepy_eye, _sleepy_eye),
    "wink": (_round_eye, _closed_eye),
    "closed": (_closed_eye, _closed_eye),
}
BENDS: dict[str, float] = {"smile": 1.0, "frown": -1.0, "open": 0.0}


def _eye_places(s: Sketch) -> list[Point]:
    apart, v, _ = s.kind.eye
    x, y = s.at(0, v)
    return [(x - apart, y), (x + apart, y)] if apart else [(x, y)]


def _eyes(s: Sketch) -> None:
    for eye, place in zip(EYES[s.cartoon.eyes], _eye_places(s), strict=False):
        eye(s, place, s.kind.eye[2])


def _mouth(s: Sketch) -> None:
    height, half, depth = s.kind.mouth
    (x, y), bend, ink = s.at(0, height), depth * BENDS[s.cartoon.mouth], s.ink(s.kind.muzzle)
    if bend:
        s.line(_bow((x, y), half, bend), ink)
    else:
        jaw = [(px, max(py, y - 0.02)) for px, py in _blob((x, y - 0.02), (half, 0.13))]
        s.fill(jaw, "throat")
        s.line([*jaw[:25], jaw[0]], ink, EDGE)
        s.fill(_blob((x, y + 0.07), (half * 0.5, 0.032)), "pink")
    tooth, offsets = TEETH.get(s.cartoon.character, (FANG, ()))
    for off in offsets:
        s.draw(tooth, (x + off, y + bend * (0.5 - (off / half) ** 2)))


def _glasses(s: Sketch) -> None:
    places, r = _eye_places(s), s.kind.eye[2] + 0.042
    for place in places:
        ring = _blob(place, (r, r))
        s.line([*ring, ring[0]], "red", 0.035)
    if len(places) > 1:
        (left, y), (right, _) = places
        s.line([(left + r, y), (right - r, y)], "red", 0.035)


def _headwear(s: Sketch, shapes: Sequence[Shape]) -> None:
    for shape in shapes:
        s.draw(shape, s.at(0, s.kind.crown))


def _bow_tie(s: Sketch) -> None:
    chin = s.at(0, 1)[1]
    for shape in BOW_TIE:
        s.draw(shape, (0.5, min(chin + 0.03, 0.94)))


ACCESSORIES: dict[str, Callable[[Sketch], None]] = {
    "none": lambda _: None,
    "glasses": _glasses,
    "monocle": _glasses,
    "hat": lambda s: _headwear(s, HAT),
    "crown": lambda s: _headwear(s, CROWN),
    "bow tie": _bow_tie,
}


def draw(cartoon: Cartoon, resolution: int = 32) -> Image.Image:
    """Draw `cartoon` as an RGB image of `resolution` by `resolution` pixels.

    Raises ValueError if `resolution` is below 8.
    """
    _require("resolution", resolution, SMALLEST_RESOLUTION)
    side = resolution * max(2, math.ceil(DRAWING_SIDE / resolution))
    image = _backdrop(BACKGROUNDS[cartoon.background], side)
    sketch = Sketch(image, cartoon)
    for shape in (*HAIR_STYLES.get(cartoon.hair_style, ()), *PARTS[cartoon.character]):
        sketch.draw(shape)
    _eyes(sketch)
    _mouth(sketch)
    ACCESSORIES[cartoon.accessory](sketch)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS)


def _backdrop(colour: Colour, side: int) -> Image.Image:
    """A square that grows a little darker downwards."""
    ends = Image.new("RGB", (1, 2), _mix(colour, PAINTS["white"], 0.15))
    ends.putpixel((0, 1), _mix(colour, PAINTS["ink"], 0.06))
    return ends.resize((side, side), Image.Resampling.BILINEAR)


def tar_shard(seed: int, first: int, count: int, resolution: int) -> bytes:
    """A WebDataset tar of the cartoons `first` to `first + count - 1`, the same bytes for the same arguments.

    Each cartoon is a PNG and a JSON file of its `class` and `caption`, named by its six-digit index.
    Raises ValueError if `first` or `count` is negative or `resolution` is below 8.
    """
    _require("first", first, 0)
    _require("count", count, 0)
    _require("resolution", resolution, SMALLEST_RESOLUTION)
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(first, first + count):
            one = cartoon(seed, index)
            label = {"class": one.character, "caption": one.caption}
            _add(tar, f"{index:06d}.png", _png(draw(one, resolution)))
            _add(tar, f"{index:06d}.json", json.dumps(label, sort_keys=True).encode())
    return shard.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # TarInfo's own defaults fix the owner, the mode and the time, so the bytes depend on nothing else.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def find(config: DrawConfig) -> Outcome | None:
    """The shards of these settings, if they are there."""
    uri = _uri(config)
    return Outcome(uri=uri, found=True) if storage.is_published(uri) else None


def run(config: DrawConfig) -> Outcome:
    """Draw all shards, one process a core, and publish the folder that holds them."""
    uri, starts = _uri(config), range(0, config.count, config.shard_size)
    counts = [min(config.shard_size, config.count - start) for start in starts]
    progress = Progress("draw", config.count, "pictures", every=2.0)
    parts = []
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        shards = pool.map(tar_shard, repeat(config.seed), starts, counts, repeat(config.resolution))
        for number, data in enumerate(shards):
            parts.append(storage.put_part(uri, f"cartoons-{number:05}", ".tar", data))
            progress.update(starts[number] + counts[number])
    storage.publish(uri, {"kind": "cartoons", "schema": 1, "settings": what(config), "parts": parts})
    return Outcome(uri=uri, found=False)


def _uri(config: DrawConfig) -> str:
    """Where the shards of these settings lie."""
    return storage.join(storage.normalise(config.store), "cartoons", identity("draw", VERSION, what(config), []))
