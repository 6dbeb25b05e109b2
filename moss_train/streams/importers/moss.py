"""Rows of the reference's sharegpt files (model_facts C.1) to samples and back, without loss.

Captions (an empty user turn, then text), conversations and real-time rows are told apart by their content.
Every import is checked by writing the row again: what cannot be written back equal is refused, never altered.
"""

from typing import Any

from moss_train.errors import SampleError
from moss_train.streams.importers.common import Imported, describe_media, list_of, require, text_of
from moss_train.streams.importers.moss_realtime import (
    INFO_PREFIX,
    export_realtime_row,
    import_realtime_row,
)
from moss_train.streams.rules import placeholders_of
from moss_train.streams.schema import CaptionSample, ConversationSample, Sample, StreamSample, parse_sample

FORMAT = "moss_sharegpt"
#: row field -> kind of medium it lists
_MEDIA_FIELDS = {"images": "image", "videos": "video"}


def import_moss_rows(rows: list[dict], prefix: str = "moss") -> list[Imported]:
    """All rows of one file, as samples `{prefix}-000000` onwards with the source paths of their media.

    Raises SampleError at the first row that cannot be represented; use `import_moss_row` to go on after one.
    """
    return [import_moss_row(row, f"{prefix}-{index:06d}") for index, row in enumerate(rows)]


def import_moss_row(row: dict, key: str) -> Imported:
    """One row as (sample with id and key `key`, {tar member: source path})."""
    require(isinstance(row, dict), key, "the row is not a JSON object; mend the file")
    messages = list_of(row.get("messages"), key, "messages")
    for index, message in enumerate(messages):
        require(isinstance(message, dict), key, f"messages[{index}]: is not an object; mend the row")
        text_of(message.get("role"), key, f"messages[{index}].role")
        text_of(message.get("content"), key, f"messages[{index}].content")
    fields = {name: value for name, value in row.items() if name not in ("messages", *_MEDIA_FIELDS)}
    extras = {
        str(index): extra
        for index, message in enumerate(messages)
        if (extra := {name: value for name, value in message.items() if name not in ("role", "content")})
    }
    metadata: dict[str, Any] = {"format": FORMAT, "lists": [name for name in _MEDIA_FIELDS if name in row]}
    metadata |= ({"fields": fields} if fields else {}) | ({"message_fields": extras} if extras else {})
    videos = row.get("videos") or []
    realtime = isinstance(videos, list) and videos and isinstance(videos[0], str) and videos[0].startswith(INFO_PREFIX)
    data, members = (import_realtime_row if realtime else _import_offline_row)(row, key, metadata)
    sample = parse_sample(data, key)
    if export_moss_row(sample) != row:
        raise SampleError(key, "cannot be written back as the row it came from; leave the row out and report its form")
    return sample, members


def export_moss_row(sample: Sample) -> dict:
    """The sharegpt row of a sample; for an imported one, equal to the row it came from."""
    metadata = sample.source_metadata or {}
    if isinstance(sample, StreamSample):
        row = export_realtime_row(sample, metadata)
    else:
        row = _export_offline_row(sample, metadata)
    for index, extra in metadata.get("message_fields", {}).items():
        row["messages"][int(index)] |= extra
    return row | metadata.get("fields", {})


def _import_offline_row(row: dict, key: str, metadata: dict) -> tuple[dict, dict[str, str]]:
    messages = row["messages"]
    waiting = {kind: list(list_of(row.get(name, []), key, name)) for name, kind in _MEDIA_FIELDS.items()}
    paths: list[tuple[str, str]] = []
    for message in messages:
        for kind in placeholders_of(message["content"]):
            require(bool(waiting[kind]), key, f"messages: more {kind} placeholders than {kind}s; add the paths")
            paths.append((kind, text_of(waiting[kind].pop(0), key, f"{kind}s")))
    for kind, left in waiting.items():
        require(not left, key, f"{kind}s: {len(left)} entries have no placeholder in the messages; add or drop them")
    media, members = describe_media(paths, key)
    metadata["paths"] = [path for _, path in paths]
    common = {"id": key, "media": media, "source_metadata": metadata}
    roles = [message["role"] for message in messages]
    if roles == ["user", "assistant"] and messages[0]["content"] == "":
        return {"schema": "moss_train/caption@1", "text": messages[1]["content"]} | common, members
    system = None
    if roles[:1] == ["system"]:
        system, messages = messages[0]["content"], messages[1:]
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    conversation = {"schema": "moss_train/conversation@1", "messages": turns} | common
    return conversation | ({} if system is None else {"system": system}), members


def _export_offline_row(sample: CaptionSample | ConversationSample, metadata: dict) -> dict:
    if isinstance(sample, CaptionSample):
        turns = [("user", sample.prompt), ("assistant", sample.text)]
    else:
        turns = [] if sample.system is None else [("system", sample.system)]
        turns += [(message.role, message.content) for message in sample.messages]
    row: dict[str, Any] = {"messages": [{"role": role, "content": content} for role, content in turns]}
    paths = metadata.get("paths") or [f"{sample.key}.{medium.member}" for medium in sample.media]
    for name, kind in _MEDIA_FIELDS.items():
        of_kind = [path for path, medium in zip(paths, sample.media, strict=True) if medium.kind == kind]
        if name in metadata.get("lists", _MEDIA_FIELDS):
            row[name] = of_kind
    return row
