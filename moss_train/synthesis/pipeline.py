"""One video through the pipeline: plan, dialogue, checks, sample.

    timeline of captions → change detector → question planner → answer policy → token rate → assembly → checks

A question that breaks a rule is taken out and the dialogue is held again without it, since what it would have cut, or
kept up to date, changes with it. A sample is a function of (seed, key, captions, settings) and of what the writer says.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from moss_train.errors import SampleError
from moss_train.streams.importers.talk import Watch
from moss_train.streams.schema import dump_sample
from moss_train.streams.tokenizer import StreamTokenizer
from moss_train.synthesis.assembly import assemble
from moss_train.synthesis.captions import find_changes
from moss_train.synthesis.dialogue import Asked, Plan, Rejected, Rejection, Task, Writer, WriterFault, hold_dialogue
from moss_train.synthesis.emission import Pace
from moss_train.synthesis.ledger import Outcome
from moss_train.synthesis.sources import Footage


@dataclass(frozen=True)
class Settings:
    """What shapes every sample, beside its captions."""

    fps: float
    tokens_per_second: float
    rate_spread: float
    question_every_s: float
    seed: int
    system: str | None
    mix: dict[str, float] = field(default_factory=dict)


async def synthesise(
    footage: Footage, writer: Writer, settings: Settings, tokenizer: StreamTokenizer, made_by: dict
) -> Outcome:
    """The stream of one video, or why it gives none."""
    task = _task(footage, settings, tokenizer)
    rejections: list[Rejection] = []
    plan = Plan((), ())
    dialogue: list[Asked] = []
    try:
        if not task.changes:
            raise WriterFault("no_captions", "no caption becomes known before the last frame")
        plan = await writer.plan(task)
        if not plan.questions and plan.scenario != ("silent",):
            raise WriterFault("no_question", "the timeline has no room for any scenario of the mix")
        dialogue = await _dialogue(task, plan, writer, rejections)
        sample = assemble(task, dialogue, plan.scenario, footage.medium, settings.system, made_by)
    except WriterFault as fault:
        rejections.append(Rejection("video", fault.reason, str(fault)))
    except SampleError as error:
        rejections.append(Rejection("video", "does_not_compile", error.reason))
    else:
        return Outcome(task.timeline.key, dump_sample(sample), tuple(rejections), _counts(plan, dialogue))
    return Outcome(task.timeline.key, None, tuple(rejections), {"planned": len(plan.questions)})


def _task(footage: Footage, settings: Settings, tokenizer: StreamTokenizer) -> Task:
    timeline = footage.timeline
    watch = Watch(settings.fps, timeline.start_s, timeline.end_s)
    name = f"{settings.seed}/{timeline.key}"
    rng = np.random.default_rng(np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint64))
    pace = Pace(watch, tokenizer, settings.tokens_per_second, settings.rate_spread, name)
    return Task(timeline, watch, find_changes(timeline, watch), pace, settings.mix, settings.question_every_s, rng)


async def _dialogue(task: Task, plan: Plan, writer: Writer, rejections: list[Rejection]) -> list[Asked]:
    """The dialogue of the questions that may stay; the others are added to `rejections`."""
    questions = plan.questions
    while True:
        try:
            return await hold_dialogue(task, questions, writer)
        except Rejected as rejected:
            rejections.append(rejected.rejection)
            questions = questions[: rejected.number] + questions[rejected.number + 1 :]
            if not questions:
                raise WriterFault("nothing_left", "none of its questions could stay") from None


def _counts(plan: Plan, dialogue: list[Asked]) -> dict[str, int]:
    actions = [turn.decision.action for asked in dialogue for turn in asked.turns]
    return {
        "planned": len(plan.questions),
        "questions": len(dialogue),
        "answers": actions.count("answer"),
        "revisions": actions.count("revise"),
        "confirmations": actions.count("confirm"),
        "interruptions": sum(asked.cuts for asked in dialogue),
        "silent": int(not dialogue),
    }
