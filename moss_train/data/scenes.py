"""A procedural world that a tiny model learns in minutes: identical blocks of one colour in one quarter of the screen.

A scene is (colour, side, height, count) or an empty screen. A clip shows a sequence of scenes; two neighbouring scenes
of one clip differ in exactly one attribute (or one of them is empty). Scenes change half-way between whole seconds, so
that sampling at whole frames per second is never ambiguous. Everything here is a pure function of a numpy generator.

The held-out split shows combinations that the training split never shows, while every single attribute value and
every pair of values occurs in training.

Shape suffixes: F frames, H height, W width.
"""

import itertools
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (35, 185, 50),
    "blue": (40, 75, 235),
    "yellow": (235, 215, 40),
}
SIDES = ("left", "right")
HEIGHTS = ("top", "bottom")
COUNTS = ("one", "two", "three")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "side": SIDES,
    "height": HEIGHTS,
    "count": COUNTS,
}

NATIVE_SIZE = 112  #: pixels; every block is at least 8 px wide after a resize to 56 px
NATIVE_FPS = 4.0
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Scene:
    """What is on screen: `count` identical blocks of one `colour` in the quarter given by `side` and `height`."""

    colour: str
    side: str
    height: str
    count: str

    def value(self, attribute: str) -> str:
        return str(getattr(self, attribute))

    def changed(self, attribute: str, value: str) -> "Scene":
        return Scene(**{**self.__dict__, attribute: value})

    def caption(self) -> str:
        return f"{self.count} {self.colour} block{'' if self.count == 'one' else 's'} {self.height} {self.side}"


def is_heldout(scene: Scene) -> bool:
    """Whether a combination belongs to the held-out split (16 of 48).

    A Latin pattern: every colour in every quarter lacks one count in training, another one in each, so an unseen
    combination must be put together from parts that were learnt apart.
    """
    return sum(ATTRIBUTES[name].index(scene.value(name)) for name in ATTRIBUTES) % 3 == 0


ALL_SCENES = tuple(Scene(*values) for values in itertools.product(*ATTRIBUTES.values()))
SCENES: dict[str, tuple[Scene, ...]] = {
    "train": tuple(s for s in ALL_SCENES if not is_heldout(s)),
    "heldout": tuple(s for s in ALL_SCENES if is_heldout(s)),
}


def neighbours(scene: Scene, attribute: str, split: str) -> list[Scene]:
    """What `scene` may change into in `split`, in `attribute` alone; may be empty in training.

    Training shows seen combinations only. A held-out clip changes from or to an unseen combination wherever the
    attribute allows it.
    """
    others = [scene.changed(attribute, value) for value in ATTRIBUTES[attribute] if value != scene.value(attribute)]
    if split == "train":
        return [other for other in others if not is_heldout(other)]
    return [other for other in others if is_heldout(scene) or is_heldout(other)] or others


@dataclass(frozen=True)
class Look:
    """The nuisance of one clip: background, tint and jitter. Native pixels and 8-bit levels."""

    background: tuple[int, int, int]
    tint: tuple[int, int, int]
    block_px: int
    shift_px: tuple[int, int]

    @staticmethod
    def draw(rng: np.random.Generator) -> "Look":
        base = int(rng.integers(18, 46))
        return Look(
            background=tuple(int(base + d) for d in rng.integers(-6, 7, 3)),
            tint=tuple(int(d) for d in rng.integers(-14, 15, 3)),
            block_px=int(rng.integers(17, 20)),
            shift_px=(int(rng.integers(-2, 3)), int(rng.integers(-2, 3))),
        )


#: centres of the first, second and third block from the middle of their quarter; native pixels
_PLACES_IN_QUARTER = ((-12, -12), (12, 12), (12, -12))


def draw_scene(scene: Scene | None, look: Look) -> np.ndarray:
    """One picture at native size, uint8 [H, W, 3]; `None` is the empty screen."""
    image_HWC = np.empty((NATIVE_SIZE, NATIVE_SIZE, 3), np.uint8)
    image_HWC[:] = np.clip(look.background, 0, 255)
    if scene is None:
        return image_HWC
    colour = np.clip(np.add(COLOURS[scene.colour], look.tint), 0, 255).astype(np.uint8)
    quarter = NATIVE_SIZE // 2
    left = 0 if scene.side == "left" else quarter
    top = 0 if scene.height == "top" else quarter
    for x, y in _PLACES_IN_QUARTER[: COUNTS.index(scene.count) + 1]:
        x0 = round(left + quarter / 2 + x + look.shift_px[0] - look.block_px / 2)
        y0 = round(top + quarter / 2 + y + look.shift_px[1] - look.block_px / 2)
        image_HWC[y0 : y0 + look.block_px, x0 : x0 + look.block_px] = colour
    return image_HWC


def resize(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Box filter where `size` divides the native size, else nearest neighbour; uint8 [size, size, 3]."""
    native = image_HWC.shape[0]
    if size == native:
        return image_HWC
    if native % size == 0:
        step = native // size
        boxes = image_HWC.reshape(size, step, size, step, 3).astype(np.float32)
        return np.rint(boxes.mean((1, 3))).astype(np.uint8)
    index = np.minimum(((np.arange(size) + 0.5) * native / size).astype(int), native - 1)
    return image_HWC[index][:, index]


@dataclass(frozen=True)
class Timeline:
    """What a clip shows when: `(start_s, scene)` in order, the first at 0.0, each until the next starts."""

    duration_s: float
    segments: tuple[tuple[float, Scene | None], ...]
    look: Look

    def scene_at(self, time_s: float) -> Scene | None:
        shown = self.segments[0][1]
        for start_s, scene in self.segments:
            if start_s <= time_s:
                shown = scene
        return shown

    def scenes(self) -> list[Scene | None]:
        return [scene for _, scene in self.segments]

    def frames(self, fps: float = 1.0, size: int = NATIVE_SIZE) -> np.ndarray:
        """Frames at 0, 1/fps, 2/fps … below the duration: uint8 [F, H, W, 3]."""
        pictures = {scene: resize(draw_scene(scene, self.look), size) for scene in set(self.scenes())}
        count = int(np.ceil(self.duration_s * fps - 1e-6))
        return np.stack([pictures[self.scene_at(index / fps)] for index in range(count)])


@dataclass(frozen=True)
class Clip:
    """One sample: its JSON (schema of design §4.1) and what its medium shows (`None` for a text-only sample)."""

    key: str
    sample: dict
    timeline: Timeline | None

    def frames(self, fps: float = 1.0, size: int = NATIVE_SIZE) -> np.ndarray:
        """uint8 [F, H, W, 3]; see `Timeline.frames`."""
        if self.timeline is None:
            raise ValueError(f"clip {self.key!r} has no pictures")
        return self.timeline.frames(fps, size)


def first_scene(rng: np.random.Generator, split: str) -> Scene:
    return SCENES[split][int(rng.integers(len(SCENES[split])))]


def next_scene(rng: np.random.Generator, scene: Scene, split: str, attributes: list[str]) -> tuple[Scene, str]:
    """A neighbour of `scene` by one of `attributes`, and the attribute that changed.

    The attribute is drawn first, so that each is as frequent as the others.
    """
    for attribute in rng.permutation(attributes):
        found = neighbours(scene, str(attribute), split)
        if found:
            return found[int(rng.integers(len(found)))], str(attribute)
    raise ValueError(f"{scene} cannot change in {attributes} within split {split!r}")
