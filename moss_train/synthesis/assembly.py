"""A dialogue as a stream sample: events with their links, and what the evaluation needs to score them.

`source_metadata` holds `scenario`, `questions`, `revisions` and `confirmations` as `data/synthetic/world.py` describes
them, and `synthesis`: how the sample was made.
"""

from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig
from moss_train.streams.importers.talk import Watch
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import StreamSample, parse_sample
from moss_train.synthesis.dialogue import Asked, Task, Turn


def assemble(
    task: Task, dialogue: list[Asked], scenario: tuple[str, ...], medium: dict, system: str | None, made_by: dict
) -> StreamSample:
    """The checked sample. Raises SampleError when it breaks the schema or does not compile at the task's rate."""
    writing = _Writing()
    for asked, following in zip(dialogue, [*dialogue[1:], None], strict=False):
        writing.add(asked, cut=following is not None and following.cuts)
    watch, key = task.watch, task.timeline.key
    data = {
        "schema": "moss_train/stream@1",
        "id": key,
        "media": [medium],
        "sampling": watch.sampling(),
        **({"system": system} if system else {}),
        "silence": "implicit",
        "events": writing.events,
        "source_metadata": {
            "scenario": list(scenario),
            "questions": writing.questions,
            "revisions": writing.revisions,
            "confirmations": writing.confirmations,
            "synthesis": made_by,
        },
    }
    sample = parse_sample(data, key)
    assert isinstance(sample, StreamSample)
    _check_compiles(task, sample, watch)
    return sample


def _check_compiles(task: Task, sample: StreamSample, watch: Watch) -> None:
    """The compiler lays the replies into slots as a recipe of this rate and tokenizer will; no two may run at once."""
    config = CompilerConfig(
        fps=watch.fps, tokens_per_second=task.pace.tokens_per_second, max_frames=max(1, watch.frames())
    )
    info = MediaInfo(watch.end_s, watch.fps)
    compile_sample(sample, {sample.media[0].id: info}, task.pace.tokenizer, config)


class _Writing:
    """Events and metadata, while they are written in the order of time."""

    def __init__(self) -> None:
        self.events: list[dict] = []
        self.questions: list[dict] = []
        self.revisions: list[dict] = []
        self.confirmations: list[dict] = []
        self._replies = 0

    def add(self, asked: Asked, cut: bool) -> None:
        """`cut`: the last reply is broken off by the next question, so that nothing can be said of its correctness."""
        question = asked.question
        name = f"q{sum(event['role'] == 'user' for event in self.events) + 1}"
        event = {"id": name, "t": question.t, "role": "user"}
        if asked.cuts:
            event["kind"] = "interrupt"
        self.events.append(event | {"text": question.cut_in * asked.cuts + question.text})
        replies = [turn.utterance for turn in asked.turns if turn.utterance is not None]
        stands: tuple[str, str] | None = None  # id and text of the reply that stands
        for turn in asked.turns:
            if turn.utterance is None:
                assert stands is not None  # the engine takes no confirmation before a reply
                self._confirm(name, turn, *stands)
            else:
                scored = not (cut and turn.utterance is replies[-1])
                stands = self._say(name, asked, turn, stands, scored)

    def _say(
        self, question: str, asked: Asked, turn: Turn, stands: tuple[str, str] | None, scored: bool
    ) -> tuple[str, str]:
        assert turn.utterance is not None
        self._replies += 1
        said, text = f"a{self._replies}", turn.utterance.text
        event = {"id": said, "t": turn.t, "role": "assistant", "kind": "speak"}
        if stands is not None:
            event |= {"kind": "revise", "supersedes": stands[0]}
        event |= {"reply_to": question, "text": text, "evidence": list(turn.evidence)}
        if turn.utterance.chunks is not None:
            event["chunks"] = [list(chunk) for chunk in turn.utterance.chunks]
        self.events.append(event)
        topic = asked.question.topic
        if not scored:
            return said, text
        if stands is None:
            self.questions.append(
                {
                    "id": question,
                    "attribute": topic,
                    "asked_t": asked.question.t,
                    "evidence_t": min(turn.since_s, turn.t),
                    "answer_t": turn.t,
                    "answer_id": said,
                    "answer": text,
                }
            )
        else:
            self.revisions.append(
                {
                    "id": said,
                    "question": question,
                    "attribute": turn.decision.changed or topic,
                    "t": turn.since_s,
                    "old": stands[1],
                    "new": text,
                    "supersedes": stands[0],
                }
            )
        return said, text

    def _confirm(self, question: str, turn: Turn, said: str, text: str) -> None:
        self.confirmations.append(
            {
                "question": question,
                "attribute": turn.decision.changed,
                "t": turn.t,
                "standing": turn.decision.text or text,
            }
        )
        name = f"c{len(self.confirmations)}"
        event = {"id": name, "t": turn.t, "role": "assistant", "kind": "confirm", "confirms": said}
        self.events.append(event | {"evidence": [turn.since_s, turn.t]})
