"""Plain multimodal conversations, as most public instruction data has them, to conversation samples.

Two forms: `{"conversations": [{"from": "human"|"gpt"|"system", "value": …}], "image"|"video": path or list}`
(LLaVA; `<image>` and `<video>` stand for the media) and `{"messages": [{"role", "content"}], "images": […],
"videos": […]}`, where the content is text or a list of parts `{"type": "text"|"image"|"video", …}`.
"""

import re

from moss_train.errors import SampleError
from moss_train.streams.importers.common import Imported, describe_media, dict_of, list_of, require, text_of
from moss_train.streams.media import PLACEHOLDERS
from moss_train.streams.rules import placeholders_of
from moss_train.streams.schema import parse_sample

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_FOREIGN_PLACEHOLDER = re.compile(r"<(image|video)>\n?")


def import_conversations(rows: list[dict], prefix: str = "conversation") -> list[Imported]:
    """All rows as conversation samples `{prefix}-000000` onwards with the source paths of their media."""
    return [import_conversation(row, f"{prefix}-{index:06d}") for index, row in enumerate(rows)]


def import_conversation(row: dict, key: str) -> Imported:
    """One row as (sample with id and key `key`, {tar member: source path}); raises SampleError if it is malformed.

    Media without a placeholder are shown at the start of the first user turn.
    """
    require(isinstance(row, dict), key, "the row is not a JSON object; mend the file")
    waiting = {kind: [text_of(path, key, kind) for path in _paths(row, kind, key)] for kind in PLACEHOLDERS}
    turns = _turns(row, key, waiting)
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
    placed = [kind for turn in turns for kind in placeholders_of(turn["content"])]
    if not placed and turns:
        placed = [kind for kind, paths in waiting.items() for _ in paths]
        turns[0]["content"] = "".join(PLACEHOLDERS[kind] for kind in placed) + turns[0]["content"]
    paths = []
    for kind in placed:
        require(bool(waiting[kind]), key, f"more {kind} placeholders than {kind} paths; add the missing paths")
        paths.append((kind, waiting[kind].pop(0)))
    for kind, left in waiting.items():
        require(not left, key, f"{len(left)} {kind} paths have no placeholder; add placeholders or drop the paths")
    media, members = describe_media(paths, key)
    data = {"schema": "moss_train/conversation@1", "id": key, "media": media, "messages": turns}
    return parse_sample(data | ({} if system is None else {"system": system}), key), members


def _paths(row: dict, kind: str, key: str) -> list[str]:
    listed = row.get(f"{kind}s", row.get(kind))
    if listed is None:
        return []
    return [listed] if isinstance(listed, str) else list_of(listed, key, kind)


def _turns(row: dict, key: str, waiting: dict[str, list[str]]) -> list[dict]:
    if "conversations" in row:
        name, role_field, text_field = "conversations", "from", "value"
    elif "messages" in row:
        name, role_field, text_field = "messages", "role", "content"
    else:
        raise SampleError(key, "has neither messages nor conversations; this importer reads only those two forms")
    turns = []
    for index, turn in enumerate(list_of(row[name], key, name)):
        where = f"{name}[{index}]"
        turn = dict_of(turn, key, where)
        role = text_of(turn.get(role_field), key, f"{where}.{role_field}")
        require(role in _ROLES, key, f"{where}.{role_field}: {role!r} is none of {', '.join(_ROLES)}")
        content = turn.get(text_field)
        if isinstance(content, list):
            content = _join_parts(content, key, f"{where}.{text_field}", waiting)
        else:
            content = text_of(content, key, f"{where}.{text_field}")
            content = _FOREIGN_PLACEHOLDER.sub(lambda match: PLACEHOLDERS[match[1]], content)
        turns.append({"role": _ROLES[role], "content": content})
    return turns


def _join_parts(parts: list, key: str, where: str, waiting: dict[str, list[str]]) -> str:
    text = ""
    for index, part in enumerate(parts):
        part = dict_of(part, key, f"{where}[{index}]")
        kind = text_of(part.get("type"), key, f"{where}[{index}].type")
        if kind == "text":
            text += text_of(part.get("text"), key, f"{where}[{index}].text")
        elif kind in PLACEHOLDERS:
            text += PLACEHOLDERS[kind]
            if kind in part:  # the part names its own file
                waiting[kind].append(text_of(part[kind], key, f"{where}[{index}].{kind}"))
        else:
            raise SampleError(key, f"{where}[{index}]: type {kind!r} is none of text, image, video")
    return text
