"""Questions about media that were seen whole: conversations answered by greedy decoding on key-value caches, batched.

Each conversation is a row. Its first prompt, media included, is fed and answered, then the next one, so that the model
hears its own answers, as in use. An answer ends with the end of the turn or, as a model learns it in the real-time
stage, with silence. It cannot begin with either: no frame will come for which a model that was taught to wait could
wait. That it would rather have been silent is counted.

Shape suffixes: R rows (conversations), L tokens fed at once, V vocabulary, F frames of a row, N frames of all rows, C
colour channels, H, W pixels.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moss_train.errors import SampleError
from moss_train.evaluate.config import EvaluationConfig
from moss_train.evaluate.decoder import device_of, forbidden_tokens
from moss_train.evaluate.feeding import Waiting, feed
from moss_train.evaluate.judges import Judge
from moss_train.evaluate.metrics import OFFLINE, OFFLINE_SILENT
from moss_train.evaluate.metrics.replies import mean
from moss_train.evaluate.prepared import Corpus, FrameCache, PreparedCorpus, Share, prepare
from moss_train.evaluate.runner import evaluating
from moss_train.parallel.phases import beat
from moss_train.streams.compiled import CompiledStream
from moss_train.streams.config import CompilerConfig
from moss_train.streams.media import PLACEHOLDERS
from moss_train.streams.schema import ConversationSample
from moss_train.streams.sight import Sight
from moss_train.streams.template import TurnTemplate
from moss_train.streams.tokenizer import StreamTokenizer

_FRAMES_AT_ONCE = 256  #: encoded in one go


@dataclass(frozen=True)
class OfflineAnswer:
    """One answer of a conversation. Plain data."""

    key: str
    number: int  #: of the exchange in its conversation
    kind: str | None  #: of the question, where the sample's `source_metadata["question_types"]` tells
    question: str
    reference: str
    said: str = ""
    silent: bool = False  #: the most probable first token was silence, or the end of the turn


@dataclass
class OfflineRun:
    """What one process found about its share of the conversations."""

    answers: list[OfflineAnswer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"answers": [vars(answer) for answer in self.answers], "skipped": self.skipped}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "OfflineRun":
        return cls([OfflineAnswer(**answer) for answer in data["answers"]], data["skipped"])


@dataclass(frozen=True)
class PreparedConversation:
    """One conversation before its pictures are read."""

    number: int
    compiled: CompiledStream
    prompts: tuple[list[int], ...]  #: what is fed before each answer, anchors included
    answers: tuple[OfflineAnswer, ...]  #: one a prompt, nothing said yet

    @property
    def length(self) -> tuple[int, ...]:
        return len(self.compiled.frames), len(self.compiled.ids)


def prepare_conversations(
    corpus: Corpus,
    tokenizer: StreamTokenizer,
    compiler: CompilerConfig,
    limit: int | None = None,
    cache: FrameCache | None = None,
    cache_mb: float = 0,
) -> PreparedCorpus[PreparedConversation]:
    """The conversations of a corpus, see `prepared.prepare`. What an untrained message says is context, not asked
    for."""

    def make(
        sample: ConversationSample, number: int, compiled: CompiledStream, compiler: CompilerConfig
    ) -> PreparedConversation:
        return _conversation(sample, number, compiled, tokenizer)

    what = "conversation (schema moss_train/conversation@1)"
    return prepare(corpus, tokenizer, compiler, ConversationSample, make, what, limit, cache, cache_mb)


def _conversation(
    sample: ConversationSample, number: int, compiled: CompiledStream, tokenizer: StreamTokenizer
) -> PreparedConversation:
    ids, special = compiled.ids.tolist(), tokenizer.special
    header = TurnTemplate(tokenizer).end_user()  # special tokens are in it, which no text can hold
    places = [at for at in range(len(ids)) if ids[at : at + len(header)] == header]
    pairs = list(zip(sample.messages[::2], sample.messages[1::2], strict=True))
    kinds = (sample.source_metadata or {}).get("question_types") or [None] * len(pairs)
    if len(places) != len(pairs) or len(kinds) != len(pairs):
        raise SampleError(sample.key, "source_metadata.question_types: give one for each answer")
    prompts, answers, begin = [], [], 0
    for turn, ((user, assistant), place) in enumerate(zip(pairs, places, strict=True)):
        if any(placeholder in assistant.content for placeholder in PLACEHOLDERS.values()):
            raise SampleError(sample.key, f"messages[{2 * turn + 1}]: an answer that shows media cannot be asked for")
        if not assistant.train:
            continue
        end = place + len(header)
        prompts.append(ids[begin:end])
        begin = ids.index(special.end_of_turn, end)
        answers.append(OfflineAnswer(sample.key, turn, kinds[turn], user.content, assistant.content))
    if not answers:
        raise SampleError(sample.key, "messages: every answer is marked untrained, so there is none to ask for")
    return PreparedConversation(number, compiled, tuple(prompts), tuple(answers))


def run_conversations(
    model: Any,
    prepared: PreparedCorpus[PreparedConversation],
    tokenizer: StreamTokenizer,
    config: EvaluationConfig,
    share: Share | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> OfflineRun:
    """Have a share of the conversations answered by `model`, which is put into evaluation mode and back. `group` as in
    `run_streams`: who runs them in lockstep, with a part of the model each."""
    run = OfflineRun()
    with evaluating(model):
        for conversations, frames in prepared.batches(
            share or Share(), config.batch_streams, run.skipped, group, on_progress
        ):
            run.answers += _answered(model, conversations, frames, tokenizer, prepared.compiler, config.answer_tokens)
    return run


def answers_of(
    prepared: PreparedCorpus[PreparedConversation], runs: Sequence[OfflineRun]
) -> tuple[list[OfflineAnswer], dict[str, str]]:
    """The answers of all shares in the order of the corpus, and key → why a conversation was left out.

    Raises DataError when not one question could be asked.
    """
    place = {item.compiled.key: number for number, item in enumerate(prepared.items)}
    answers = sorted((answer for run in runs for answer in run.answers), key=lambda one: (place[one.key], one.number))
    return answers, prepared.left_out(runs, None if answers else "not one question can be asked")


def offline_figures(answers: Sequence[OfflineAnswer], judge: Judge) -> dict[str, float]:
    """`offline_accuracy`: the share of answers that the judge takes for the reference's, `offline_accuracy.<kind>` of
    the questions of a kind; `offline_silent_rate`: of those to which the model would rather have been silent; and
    `n_offline`. NaN without answers."""
    right = [(answer.kind, judge.same_answer(answer.said, answer.reference)) for answer in answers]
    kinds = sorted({kind for kind, _ in right if kind is not None})
    silent = mean([answer.silent for answer in answers])
    figures = {OFFLINE: mean([ok for _, ok in right]), OFFLINE_SILENT: silent, "n_offline": len(right)}
    return figures | {f"{OFFLINE}.{kind}": mean([ok for own, ok in right if own == kind]) for kind in kinds}


def write_answers(answers: Sequence[OfflineAnswer], is_right: Callable[[OfflineAnswer], bool], path: Path) -> None:
    """One answer a line, and whether it is right; whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for answer in answers:
            record = vars(answer) | {"right": is_right(answer)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def _answered(
    model: Any,
    conversations: Sequence[PreparedConversation],
    frames_FCHW: Sequence[torch.Tensor],
    tokenizer: StreamTokenizer,
    compiler: CompilerConfig,
    answer_tokens: int,
) -> list[OfflineAnswer]:
    prompts = [conversation.prompts for conversation in conversations]
    room = max(sum(map(len, own)) + answer_tokens * len(own) for own in prompts)
    decoder = _Decoder(model, tokenizer, compiler, len(prompts), room, max(1, *map(len, frames_FCHW)), answer_tokens)
    said: list[list[OfflineAnswer]] = [[] for _ in prompts]
    shown = [0] * len(prompts)
    for turn in range(max(map(len, prompts))):
        asked = {row: own[turn] for row, own in enumerate(prompts) if turn < len(own)}
        pictures = {}
        for row, prompt in asked.items():
            count = prompt.count(tokenizer.special.anchor)
            pictures[row] = frames_FCHW[row][shown[row] : shown[row] + count]
            shown[row] += count
        for row, (ids, silent) in decoder.answer(asked, pictures).items():
            blank = conversations[row].answers[turn]
            said[row].append(replace(blank, said=tokenizer.decode(ids), silent=silent))
    return [answer for own in said for answer in own]


class _Decoder:
    """Rows of text and frames that grow by a prompt and an answer at a time."""

    def __init__(
        self,
        model: Any,
        tokenizer: StreamTokenizer,
        compiler: CompilerConfig,
        rows: int,
        max_tokens: int,
        max_frames: int,
        answer_tokens: int,
    ):
        self._model, self._answer_tokens = model, answer_tokens
        self._special, self._vocabulary = tokenizer.special, tokenizer.vocabulary_size
        self._sight = Sight.whole(compiler)
        self._state = model.start_streams(rows, max_tokens, max_frames)
        self._device = device_of(model)
        special = self._special
        self._stops = {special.silence, special.end_of_turn, special.end_of_text}
        self._forbidden = torch.tensor(
            [token for token in forbidden_tokens(tokenizer) if token not in self._stops], device=self._device
        )
        self._pending: list[list[int]] = [[] for _ in range(rows)]
        self._length, self._frames = [0] * rows, [0] * rows

    @torch.inference_mode()
    def answer(
        self, prompts: dict[int, list[int]], frames_FCHW: dict[int, torch.Tensor]
    ) -> dict[int, tuple[list[int], bool]]:
        """Feed each row its prompt with its frames, uint8 [F, C, H, W], as many as it has anchors. The answers' ids, at
        least one each, and whether the model would rather have been silent."""
        for row, prompt in prompts.items():
            self._pending[row] += prompt
        self._add_frames({row: frames for row, frames in frames_FCHW.items() if len(frames)})
        answers: dict[int, list[int]] = {row: [] for row in prompts}
        silent: dict[int, bool] = {}
        asking = list(prompts)
        while asking:
            beat()
            logits_RV = self._feed(asking)[:, : self._vocabulary].float().index_fill(1, self._forbidden, -torch.inf)
            if not silent:
                first = logits_RV.argmax(-1).tolist()
                silent = {row: token in self._stops for row, token in zip(asking, first, strict=True)}
                logits_RV[:, sorted(self._stops)] = -torch.inf
            going_on = []
            for row, token in zip(asking, logits_RV.argmax(-1).tolist(), strict=True):
                if token in self._stops:
                    continue
                answers[row].append(token)
                self._pending[row].append(token)
                if len(answers[row]) < self._answer_tokens:
                    going_on.append(row)
            asking = going_on
        return {row: (ids, silent[row]) for row, ids in answers.items()}

    def _add_frames(self, frames_FCHW: dict[int, torch.Tensor]) -> None:
        """Before the text that shows them is fed: none of its tokens sees a frame whose anchor is behind it."""
        rows: list[int] = []
        positions: list[int] = []
        for row, frames in frames_FCHW.items():
            is_anchor = np.array(self._pending[row]) == self._special.anchor
            places = self._sight.places(is_anchor, self._length[row], self._frames[row])
            rows += [row] * len(frames)
            positions += places.frame_positions.tolist()
            self._frames[row] += len(frames)
        if not rows:
            return
        pictures_NCHW = torch.cat(list(frames_FCHW.values()))
        for start in range(0, len(rows), _FRAMES_AT_ONCE):
            beat()
            part = slice(start, start + _FRAMES_AT_ONCE)
            self._model.add_frames(
                self._state,
                pictures_NCHW[part].to(self._device),
                torch.tensor(rows[part], device=self._device),
                torch.tensor(positions[part], device=self._device),
            )

    def _feed(self, rows: list[int]) -> torch.Tensor:
        """Feed what waits in `rows`; the logits [len(rows), V] after each row's last token."""
        waiting = {row: Waiting(self._pending[row], self._length[row], self._frames[row]) for row in rows}
        anchor, count = self._special.anchor, len(self._pending)
        logits_RV = feed(self._model, self._state, self._sight, anchor, waiting, count, self._device)
        for row in rows:
            self._length[row] += len(self._pending[row])
            self._pending[row] = []
        return logits_RV[torch.tensor(rows, device=self._device)]
