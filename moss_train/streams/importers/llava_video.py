"""LLaVA-Video-178K: LLaVA's conversations about one video each, with `<image>` where the video stands.

One sample a row: rows share videos, but each is a dialogue or a caption of its own, often in another form of answer
(a letter, a word, a paragraph). The loader decodes a shared video once.
"""

import re
from typing import Any

from moss_train.streams.importers.common import ImportContext, Imported, dict_of, list_of, require, text_of
from moss_train.streams.importers.conversations import import_conversation

_PLACEHOLDER = re.compile(r"<(?:image|video)>\n?")


def import_llava_video(row: Any, key: str, context: ImportContext) -> Imported:
    """`{"id", "data_source", "video", "conversations": [{"from", "value"}]}` as a conversation.

    The video stands where its first placeholder does, else before the first question; further placeholders, which some
    rows repeat in every turn, are dropped.
    """
    row = dict_of(row, key, "the row")
    video = text_of(row.get("video"), key, "video")
    require("image" not in row, key, "image: a row of this set shows one video; use source=conversations")
    turns, placed = [], False
    for index, turn in enumerate(list_of(row.get("conversations"), key, "conversations")):
        turn = dict_of(turn, key, f"conversations[{index}]")
        value = text_of(turn.get("value"), key, f"conversations[{index}].value")
        if not placed and _PLACEHOLDER.search(value):
            value, placed = _PLACEHOLDER.sub("<video>", value, count=1), True
            before, after = value.split("<video>", 1)
            value = before + "<video>" + _PLACEHOLDER.sub("", after)
        else:
            value = _PLACEHOLDER.sub("", value)
        turns.append(turn | {"value": value})
    sample, members = import_conversation({"video": video, "conversations": turns}, key)
    metadata = {"format": "llava_video"} | {name: row[name] for name in ("id", "data_source") if name in row}
    return sample.model_copy(update={"source_metadata": metadata}), members
