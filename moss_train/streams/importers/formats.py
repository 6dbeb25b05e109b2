"""The formats that `data convert` reads: how a file is taken apart into rows, and what reads one row."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from moss_train.streams.importers.common import ImportContext, Imported
from moss_train.streams.importers.conversations import import_conversation
from moss_train.streams.importers.dense_captions import (
    activitynet_rows,
    coin_rows,
    import_activitynet,
    import_coin,
)
from moss_train.streams.importers.dialogues import import_streamo, import_videollm_online, videollm_online_rows
from moss_train.streams.importers.llava_video import import_llava_video
from moss_train.streams.importers.moss import import_moss_row
from moss_train.streams.importers.narrations import ego4d_rows, import_narrations
from moss_train.streams.importers.text_stream import import_text_stream, text_stream_rows


def listed_rows(loaded: Any) -> list:
    """The entries of a list; anything else is one row."""
    return loaded if isinstance(loaded, list) else [loaded]


@dataclass(frozen=True)
class Format:
    """One form of annotation file."""

    read: Callable[[Any, str, ImportContext], Imported]
    """A row, its key and the context → the sample and its media; raises SampleError for a row that does not fit."""
    rows: Callable[[Any], Iterable[Any]] = listed_rows
    """The parsed file (of JSON lines, each line as a list of one) → its rows; SampleError when it has another form."""


FORMATS: dict[str, Format] = {
    "moss": Format(lambda row, key, context: import_moss_row(row, key)),
    "conversations": Format(lambda row, key, context: import_conversation(row, key)),
    "llava_video": Format(import_llava_video),
    "activitynet": Format(import_activitynet, activitynet_rows),
    "coin": Format(import_coin, coin_rows),
    "ego4d": Format(import_narrations, ego4d_rows),
    "videollm_online": Format(import_videollm_online, videollm_online_rows),
    "text_stream": Format(import_text_stream, text_stream_rows),
    "streamo": Format(import_streamo),
}
