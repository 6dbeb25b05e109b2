"""The writer that asks a language model behind an OpenAI-compatible endpoint.

The model plans from the whole timeline, but decides what to say from the captions known at that moment alone: no prompt
for an answer holds a later caption. The checks of `dialogue.py` hold for it as for any writer.
"""

from pathlib import Path
from string import Template
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, Field, model_validator

from moss_train.errors import ConfigError
from moss_train.synthesis.captions import Caption
from moss_train.synthesis.chat_client import ChatClient
from moss_train.synthesis.dialogue import Decision, Plan, Question, Situation, Task, WriterFault

SHIPPED_PROMPTS = Path(__file__).with_name("prompts.yaml")
_TEXTS = ("system", "plan", "first", "later")
#: questions that a scenario consists of, where it is more than one
_QUESTIONS_OF = {"interruption": 2, "two_questions": 2}


class PlannedQuestion(BaseModel):
    """One question as the model plans it."""

    t: Annotated[float, Field(allow_inf_nan=False)]
    text: Annotated[str, Field(min_length=1, max_length=400)]
    keep_current: bool = True
    cuts_in: bool = False


class PlannedQuestions(BaseModel):
    """The model's plan of one stream."""

    questions: Annotated[list[PlannedQuestion], Field(min_length=1, max_length=64)]


class FirstAnswer(BaseModel):
    """Silence or the first answer to a question."""

    action: Literal["silence", "answer"]
    text: Annotated[str, Field(max_length=1000)] = ""

    @model_validator(mode="after")
    def _says_something(self) -> "FirstAnswer":
        if self.action == "answer" and not self.text.strip():
            raise ValueError("an answer needs a text")
        return self


class LaterAnswer(BaseModel):
    """Whether the answer that stands still holds, or what does."""

    action: Literal["confirm", "revise"]
    text: Annotated[str, Field(max_length=1000)] = ""

    @model_validator(mode="after")
    def _says_something(self) -> "LaterAnswer":
        if self.action == "revise" and not self.text.strip():
            raise ValueError("a revision needs a text")
        return self


def load_prompts(path: Path) -> dict:
    """The prompts of a file; ConfigError when one is missing or names something that is not filled in."""
    try:
        prompts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"prompts={path}: cannot be read ({error})") from error
    missing = [name for name in (*_TEXTS, "scenarios") if not isinstance(prompts, dict) or not prompts.get(name)]
    if missing:
        raise ConfigError(f"prompts={path}: has no {' and no '.join(missing)}; start from a copy of {SHIPPED_PROMPTS}")
    return prompts


class EndpointWriter:
    """Satisfies the `Writer` protocol."""

    def __init__(self, client: ChatClient, prompts: dict):
        self._client = client
        self._prompts = prompts

    async def plan(self, task: Task) -> Plan:
        scenarios = self._scenarios(task)
        if scenarios == ["silent"]:
            return Plan((), ("silent",))
        watch = task.watch
        number = sum(_QUESTIONS_OF.get(name, 1) for name in scenarios)
        last_s = watch.time(max(0, watch.frames() - 2))
        known = [f"{caption.seen_s:.1f}: {_line(caption)}" for caption in task.timeline.captions]
        text = self._fill(
            "plan",
            captions="\n".join(known),
            start_s=f"{watch.start_s:g}",
            end_s=f"{watch.end_s:g}",
            last_s=f"{last_s:g}",
            number=str(number),
            scenarios="\n".join(f"- {self._prompts['scenarios'].get(name, name)}" for name in scenarios),
        )
        planned = (await self._client.ask(self._messages(text), PlannedQuestions)).questions
        planned.sort(key=lambda question: question.t)
        questions: list[Question] = []
        for one in planned:
            t = min(max(one.t, watch.start_s), last_s)
            if questions and t <= questions[-1].t + 1e-3:
                raise WriterFault("bad_plan", f"two questions at {t:g} s")
            topic = "what is asked"
            questions.append(Question(t, " ".join(one.text.split()), topic, one.keep_current, at_once=one.cuts_in))
        return Plan(tuple(questions), tuple(scenarios))

    def _scenarios(self, task: Task) -> list[str]:
        """The scenarios that the model is asked for, drawn from the mix: one for each stretch of the stream."""
        names = [name for name, share in task.mix.items() if share > 0]
        rounds = max(1, round((task.watch.end_s - task.watch.start_s) / task.question_every_s))
        drawn: list[str] = []
        for _ in range(rounds):
            # a stream in which nobody speaks is one as a whole, one with nothing but such odds too
            open_names = [name for name in names if name != "silent"] if drawn else names
            if not open_names:
                break
            odds = [task.mix[name] for name in open_names]
            drawn.append(str(task.rng.choice(open_names, p=[one / sum(odds) for one in odds])))
            if drawn == ["silent"]:
                break
        return drawn

    async def decide(self, situation: Situation) -> Decision:
        if not situation.seen:
            return Decision("silence")
        captions = "\n".join(map(_line, situation.seen))
        question = situation.question.text
        if situation.said is None:
            first = await self._client.ask(
                self._messages(self._fill("first", captions=captions, question=question)), FirstAnswer
            )
            return Decision(first.action, " ".join(first.text.split()) if first.action == "answer" else "")
        news = "\n".join(map(_line, situation.news))
        text = self._fill("later", captions=captions, news=news, question=question, said=situation.said)
        later = await self._client.ask(self._messages(text), LaterAnswer)
        if later.action == "confirm":
            return Decision("confirm", situation.said, changed="caption")
        return Decision("revise", " ".join(later.text.split()), changed="answer")

    def _fill(self, name: str, **values: str) -> str:
        try:
            return Template(self._prompts[name]).substitute(values)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"prompts: {name} has {error}, which is not filled in there; legal: ${', $'.join(values)}"
            ) from error

    def _messages(self, text: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": self._prompts["system"]}, {"role": "user", "content": text}]


def _line(caption: Caption) -> str:
    return f"[{caption.start_s:.1f} - {caption.end_s:.1f}] {caption.text}"
