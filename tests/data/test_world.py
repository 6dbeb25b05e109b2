"""The procedural world: what a clip shows, says and promises to the evaluation."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_train.data.synthetic import scenes
from moss_train.data.synthetic.judge import WorldJudge
from moss_train.data.synthetic.render import render_sample
from moss_train.data.synthetic.world import KINDS, QUESTIONS, SCENARIOS, STREAM_SECONDS, sample_clip, sample_stream
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import StreamSample, parse_sample
from moss_train.streams.tokenizer import load_tokenizer

seeds = st.integers(0, 2**32 - 1)
splits = st.sampled_from(scenes.SPLITS)


def scenes_of(clip):
    return [scene for scene in clip.timeline.scenes() if scene is not None]


def test_splits_share_no_combination_but_every_pair_of_values():
    train, heldout = (set(scenes.SCENES[split]) for split in scenes.SPLITS)
    assert train | heldout == set(scenes.ALL_SCENES) and not train & heldout
    names = list(scenes.ATTRIBUTES)
    for first, second in [(0, 1), (0, 2), (1, 2)]:
        pairs = {(s.value(names[first]), s.value(names[second])) for s in train}
        assert len(pairs) == len(scenes.ATTRIBUTES[names[first]]) * len(scenes.ATTRIBUTES[names[second]])
        most = len(scenes.ATTRIBUTES[names[3 - first - second]])
        for pair in pairs:
            together = [s for s in train if (s.value(names[first]), s.value(names[second])) == pair]
            assert len(together) >= most - 1, pair
    for attribute in names:
        assert all(scenes.neighbours(scene, attribute, "heldout") for scene in scenes.ALL_SCENES)
        assert all(scenes.neighbours(scene, attribute, "train") for scene in train)


@given(seeds, splits, st.sampled_from(KINDS))
@settings(max_examples=150, deadline=None)
def test_every_sample_parses_and_stays_in_its_split(seed, split, kind):
    clip = sample_clip(np.random.default_rng(seed), split, kind, "k1")
    sample = parse_sample(json.dumps(clip.sample), "k1")
    assert sample.id == "k1"
    if clip.timeline is None:
        assert not sample.media
        return
    shown = clip.timeline.scenes()
    unseen = [scene is not None and scenes.is_heldout(scene) for scene in shown]
    empty = all(scene is None for scene in shown)
    assert any(unseen) or empty if split == "heldout" else not any(unseen)
    starts = [start for start, _ in clip.timeline.segments]
    assert starts[0] == 0.0 and starts == sorted(starts) and all(start % 1 == 0.5 for start in starts[1:])
    for before, after in zip(shown, shown[1:], strict=False):
        if before is None or after is None:
            continue
        changed = [name for name in scenes.ATTRIBUTES if before.value(name) != after.value(name)]
        assert len(changed) == 1


@given(seeds, splits, st.sampled_from(list(SCENARIOS)))
@settings(max_examples=150, deadline=None)
def test_what_is_said_is_what_is_shown(seed, split, scenario):
    clip = sample_stream(np.random.default_rng(seed), split, "k1", scenario)
    facts, timeline = clip.sample["source_metadata"], clip.timeline
    texts = {event["id"]: event for event in clip.sample["events"]}
    judge = WorldJudge()
    for question in facts["questions"]:
        reply, asked = texts[question["answer_id"]], texts[question["id"]]
        assert asked["text"].endswith(QUESTIONS[question["attribute"]]) and asked["t"] == question["asked_t"]
        assert reply["t"] == question["answer_t"] >= max(question["evidence_t"], question["asked_t"])
        evidence = timeline.scene_at(question["evidence_t"])
        assert judge.same_answer(question["answer"], evidence.value(question["attribute"]))
        if scenario == "before":
            assert timeline.scene_at(question["asked_t"]) is None and reply["t"] == question["evidence_t"]
            assert timeline.scene_at(question["evidence_t"] - 1) is None  # nothing could be known a frame earlier
        if scenario == "after":
            assert timeline.scene_at(question["asked_t"]) is None and timeline.scene_at(reply["t"]) is None
    for change in facts["revisions"] + facts["confirmations"]:
        before, after = timeline.scene_at(change["t"] - 1), timeline.scene_at(change["t"])
        assert before.value(change["attribute"]) != after.value(change["attribute"])
    for revision in facts["revisions"]:
        after = timeline.scene_at(revision["t"])
        assert judge.same_answer(revision["new"], after.value(revision["attribute"]))
        assert not judge.same_answer(revision["old"], revision["new"])
        assert texts[revision["id"]]["supersedes"] == revision["supersedes"]
    asked_attributes = {question["id"]: question["attribute"] for question in facts["questions"]}
    for confirmation in facts["confirmations"]:
        after = timeline.scene_at(confirmation["t"])
        assert judge.same_answer(confirmation["standing"], after.value(asked_attributes[confirmation["question"]]))
        (event,) = [event for event in clip.sample["events"] if event["t"] == confirmation["t"]]
        assert event["kind"] == "confirm" and judge.same_answer(
            texts[event["confirms"]]["text"], confirmation["standing"]
        )
    confirms = [event for event in clip.sample["events"] if event.get("kind") == "confirm"]
    assert len(confirms) == len(facts["confirmations"])
    assert isinstance(parse_sample(clip.sample, "k1"), StreamSample)


def test_the_last_word_is_true_at_the_end():
    """No change after an answer goes without a revision: what was said last holds for the last frame."""
    for number in range(200):
        clip = render_sample(3, "heldout", "realtime", number)
        facts = clip.sample["source_metadata"]
        if not facts["questions"] or facts["scenario"] == ["after"]:
            continue
        standing = facts["questions"][-1]
        said = [
            e["text"] for e in clip.sample["events"] if e["role"] == "assistant" and e.get("reply_to") == standing["id"]
        ]
        shown = clip.timeline.scene_at(STREAM_SECONDS - 1)
        assert WorldJudge().same_answer(said[-1], shown.value(standing["attribute"]))


def test_an_interruption_cuts_a_running_reply_and_is_answered_at_once():
    tokenizer = load_tokenizer(TokenizerConfig())
    for seed in range(20):
        clip = sample_stream(np.random.default_rng(seed), "train", "k1", "interruption")
        config = CompilerConfig(tokens_per_second=8.0)
        stream = compile_sample(
            parse_sample(clip.sample, "k1"), {"v0": MediaInfo(12.0, 4.0, 48)}, tokenizer, config, None
        )
        cut = [slot for slot in stream.slots if slot.event_id == "a1"]
        answer = next(slot for slot in stream.slots if slot.event_id == "a2")
        assert not cut[-1].ends and answer.frame == -1 and answer.ends


def test_mixture_of_320_heldout_streams_is_enough_to_score():
    facts = [render_sample(0, "heldout", "realtime", n).sample["source_metadata"] for n in range(320)]
    questions = [question for fact in facts for question in fact["questions"]]
    assert sum(len(fact["revisions"]) for fact in facts) >= 110
    assert sum(len(fact["confirmations"]) for fact in facts) >= 110
    assert sum(question["evidence_t"] > question["asked_t"] for question in questions) >= 110
    assert {name for fact in facts for name in fact["scenario"]} == set(SCENARIOS)


def test_frames_change_with_the_scene_only():
    clip = sample_clip(np.random.default_rng(5), "train", "clip_caption")
    frames = clip.frames(fps=2.0, size=56)
    assert frames.shape == (clip.timeline.duration_s * 2, 56, 56, 3) and frames.dtype == np.uint8
    changed = [bool((frames[k] != frames[k - 1]).any()) for k in range(1, len(frames))]
    assert sum(changed) == len(clip.timeline.segments) - 1
    assert clip.frames(1.0, 50).shape[1:] == (50, 50, 3)


@pytest.mark.parametrize(
    ("said", "reference", "same"),
    [
        ("Now blue.", "Blue.", True),
        ("It is blue", "Now blue.", True),
        ("There are 2 blocks.", "Two.", True),
        ("On the left", "Left.", True),
        ("Red.", "Blue.", False),
        ("Red blue.", "Blue.", False),
        ("Not blue.", "Blue.", False),
        ("Blue blue.", "Blue.", False),
        ("", "Blue.", False),
        ("", "", False),
        ("Yes!", "yes", True),
        ("Blue.", "Yes.", False),
    ],
)
def test_judge(said, reference, same):
    assert WorldJudge().same_answer(said, reference) is same


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="split"):
        sample_clip(np.random.default_rng(0), "test")
    with pytest.raises(ValueError, match="kind"):
        sample_clip(np.random.default_rng(0), "train", "film")
