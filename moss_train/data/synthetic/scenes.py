"""A procedural world that a tiny model learns in minutes: identical big blocks of one colour in one place.

A scene is (colour, place, count) or an empty screen. A clip shows a sequence of scenes; two neighbouring scenes of one
clip differ in exactly one attribute (or one of them is empty). Scenes change half-way between whole seconds, so that
sampling at whole frames per second is never ambiguous. Everything here is a pure function of a numpy generator.

The held-out split shows combinations that the training split never shows, while every single attribute value and
every pair of values occurs in training.

Shape suffixes: F frames, H height, W width.
"""

from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (35, 185, 50),
    "blue": (40, 75, 235),
    "yellow": (235, 215, 40),
}
PLACES = ("left", "right", "top", "bottom")
COUNTS = ("one", "two", "three")
ATTRIBUTES: dict[str, tuple[str, ...]] = {"colour": tuple(COLOURS), "place": PLACES, "count": COUNTS}

NATIVE_SIZE = 112  #: pixels; every block is at least 11 px wide after a resize to 56 px
NATIVE_FPS = 1.0  #: no more than is sampled: decoding the others would cost as much as training
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Scene:
    """What is on screen: `count` identical blocks of one `colour` along the `place` border."""

    colour: str
    place: str
    count: str

    def value(self, attribute: str) -> str:
        return str(getattr(self, attribute))

    def changed(self, attribute: str, value: str) -> "Scene":
        return Scene(**{**self.__dict__, attribute: value})

    def caption(self) -> str:
        where = f"on the {self.place}" if self.place in ("left", "right") else f"at the {self.place}"
        return f"{self.count} {self.colour} block{'' if self.count == 'one' else 's'} {where}"


def is_heldout(scene: Scene) -> bool:
    """Whether a combination belongs to the held-out split (8 of 48).

    Every pair of values lacks at most one value of the third attribute in training, so an unseen combination is put
    together from parts that were learnt apart.
    """
    colour, place, count = (ATTRIBUTES[name].index(scene.value(name)) for name in ATTRIBUTES)
    return (colour + place) % 2 == 0 and count == (colour // 2 + place) % 3


ALL_SCENES = tuple(Scene(c, p, n) for c in COLOURS for p in PLACES for n in COUNTS)
SCENES: dict[str, tuple[Scene, ...]] = {
    "train": tuple(s for s in ALL_SCENES if not is_heldout(s)),
    "heldout": tuple(s for s in ALL_SCENES if is_heldout(s)),
}


def neighbours(scene: Scene, attribute: str, split: str) -> list[Scene]:
    """What `scene` may change into in `split`, in `attribute` alone; never empty.

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
            block_px=int(rng.integers(23, 28)),
            shift_px=(int(rng.integers(-3, 4)), int(rng.integers(-3, 4))),
        )


def draw_scene(scene: Scene | None, look: Look) -> np.ndarray:
    """One picture at native size, uint8 [H, W, 3]; `None` is the empty screen."""
    image_HWC = np.empty((NATIVE_SIZE, NATIVE_SIZE, 3), np.uint8)
    image_HWC[:] = np.clip(look.background, 0, 255)
    if scene is None:
        return image_HWC
    colour = np.clip(np.add(COLOURS[scene.colour], look.tint), 0, 255).astype(np.uint8)
    pitch = 35
    count = COUNTS.index(scene.count) + 1
    near = 20 if scene.place in ("left", "top") else NATIVE_SIZE - 20
    for k in range(count):
        along = NATIVE_SIZE / 2 + (k - (count - 1) / 2) * pitch
        x, y = (near, along) if scene.place in ("left", "right") else (along, near)
        x0 = int(np.clip(round(x + look.shift_px[0] - look.block_px / 2), 0, NATIVE_SIZE - look.block_px))
        y0 = int(np.clip(round(y + look.shift_px[1] - look.block_px / 2), 0, NATIVE_SIZE - look.block_px))
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

    def captions(self) -> dict:
        """What is shown from when to when, as an entry of ActivityNet Captions; an empty screen has no caption."""
        ends = [start_s for start_s, _ in self.segments[1:]] + [self.duration_s]
        shown = [
            ([start_s, end_s], scene.caption())
            for (start_s, scene), end_s in zip(self.segments, ends, strict=True)
            if scene is not None
        ]
        spans, sentences = [span for span, _ in shown], [sentence for _, sentence in shown]
        return {"duration": self.duration_s, "timestamps": spans, "sentences": sentences}

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
    attribute = str(rng.choice(attributes))
    found = neighbours(scene, attribute, split)
    return found[int(rng.integers(len(found)))], attribute
