"""Timelines of captions for the tests, and what is common to making dialogues of them."""

import asyncio
import json
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from moss_train.data.synthetic.world import SCENARIOS
from moss_train.streams.config import TokenizerConfig
from moss_train.streams.importers.talk import Watch
from moss_train.streams.tokenizer import load_tokenizer
from moss_train.synthesis.captions import Caption, CaptionTimeline, find_changes
from moss_train.synthesis.dialogue import Task
from moss_train.synthesis.emission import Pace
from moss_train.synthesis.ledger import Outcome
from moss_train.synthesis.pipeline import Settings, synthesise
from moss_train.synthesis.rules import RuleWriter
from moss_train.synthesis.sources import Footage

TOKENIZER = load_tokenizer(TokenizerConfig())
MEDIUM = {"id": "v0", "kind": "video", "member": "mp4"}


def timeline(*captions: tuple, end_s: float = 12.0, states: bool = False, key: str = "clip") -> CaptionTimeline:
    """Captions as (start, end, text); states are known at their start, events at their end."""
    made = [Caption(start, end, text, start if states else end) for start, end, text in captions]
    return CaptionTimeline.of(key, end_s, made, states)


def task(of: CaptionTimeline, rate: float = 38.0, fps: float = 1.0, seed: int = 0, spread: float = 0.0) -> Task:
    watch = Watch(fps, of.start_s, of.end_s)
    pace = Pace(watch, TOKENIZER, rate, spread)
    return Task(of, watch, find_changes(of, watch), pace, dict(SCENARIOS), 30.0, np.random.default_rng(seed))


def settings(**changed) -> Settings:
    fields = {
        "fps": 1.0,
        "tokens_per_second": 8.0,
        "rate_spread": 0.0,
        "question_every_s": 30.0,
        "seed": 0,
        "system": None,
        "mix": dict(SCENARIOS),
    }
    return Settings(**(fields | changed))


def outcome_of(of: CaptionTimeline, writer=None, **changed) -> Outcome:
    made = synthesise(Footage(of, MEDIUM, None), writer or RuleWriter(), settings(**changed), TOKENIZER, {})
    return asyncio.run(made)


def sample_of(of: CaptionTimeline, **changed) -> dict | None:
    outcome = outcome_of(of, **changed)
    return None if outcome.sample is None else json.loads(outcome.sample)


@st.composite
def free_timelines(draw) -> CaptionTimeline:
    """Overlapping captions in any order, in which every caption has words that no other has."""
    end_s = draw(st.floats(3.0, 90.0))
    captions = []
    for number in range(draw(st.integers(1, 8))):
        start_s = draw(st.floats(0.0, end_s - 1.0))
        length_s = draw(st.floats(0.0, end_s - start_s))
        subject = draw(
            st.sampled_from(["A man", "The woman", "She", "He", "People", "Two dogs", "The crowd", "Zoltan"])
        )
        verb = draw(st.sampled_from(["lifts", "is seen with", "walks to", "drop"]))
        # no two of these share a stem
        own = [f"{first}{'abcdefgh'[number]}{second}" for first, second in (("qu", "mol"), ("vex", "tag"))]
        text = f"{subject} {verb} the {own[0]} and {number + 20} {own[1]}"
        captions.append((start_s, min(end_s, start_s + length_s), text + draw(st.sampled_from([".", "", "!"]))))
    return timeline(*captions, end_s=end_s)


@st.composite
def state_timelines(draw) -> CaptionTimeline:
    """Structured captions one after another, with gaps, changing at any time."""
    end_s = float(draw(st.integers(4, 40)))
    captions, now_s = [], draw(st.floats(0.0, 5.0))
    while now_s < end_s - 0.1 and len(captions) < 12:
        until_s = min(end_s, now_s + draw(st.floats(0.3, 8.0)))
        count = draw(st.sampled_from(["one", "two", "three"]))
        colour = draw(st.sampled_from(["red", "green", "blue"]))
        place = draw(st.sampled_from(["on the left", "at the top"]))
        captions.append((now_s, until_s, f"{count} {colour} block{'' if count == 'one' else 's'} {place}"))
        now_s = until_s + draw(st.sampled_from([0.0, 0.0, 2.5]))
    return timeline(*captions, end_s=end_s, states=True)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
