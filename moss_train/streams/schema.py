"""The JSON member of a sample: three kinds (caption, conversation, stream), their fields and their parsing.

The types hold the form; `rules.py` holds what must be true between fields (times, order, links).
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, ValidationError, model_validator

from moss_train.errors import SampleError
from moss_train.streams import rules
from moss_train.streams.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

# the limits keep every product of a time and a rate finite
Seconds = Annotated[float, Field(ge=-1e8, le=1e8, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e8, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=512)]


class Strict(BaseModel):
    """Unknown fields are refused, and nothing is converted from another JSON type."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )


class Media(Strict):
    """One video or still of the sample, stored beside the JSON as tar member `{key}.{member}`."""

    id: Name
    kind: Literal["video", "image"]
    member: Annotated[str, Field(pattern=rf"^(\d+\.)?({'|'.join(VIDEO_EXTENSIONS + IMAGE_EXTENSIONS)})$")]
    """What follows `{key}.` in the member's name: "mp4" for an only medium, "0.mp4", "1.jpg", ... for several."""
    duration_s: NonNegative | None = None
    """Seconds; what the index measured wins."""


class OfflineSampling(Strict):
    """Which frames of each video are shown; what is absent comes from the compiler's configuration.

    `max_frames` can lower the configuration's limit, not raise it. `times_s` names the frames one by one and stands
    alone.
    """

    fps: Rate | None = None
    min_frames: Annotated[int, Field(ge=1)] | None = None
    max_frames: Annotated[int, Field(ge=1)] | None = None
    start_s: NonNegative = 0.0
    end_s: Seconds | None = None
    times_s: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """Seconds of the video's clock, ascending: the frames on screen then are shown. For samples with one video."""


class StreamSampling(Strict):
    """Frames arrive at start_s + k / fps while that is below end_s, in seconds of the video's clock."""

    fps: Rate | None = None
    start_s: NonNegative = 0.0
    end_s: Seconds
    times_s: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """When the frames arrive, ascending, instead of at a rate; the last lasts until end_s."""


class UserEvent(Strict):
    """Something the user says at time `t`. `t = sampling.start_s` means: before the first frame is shown."""

    id: Name
    t: Seconds
    role: Literal["user"]
    kind: Literal["ask", "interrupt"] = "ask"
    """Either ends a reply that still runs; `interrupt` says so where `chunks` or `words` leave it open."""
    text: str


class Reply(Strict):
    """Something the assistant says from `t` on (its earliest moment)."""

    id: Name
    t: Seconds
    role: Literal["assistant"]
    kind: Literal["speak", "revise"]
    """`revise` replaces the reply named in `supersedes`."""
    text: Text
    """All that is said, also when `chunks` or `words` say when."""
    evidence: Annotated[list[Seconds], Field(max_length=2)] | None = None
    """[from, to], when the video shows what the reply says; [] = it rests on nothing seen."""
    reply_to: Name | None = None
    """Id of the user event it answers."""
    supersedes: Name | None = None
    """Id of the earlier reply it replaces; needed by "revise"."""
    chunks: Annotated[list[tuple[Seconds, Text]], Field(min_length=1)] | None = None
    """[time, text] of each slot, exactly: each text is tokenised alone. Wins over `words`."""
    words: Annotated[list[tuple[Seconds, Seconds, Text]], Field(min_length=1)] | None = None
    """[start, end, word] as spoken; a word stands in the first slot that is not before its start."""
    complete: bool = True
    """False: the reply breaks off at the end of its turn, and no silence ends it."""
    stale: bool = False
    """True: known to be wrong when said; its labels get kind STALE."""
    train: bool = True
    """False: stays in the row, but nothing of it is trained."""


class SilenceInterval(Strict):
    """With `silence: explicit`: the moments t <= time < t_end in which silence is known to be right."""

    id: Name
    t: Seconds
    t_end: Seconds
    role: Literal["assistant"]
    kind: Literal["silence"]


class Confirm(Strict):
    """Something changes at `t` and the standing answer still holds: silence is known to be right then."""

    id: Name
    t: Seconds
    role: Literal["assistant"]
    kind: Literal["confirm"]
    confirms: Name
    """Id of the earlier reply that still holds; not one that was replaced before."""
    evidence: Annotated[list[Seconds], Field(min_length=2, max_length=2)] | None = None
    """[from, to], when the video shows the change."""


class Thought(Strict):
    """A think unit: what the assistant notes for itself at the first frame from `t` on. It is never heard."""

    id: Name
    t: Seconds
    role: Literal["assistant"]
    kind: Literal["think"]
    text: str
    """"" = nothing to note: the tokenizer's skip token stands there."""
    evidence: Annotated[list[Seconds], Field(min_length=2, max_length=2)] | None = None
    """[from, to], when the video shows what it notes."""
    train: bool = True
    """False: stays in the row, but nothing of it is trained."""


def _event_tag(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    if role == "user":
        return "<user>"
    if role == "assistant":
        return f"<{kind}>" if kind in ("silence", "confirm", "think") else "<reply>"
    return None


Event = Annotated[
    Annotated[UserEvent, Tag("<user>")]
    | Annotated[Reply, Tag("<reply>")]
    | Annotated[SilenceInterval, Tag("<silence>")]
    | Annotated[Confirm, Tag("<confirm>")]
    | Annotated[Thought, Tag("<think>")],
    Discriminator(
        _event_tag,
        custom_error_type="event_role",
        custom_error_message="an event needs a role, 'user' or 'assistant'",
    ),
]


class _SampleBase(Strict):
    id: Name
    media: list[Media]
    source_metadata: dict[str, Any] | None = None
    """What an importer needs to write the source row again."""

    _key: str | None = PrivateAttr(default=None)

    @property
    def key(self) -> str:
        """The tar key the sample was read under; its id when it was not read from a tar."""
        return self._key or self.id

    def with_key(self, key: str) -> "Sample":
        """The same sample under another tar key."""
        sample = self.model_copy()
        sample._key = key
        return sample


class CaptionSample(_SampleBase):
    """Text about media. Placeholders say where the media stand; without any they stand before the text."""

    schema_name: Annotated[Literal["moss_train/caption@1"], Field(alias="schema")] = "moss_train/caption@1"
    sampling: OfflineSampling | None = None
    text: str
    prompt: str = ""

    @model_validator(mode="after")
    def _rules(self) -> "CaptionSample":
        rules.check_caption(self)
        return self


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: str
    train: bool = True
    """False (assistant only): the turn is context, not a target."""


class ConversationSample(_SampleBase):
    """A dialogue about media that were seen whole; placeholders stand in the order of `media`."""

    schema_name: Annotated[Literal["moss_train/conversation@1"], Field(alias="schema")] = "moss_train/conversation@1"
    sampling: OfflineSampling | None = None
    system: str | None = None
    messages: Annotated[list[Message], Field(min_length=2)]

    @model_validator(mode="after")
    def _rules(self) -> "ConversationSample":
        rules.check_conversation(self)
        return self


class StreamSample(_SampleBase):
    """One video watched live, with what was said when. Events stand in the order of their times."""

    schema_name: Annotated[Literal["moss_train/stream@1"], Field(alias="schema")] = "moss_train/stream@1"
    sampling: StreamSampling
    system: str | None = None
    silence: Literal["implicit", "explicit"] = "implicit"
    events: list[Event]

    @model_validator(mode="after")
    def _rules(self) -> "StreamSample":
        rules.check_stream(self)
        return self


Sample = CaptionSample | ConversationSample | StreamSample

SAMPLE_TYPES: dict[str, type[Sample]] = {
    "moss_train/caption@1": CaptionSample,
    "moss_train/conversation@1": ConversationSample,
    "moss_train/stream@1": StreamSample,
}


def parse_sample(data: bytes | str | dict, key: str) -> Sample:
    """The checked sample of a JSON member; raises `SampleError` naming the field, the fault and the remedy."""
    try:
        text = json.dumps(data) if isinstance(data, dict) else data
        header = data if isinstance(data, dict) else json.loads(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise SampleError(key, f"is not JSON ({error}); write one JSON object in UTF-8") from error
    if not isinstance(header, dict):
        raise SampleError(key, f"is a JSON {type(header).__name__}, not an object; see data_specs/schemas")
    name = header.get("schema")
    sample_type = SAMPLE_TYPES.get(name) if isinstance(name, str) else None
    if sample_type is None:
        raise SampleError(key, f"schema: {name!r} is unknown; use one of {', '.join(SAMPLE_TYPES)}")
    try:
        sample = sample_type.model_validate_json(text, by_name=False, by_alias=True)
    except ValidationError as error:
        raise SampleError(key, _describe(error)) from error
    return sample.with_key(key)


def dump_sample(sample: Sample) -> str:
    """The JSON of a sample, without the fields that keep their default; `parse_sample` reads it back equal."""
    fields = sample.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return json.dumps({"schema": sample.schema_name} | fields, ensure_ascii=False)


_REMEDIES = {
    "extra_forbidden": "unknown field; remove it or mend its spelling",
    "missing": "is missing; add it",
}


def _describe(error: ValidationError) -> str:
    """All faults of a sample in one line, each as `path: fault`."""
    faults = []
    for fault in error.errors(include_url=False, include_input=False):
        where = rules.path_text([part for part in fault["loc"] if not str(part).startswith("<")])
        if fault["type"] == "rule":
            faults.append(fault["msg"])  # carries its own path
        else:
            what = _REMEDIES.get(fault["type"]) or f"{fault['msg']} (form: data_specs/schemas)"
            faults.append(f"{where}: {what}" if where else what)
    return "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
