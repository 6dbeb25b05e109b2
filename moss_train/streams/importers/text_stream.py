"""Clips with a commentary timed word by word: LiveCC and Inf-Streams (`text_stream`). One sample a row.

`[{"role": "user", "content": [{"type": "video", "video", "video_start", "video_end"}, {"type": "text", "text"}]},
{"role": "assistant", "content": [{"type": "text_stream", "text_stream": [[start, end, word]]}]}]`, all times on the
video's own clock. Rows of one video are separate clips of it. The last line of the published files holds seek
positions, not a row. `qa_stream`, [[…, time, question, answer]], interrupts the commentary.
"""

from collections.abc import Iterator
from typing import Any

from moss_train.streams.importers.common import (
    ImportContext,
    Imported,
    dict_of,
    list_of,
    require,
    seconds_of,
    span_of,
    text_of,
)
from moss_train.streams.importers.talk import Watch, spoken_s, stream_of

Word = tuple[float, float, str]


def text_stream_rows(loaded: Any) -> Iterator[Any]:
    """The conversations of a file, without its line of seek positions."""
    for row in loaded if isinstance(loaded, list) else [loaded]:
        if not (isinstance(row, list) and row and all(isinstance(entry, int) for entry in row)):
            yield row


def import_text_stream(row: Any, key: str, context: ImportContext) -> Imported:
    """One clip: the query opens it, the commentary is one reply with `words` (one for each stretch between questions).

    Words are sorted by their start and lose the space around them, blank ones are left out. A word said while a
    question is answered waits until the answer is over.
    """
    row = list_of(row, key, "the row")
    require(len(row) == 2, key, f"the row has {len(row)} messages; a text stream is one user and one assistant message")
    user, assistant = (dict_of(message, key, f"[{index}]") for index, message in enumerate(row))
    seen, query = _user(user, key)
    said = dict_of(_first(assistant, key, "[1].content"), key, "[1].content[0]")
    start_s = seconds_of(seen.get("video_start", 0.0), key, "[0].content[0].video_start")
    end_s = seconds_of(seen.get("video_end"), key, "[0].content[0].video_end")
    require(start_s < end_s, key, f"[0].content[0].video_end: {end_s} is not after video_start {start_s}")
    watch = Watch(context.fps, start_s, end_s)
    words = _words(said.get("text_stream"), watch, key)
    questions = _questions(said.get("qa_stream", []), watch, key)
    metadata = {"format": "text_stream"} | {
        name: query[name] for name in ("title", "category", "previous") if query.get(name)
    }
    events = _events(query.get("text", ""), words, questions, watch, key)
    path = text_of(seen.get("video"), key, "[0].content[0].video")
    return stream_of(key, path, watch, events, metadata)


def _user(message: dict, key: str) -> tuple[dict, dict]:
    """The entry that names the clip, and the one with the query (empty when there is none)."""
    entries = [dict_of(entry, key, "[0].content") for entry in list_of(message.get("content"), key, "[0].content")]
    videos = [entry for entry in entries if entry.get("type") == "video"]
    require(len(videos) == 1, key, f"[0].content: names {len(videos)} videos; a text stream watches one")
    texts = [entry for entry in entries if entry.get("type") == "text"]
    for entry in texts:
        text_of(entry.get("text"), key, "[0].content.text")
    return videos[0], texts[0] if texts else {}


def _first(message: dict, key: str, where: str) -> Any:
    content = list_of(message.get("content"), key, where)
    require(len(content) == 1, key, f"{where}: has {len(content)} entries; expected the text stream alone")
    return content[0]


def _words(value: Any, watch: Watch, key: str) -> list[Word]:
    words = []
    last_s = watch.time(watch.frames() - 1)
    for index, entry in enumerate(list_of(value, key, "text_stream")):
        where = f"text_stream[{index}]"
        entry = list_of(entry, key, where)
        require(len(entry) == 3, key, f"{where}: has {len(entry)} entries; a word is [start, end, word]")
        start_s, end_s = span_of(entry[:2], key, where)
        inside = watch.start_s <= start_s <= watch.end_s
        require(inside, key, f"{where}: {start_s} s lies outside the clip [{watch.start_s}, {watch.end_s}]")
        text = " ".join(text_of(entry[2], key, where).split())
        if text:
            # what starts after the last frame is said at it
            words.append((min(start_s, last_s), end_s, text))
    require(bool(words), key, "text_stream: holds no word; drop the row")
    return sorted(words, key=lambda word: word[0])


def _questions(value: Any, watch: Watch, key: str) -> list[tuple[float, str, str]]:
    """(time, question, answer), sorted by time."""
    questions = []
    for index, entry in enumerate(list_of(value, key, "qa_stream")):
        where = f"qa_stream[{index}]"
        entry = list_of(entry, key, where)
        require(len(entry) == 4, key, f"{where}: has {len(entry)} entries; expected [id, time, question, answer]")
        time_s = seconds_of(entry[1], key, f"{where}[1]")
        inside = watch.start_s <= time_s < watch.end_s
        require(inside, key, f"{where}[1]: {time_s} s lies outside the clip [{watch.start_s}, {watch.end_s})")
        question, answer = (text_of(text, key, where).strip() for text in entry[2:])
        require(bool(question and answer), key, f"{where}: question or answer is blank; drop it")
        questions.append((time_s, question, answer))
    return sorted(questions)


def _events(
    query: str, words: list[Word], questions: list[tuple[float, str, str]], watch: Watch, key: str
) -> list[dict]:
    events: list[dict] = []
    if query.strip():
        events.append({"id": "query", "t": watch.start_s, "role": "user", "text": query.strip()})
    last_s = watch.time(watch.frames() - 1)
    free_s = watch.start_s
    for index, (time_s, question, answer) in enumerate([*questions, (float("inf"), "", "")]):
        stretch = [word for word in words if word[0] < time_s]
        words = words[len(stretch) :]
        if stretch:
            require(free_s <= last_s, key, f"qa_stream[{index - 1}]: its answer leaves no frame for the words after it")
            commentary = [(max(start_s, free_s), max(end_s, free_s), text) for start_s, end_s, text in stretch]
            events.append(
                {
                    "id": f"c{index}",
                    "t": commentary[0][0],
                    "role": "assistant",
                    "kind": "speak",
                    "text": " ".join(text for _, _, text in commentary),
                    "words": [list(word) for word in commentary],
                }
            )
            free_s = watch.time(watch.first_from(commentary[-1][0]))
        if question:
            asked_s = min(max(time_s, free_s), last_s)
            reply = {"id": f"a{index}", "t": asked_s, "role": "assistant", "kind": "speak", "text": answer}
            events.append({"id": f"q{index}", "t": asked_s, "role": "user", "text": question})
            events.append(reply | {"reply_to": f"q{index}"})
            over = watch.first_from(asked_s + spoken_s(answer))
            free_s = watch.time(max(over, watch.last_until(asked_s) + 1))
    return events
