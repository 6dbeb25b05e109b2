"""Conversations answered offline: the batched decoder against plain greedy decoding, one whole pass a token."""

import pytest
import torch
from scripted_model import shipped_tokenizer
from small_model import SIZE, small_model
from world_corpus import WorldCorpus

from moss_train.data.collate import collate
from moss_train.data.synthetic.judge import WorldJudge
from moss_train.errors import DataError, SampleError
from moss_train.evaluate.config import EvaluationConfig
from moss_train.evaluate.decoder import forbidden_tokens
from moss_train.evaluate.judges import TextJudge
from moss_train.evaluate.offline import (
    OfflineAnswer,
    OfflineRun,
    answers_of,
    offline_figures,
    prepare_conversations,
    run_conversations,
    write_answers,
)
from moss_train.evaluate.prepared import FrameCache, Share
from moss_train.parallel import groups
from moss_train.streams.compiled import FrameRequest
from moss_train.streams.config import CompilerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.row import RowWriter
from moss_train.streams.schema import parse_sample
from moss_train.streams.sight import Sight

TOKENIZER = shipped_tokenizer()
COMPILER = CompilerConfig()
TOKENS = 6


@pytest.fixture(scope="module")
def model():
    yield small_model(TOKENIZER, silence=2.0)
    groups.shutdown()


@pytest.fixture(scope="module")
def prepared():
    return prepare_conversations(WorldCorpus(20, SIZE), TOKENIZER, COMPILER)


def greedily(model, conversation, frames_FCHW, compiler) -> list[tuple[str, bool]]:
    """The answers, each token from a whole forward pass over all that was fed so far, and whether silence was the most
    probable beginning."""
    special = TOKENIZER.special
    stops = {special.silence, special.end_of_turn, special.end_of_text}
    never = [token for token in forbidden_tokens(TOKENIZER) if token not in stops]
    ids: list[int] = []
    answers, silent = [], []
    for prompt in conversation.prompts:
        ids += prompt
        said: list[int] = []
        while len(said) < TOKENS:
            writer = RowWriter(TOKENIZER)
            writer.untrained(ids)
            shown = ids.count(special.anchor)
            sees_all = Sight(positions=compiler.positions)  # windows are for streams
            row = writer.compiled("k", "conversation", conversation.compiled.frames[:shown], compiler, sees_all)
            with torch.no_grad():
                logits_V = model(collate([[(row, frames_FCHW[:shown])]]))[-1, 0, : TOKENIZER.vocabulary_size]
            logits_V[never] = -torch.inf
            if not said:
                silent.append(int(logits_V.argmax()) in stops)
                logits_V[sorted(stops)] = -torch.inf
            token = int(logits_V.argmax())
            if token in stops:
                break
            said.append(token)
            ids.append(token)
        answers.append(TOKENIZER.decode(said))
    return list(zip(answers, silent, strict=True))


@pytest.mark.parametrize("compiler", [COMPILER, CompilerConfig(window=3, sinks=1, positions="decoupled")])
def test_batched_answers_are_the_greedy_ones(model, compiler):
    prepared = prepare_conversations(WorldCorpus(20, SIZE), TOKENIZER, compiler)
    run = run_conversations(model, prepared, TOKENIZER, EvaluationConfig(batch_streams=4, answer_tokens=TOKENS))
    said = {(answer.key, answer.number): (answer.said, answer.silent) for answer in run.answers}
    assert len(prepared.items) == 5 and len(said) == sum(len(item.prompts) for item in prepared.items) >= 15
    for item in prepared.items:
        expected = greedily(model, item, prepared.frames_of(item.compiled.key), compiler)
        assert [said[item.compiled.key, turn] for turn in range(len(expected))] == expected
    assert len({len(TOKENIZER.encode(text)) for text, _ in said.values()}) > 2, "answers of several lengths"


def test_what_is_asked_is_what_was_compiled(prepared):
    conversation = prepared.items[0]
    ids = conversation.compiled.ids.tolist()
    fed = []
    for prompt, answer in zip(conversation.prompts, conversation.answers, strict=True):
        fed += prompt + TOKENIZER.encode(answer.reference)
    assert fed + [TOKENIZER.special.end_of_turn] == ids


def test_shares_add_up(model, prepared):
    config = EvaluationConfig(batch_streams=4, answer_tokens=TOKENS)
    whole = run_conversations(model, prepared, TOKENIZER, config)
    parts = [run_conversations(model, prepared, TOKENIZER, config, Share(k, 3)) for k in range(3)]
    sent = [OfflineRun.from_json(part.to_json()) for part in parts]
    assert all(part.answers for part in sent)
    together, skipped = answers_of(prepared, sent)
    assert together == answers_of(prepared, [whole])[0] and skipped == {}
    keys = [item.compiled.key for item in prepared.items]
    assert list(dict.fromkeys(answer.key for answer in together)) == keys
    nothing = run_conversations(model, prepared, TOKENIZER, config, Share(9, 10))
    nothing.skipped["k"] = "is damaged"
    with pytest.raises(DataError, match="not one question can be asked; the first, 'k': is damaged"):
        answers_of(prepared, [nothing])


def conversation(messages, **more):
    sample = {"schema": "moss_train/conversation@1", "id": "c", "media": [], "messages": messages} | more
    return parse_sample(sample, "c")


class OneSample:
    def __init__(self, sample):
        self._sample = sample

    def __len__(self):
        return 1

    def key(self, number):
        return "c"

    def sample(self, number):
        return self._sample

    def media_info(self, number):
        return {"v": MediaInfo(4.0, 4.0, 16), "i": MediaInfo(0.0, None, None)}

    def frames(self, number, requests):
        return torch.zeros((len(requests), 3, SIZE, SIZE), dtype=torch.uint8)


TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two.", "train": False},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
]


def test_untrained_answers_are_context():
    (item,) = prepare_conversations(OneSample(conversation(TALK)), TOKENIZER, COMPILER).items
    ((prompt,), (answer,)) = item.prompts, item.answers
    assert (answer.question, answer.reference, answer.number) == ("Three?", "Four.", 1)
    assert (
        TOKENIZER.encode("Two.") == prompt[prompt.index(TOKENIZER.encode("Two.")[0]) :][: len(TOKENIZER.encode("Two."))]
    )


def test_question_types_and_what_cannot_be_asked():
    types = {"source_metadata": {"question_types": ["a", "b"]}}
    (item,) = prepare_conversations(OneSample(conversation(TALK, **types)), TOKENIZER, COMPILER).items
    assert item.answers[0].kind == "b"
    for sample, reason in (
        (conversation(TALK, source_metadata={"question_types": ["a"]}), "question_types: give one for each"),
        (conversation([TALK[0], TALK[1]]), "every answer is marked untrained"),
        (
            conversation(
                [TALK[0], {"role": "assistant", "content": "<|image|>"}],
                media=[{"id": "i", "kind": "image", "member": "jpg"}],
            ),
            "shows media",
        ),
    ):
        skipped = prepare_conversations(OneSample(sample), TOKENIZER, COMPILER).skipped
        assert reason in skipped["c"]
    streams = WorldCorpus(2, SIZE)
    with pytest.raises(DataError, match="no conversation"):
        prepare_conversations(streams, TOKENIZER, COMPILER)


def test_accuracy_by_type(tmp_path):
    rows = [
        ("colour", "red", "It is red."),
        ("colour", "blue", "It is red."),
        ("claim", "Yes.", "Yes."),
        (None, "", "No."),
    ]
    answers = [OfflineAnswer("k", k, kind, "?", reference, said) for k, (kind, said, reference) in enumerate(rows)]
    figures = offline_figures(answers, WorldJudge())
    assert figures["offline_accuracy"] == 0.5 and figures["n_offline"] == 4
    assert figures["offline_accuracy.colour"] == 0.5 and figures["offline_accuracy.claim"] == 1.0
    write_answers(answers, lambda one: TextJudge().same_answer(one.said, one.reference), tmp_path / "answers.jsonl")
    assert (tmp_path / "answers.jsonl").read_text().count('"right": true') == 1


class Counting(WorldCorpus):
    decoded = 0

    def frames(self, number, requests):
        self.decoded += 1
        if self.key(number) == "heldout-0001":
            raise SampleError("heldout-0001", "is damaged")
        return super().frames(number, requests)


def test_frames_are_decoded_once_as_far_as_they_fit():
    corpus = Counting(4, SIZE)
    requests = tuple(FrameRequest("v0", float(second)) for second in range(12))
    size_mb = 12 * 3 * SIZE * SIZE / 1e6
    cache = FrameCache(corpus, 2.5 * size_mb)
    first = [cache.frames(number, requests) for number in (0, 2, 3)]
    again = [cache.frames(number, requests) for number in (0, 2, 3)]
    assert corpus.decoded == 3 + 1  # the third did not fit
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    cache.frames(0, requests[::-1][::-1])
    assert corpus.decoded == 4
    for _ in range(2):
        with pytest.raises(SampleError, match="damaged"):
            cache.frames(1, requests)
