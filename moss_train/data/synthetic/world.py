"""Samples over the procedural scenes of `scenes.py`: captions, conversations and streams of design §4.1.

`sample_clip` is a pure function of its generator. Streams hold every behaviour the real-time stage teaches: questions
before, during and after the evidence, revisions, confirmations (something else changes: silence), interruptions of a
running reply, and streams in which nobody asks anything. What the evaluator needs to score them is in
`source_metadata`, times in seconds:

    scenario       list of names of `SCENARIOS`
    questions      {"id", "attribute", "asked_t", "evidence_t", "answer_t", "answer_id", "answer"}
    revisions      {"id", "question", "attribute", "t", "old", "new", "supersedes"}
    confirmations  {"question", "attribute" (the one that changed), "t", "standing"}

Conversations about clips say of each answer what it is about, in `question_types`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from moss_train.data.synthetic.scenes import (
    ATTRIBUTES,
    COUNTS,
    SPLITS,
    Clip,
    Look,
    Scene,
    Timeline,
    first_scene,
    next_scene,
)

STREAM_SECONDS = 12
SYSTEM = "Answer what you see now."
QUESTIONS = {"colour": "What colour is it?", "place": "Where is it?", "count": "How many are there?"}
DESCRIBE = "Describe it."

#: share of each behaviour among streams; see `sample_stream`
SCENARIOS: dict[str, float] = {
    "before": 0.45,
    "during": 0.20,
    "after": 0.05,
    "interruption": 0.12,
    "description": 0.03,
    "two_questions": 0.08,
    "silent": 0.07,
}
#: How often a question is about each attribute. Were they equally frequent, neither what changed nor what was asked
#: would say anything alone about whether to speak, and a small model would need far longer to find their relation.
ASKED_ABOUT = {"colour": 0.45, "place": 0.3, "count": 0.25}
#: Fewest and most frames from an answer to a change and from one change to the next. Training streams are dense, since
#: every change is a decision to learn from; held-out ones have pauses that training never shows.
PAUSES = {"train": (1, 3), "heldout": (2, 5)}
#: fewest and most changes that are tried for in a stream; its end may cut them short
CHANGES = {"train": (3, 8), "heldout": (2, 5)}
KINDS = ("still_caption", "clip_caption", "conversation", "text", "stream")


def answer_text(scene: Scene, attribute: str) -> str:
    return f"It is {scene.value(attribute)}."


def revision_text(scene: Scene, attribute: str) -> str:
    return f"It is {scene.value(attribute)} now."


def description(scene: Scene) -> str:
    where = f"on the {scene.place}" if scene.place in ("left", "right") else f"at the {scene.place}"
    blocks = "is one block" if scene.count == COUNTS[0] else f"are {scene.count} blocks"
    return f"It is {scene.colour}, {where}, and there {blocks}."


@dataclass
class _Script:
    """A stream while it is written: the timeline and the dialogue, in order of time."""

    rng: np.random.Generator
    split: str
    segments: list[tuple[float, Scene | None]] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    scenario: list[str] = field(default_factory=list)
    questions: list[dict] = field(default_factory=list)
    revisions: list[dict] = field(default_factory=list)
    confirmations: list[dict] = field(default_factory=list)

    def between(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return int(self.rng.integers(low, high + 1))

    def attribute(self, other_than: tuple[str, ...] = ()) -> str:
        names = [name for name in ATTRIBUTES if name not in other_than]
        odds = np.array([ASKED_ABOUT[name] for name in names])
        return str(self.rng.choice(names, p=odds / odds.sum()))

    @property
    def scene(self) -> Scene | None:
        return self.segments[-1][1]

    def show(self, scene: Scene | None, from_frame: int) -> None:
        """`scene` is on screen from the frame at `from_frame` seconds; the change falls between two frames."""
        self.segments.append((max(0.0, from_frame - 0.5), scene))

    def appear(self, frame: int) -> None:
        if frame > 0:
            self.show(None, 0)
        self.show(first_scene(self.rng, self.split), frame)

    def ask(self, t: float, text: str, **more: str) -> str:
        name = f"q{sum(event['role'] == 'user' for event in self.events) + 1}"
        self.events.append({"id": name, "t": float(t), "role": "user", **more, "text": text})
        return name

    def say(self, t: float, text: str, evidence: tuple[float, float], **more: str) -> str:
        name = f"a{sum('text' in event and event['role'] == 'assistant' for event in self.events) + 1}"
        event = {"id": name, "t": float(t), "role": "assistant", "kind": "speak", **more, "text": text}
        self.events.append({**event, "evidence": [float(second) for second in evidence]})
        return name

    def question(self, asked_t: float, answer_t: float, attribute: str, about: Scene, seen: tuple[int, int]) -> None:
        """A question about `attribute` and its answer; `about` was on screen in the frames `seen` (first, last)."""
        asked = self.ask(asked_t, QUESTIONS[attribute])
        self._answer(asked, asked_t, answer_t, attribute, about, seen)

    def _answer(
        self, asked: str, asked_t: float, answer_t: float, attribute: str, about: Scene, seen: tuple[int, int]
    ) -> None:
        text = answer_text(about, attribute)
        said = self.say(answer_t, text, seen, reply_to=asked)
        self.questions.append(
            {
                "id": asked,
                "attribute": attribute,
                "asked_t": asked_t,
                "evidence_t": float(seen[0]),
                "answer_t": float(answer_t),
                "answer_id": said,
                "answer": text,
            }
        )

    def changes(self, from_frame: int, most: int) -> None:
        """Up to `most` changes of one attribute each: revisions of the last answer or confirmations of it."""
        standing = self.questions[-1]
        asked, settled = standing["attribute"], {question["attribute"] for question in self.questions}
        last_said, last_text = standing["answer_id"], standing["answer"]
        frame = from_frame
        for _ in range(most):
            if frame > STREAM_SECONDS - 2:  # the last frame leaves no time to finish a reply
                return
            others = [name for name in ATTRIBUTES if name not in settled]
            before = self.scene
            assert before is not None
            scene, changed = next_scene(self.rng, before, self.split, [asked] if self.rng.random() < 0.5 else others)
            self.show(scene, frame)
            if changed == asked:
                old, last_text = last_text, revision_text(scene, asked)
                superseded = last_said
                last_said = self.say(
                    float(frame),
                    last_text,
                    (frame, frame),
                    kind="revise",
                    supersedes=superseded,
                    reply_to=standing["id"],
                )
                self.revisions.append(
                    {
                        "id": last_said,
                        "question": standing["id"],
                        "attribute": asked,
                        "t": float(frame),
                        "old": old,
                        "new": last_text,
                        "supersedes": superseded,
                    }
                )
            else:
                self.confirmations.append(
                    {
                        "question": standing["id"],
                        "attribute": changed,
                        "t": float(frame),
                        "standing": answer_text(before, asked),
                    }
                )
                name = f"c{len(self.confirmations)}"
                seen = [float(frame), float(frame)]
                confirm = {"id": name, "t": float(frame), "role": "assistant", "kind": "confirm"}
                self.events.append({**confirm, "confirms": last_said, "evidence": seen})
            frame += self.between(*PAUSES[self.split])

    def wander(self, frame: int, until: int) -> None:
        """Changes that nobody asked about, before frame `until`."""
        while frame < until:
            assert self.scene is not None
            scene, _ = next_scene(self.rng, self.scene, self.split, list(ATTRIBUTES))
            self.show(scene, frame)
            frame += self.between(2, 4)


def _before(script: _Script) -> int:
    """Asked while the screen is empty, answered by the first frame that shows something. Returns the answer's frame."""
    appear = script.between(1, 4)
    script.appear(appear)
    asked_t = 0.0 if script.rng.random() < 0.3 else script.between(0, appear - 1) + 0.25
    assert script.scene is not None
    script.question(asked_t, appear, script.attribute(), script.scene, (appear, appear))
    return appear


def _during(script: _Script) -> int:
    """Asked while the scene is on screen, answered at the next frame."""
    since = script.between(0, 2)
    script.appear(since)
    asked = since + script.between(0, 2)
    if asked - since >= 2 and script.rng.random() < 0.5:
        since = asked - script.between(0, 1)
        script.wander(since, since + 1)
    assert script.scene is not None
    script.question(asked + 0.25, asked + 1, script.attribute(), script.scene, (since, asked + 1))
    return asked + 1


def _after(script: _Script) -> None:
    """Asked when the only scene of the clip has vanished, answered from memory at the next frame."""
    appear = script.between(0, 3)
    script.appear(appear)
    about = script.scene
    assert about is not None
    vanish = appear + script.between(2, 4)
    script.show(None, vanish)
    asked = vanish + script.between(0, 2)
    script.question(asked + 0.25, asked + 1, script.attribute(), about, (appear, vanish - 1))


def _describe(script: _Script) -> tuple[int, Scene, int]:
    """A question with a reply that runs for several frames. Returns the reply's frame, the scene and its first one."""
    since = script.between(0, 2)
    script.appear(since)
    about = script.scene
    assert about is not None
    asked = since + script.between(0, 2)
    name = script.ask(asked + 0.25, DESCRIBE)
    script.say(asked + 1, description(about), (since, asked + 1), reply_to=name)
    return asked + 1, about, since


def _interruption(script: _Script) -> int:
    """A running description is cut by a question that is answered at once, before the next frame."""
    started, about, since = _describe(script)
    attribute = script.attribute()
    heard = script.between(0, 1)  # frames that arrived during the description; it needs three at 6 tokens a second
    cut_t = started + heard + 0.5
    name = script.ask(cut_t, "Stop. " + QUESTIONS[attribute], kind="interrupt")
    script._answer(name, cut_t, cut_t, attribute, about, (since, started + heard))
    return started + heard + 1


def _two_questions(script: _Script) -> int:
    """A second question about another attribute; from then on it is the one that is kept up to date."""
    frame = _before(script) if script.rng.random() < 0.5 else _during(script)
    asked = frame + script.between(1, 2)
    about = script.scene
    assert about is not None
    attribute = script.attribute(other_than=(script.questions[0]["attribute"],))
    since = int(script.questions[0]["evidence_t"])
    script.question(asked + 0.25, asked + 1, attribute, about, (since, asked + 1))
    return asked + 1


def sample_stream(rng: np.random.Generator, split: str, key: str, scenario: str | None = None) -> Clip:
    """A stream of `STREAM_SECONDS`; `scenario` is drawn from `SCENARIOS` when not given."""
    if scenario is None:
        scenario = str(rng.choice(list(SCENARIOS), p=np.array(list(SCENARIOS.values()))))
    script = _Script(rng, split, scenario=[scenario])
    asked: dict[str, Callable[[_Script], int]] = {
        "before": _before,
        "during": _during,
        "interruption": _interruption,
        "two_questions": _two_questions,
    }
    if scenario in asked:
        answered = asked[scenario](script)
        script.changes(answered + script.between(*PAUSES[split]), most=script.between(*CHANGES[split]))
    elif scenario == "after":
        _after(script)
    elif scenario == "description":
        _describe(script)
    elif scenario == "silent":
        script.appear(script.between(0, 5))
        script.wander(int(script.segments[-1][0] + 0.5) + script.between(2, 4), STREAM_SECONDS)
    else:
        raise ValueError(f"unknown scenario {scenario!r}; known: {', '.join(SCENARIOS)}")
    duration_s = float(STREAM_SECONDS)
    sample = {
        "schema": "moss_train/stream@1",
        "id": key,
        "media": [{"id": "v0", "kind": "video", "member": "mp4", "duration_s": duration_s}],
        "sampling": {"fps": 1.0, "start_s": 0.0, "end_s": duration_s},
        "system": SYSTEM,
        "silence": "implicit",
        "events": script.events,
        "source_metadata": {
            "scenario": script.scenario,
            "questions": script.questions,
            "revisions": script.revisions,
            "confirmations": script.confirmations,
        },
    }
    return Clip(key, sample, Timeline(duration_s, tuple(script.segments), Look.draw(rng)))


def _scene_name(scene: Scene | None) -> str:
    return "nothing" if scene is None else scene.caption()


def sample_still_caption(rng: np.random.Generator, split: str, key: str) -> Clip:
    """A picture and what it shows; one in eight is empty."""
    scene = None if rng.random() < 0.125 else first_scene(rng, split)
    member = "jpg" if rng.random() < 0.5 else "png"
    sample = {
        "schema": "moss_train/caption@1",
        "id": key,
        "media": [{"id": "i0", "kind": "image", "member": member}],
        "text": _scene_name(scene),
    }
    return Clip(key, sample, Timeline(1.0, ((0.0, scene),), Look.draw(rng)))


def _sequence(rng: np.random.Generator, split: str, seconds: int) -> Timeline:
    """Two to four scenes of at least three seconds, the first one empty in a third of the clips."""
    script = _Script(rng, split)
    script.appear(script.between(2, 3) if rng.random() < 0.33 else 0)
    frame = int(script.segments[-1][0] + 0.5) + script.between(3, 5)
    while frame <= seconds - 2 and len(script.segments) < 4:
        assert script.scene is not None
        script.show(next_scene(rng, script.scene, split, list(ATTRIBUTES))[0], frame)
        frame += script.between(3, 5)
    return Timeline(float(seconds), tuple(script.segments), Look.draw(rng))


def _video(timeline: Timeline) -> dict:
    return {"id": "v0", "kind": "video", "member": "mp4", "duration_s": timeline.duration_s}


def sample_clip_caption(rng: np.random.Generator, split: str, key: str) -> Clip:
    """A clip of 12 to 16 s and the sequence of its scenes."""
    timeline = _sequence(rng, split, int(rng.integers(12, 17)))
    text = ", then ".join(_scene_name(scene) for scene in timeline.scenes())
    sample = {"schema": "moss_train/caption@1", "id": key, "media": [_video(timeline)], "text": text}
    return Clip(key, sample, timeline)


def sample_conversation(rng: np.random.Generator, split: str, key: str) -> Clip:
    """Three to five questions about the first or the last scene of a clip, asked after it."""
    timeline = _sequence(rng, split, STREAM_SECONDS)
    shown = [scene for scene in timeline.scenes() if scene is not None]
    askable = [(attribute, last) for attribute in ATTRIBUTES for last in (True, False)]
    odds = np.array([0.7 if last else 0.3 for _, last in askable])
    messages, types = [], []
    for number in rng.choice(len(askable), int(rng.integers(3, 6)), replace=False, p=odds / odds.sum()):
        attribute, last = askable[number]
        question = QUESTIONS[attribute]
        if not last:
            question = question.replace(" is ", " was ").replace("are", "were").replace("?", " first?")
        placeholder = "" if messages else "<|video|>"
        messages.append({"role": "user", "content": placeholder + question})
        messages.append({"role": "assistant", "content": answer_text(shown[-1 if last else 0], attribute)})
        types.append("last_scene" if last else "first_scene")
    sample = {
        "schema": "moss_train/conversation@1",
        "id": key,
        "media": [_video(timeline)],
        "messages": messages,
        "source_metadata": {"question_types": types},
    }
    return Clip(key, sample, timeline)


def sample_text(rng: np.random.Generator, split: str, key: str) -> Clip:
    """A conversation without any medium."""
    value = str(rng.choice(list(ATTRIBUTES["colour"]) + list(ATTRIBUTES["place"])))
    if value in ATTRIBUTES["colour"]:
        question, answer = f"Is {value} a colour?", "Yes."
    else:
        question, answer = f"Is {value} a colour?", "No."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Clip(key, {"schema": "moss_train/conversation@1", "id": key, "media": [], "messages": messages}, None)


def sample_clip(rng: np.random.Generator, split: str, kind: str = "stream", key: str = "clip") -> Clip:
    """One sample of the world.

    Args:
        rng: the only source of randomness.
        split: "train" or "heldout" (combinations and colour transitions that training never shows).
        kind: one of `KINDS`.
        key: sample key, also the sample's id.

    Raises:
        ValueError: unknown split or kind.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    makers = {
        "still_caption": sample_still_caption,
        "clip_caption": sample_clip_caption,
        "conversation": sample_conversation,
        "text": sample_text,
        "stream": sample_stream,
    }
    if kind not in makers:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    return makers[kind](rng, split, key)
