"""`data show`: one sample as the trainer sees it, as a picture or as text."""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from moss_train.data.config import DataConfig
from moss_train.data.corpus import Corpus, load_source
from moss_train.data.decoding.pictures import fitted_size
from moss_train.data.order import augmentation_rng, drawn_variant, variation_seed
from moss_train.data.shards.transfer import shown
from moss_train.errors import ConfigError, DataError
from moss_train.streams.compiled import CompiledStream, FrameRequest, Kind
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.split import RowBudget
from moss_train.streams.template import HEADER_END
from moss_train.streams.tokenizer import StreamTokenizer, load_tokenizer

#: pixels of a frame's longer side in the picture
THUMBNAIL = 224


@dataclass
class ShowOptions:
    """Options of `data show`."""

    path: str
    """Packed folder or URL."""
    key: str = ""
    """Key of the sample; empty: the first one."""
    out: str = "sample.png"
    """Picture to write; `-` prints the same as text."""
    part: int = 0
    """Which part, where the stream is longer than a row."""
    pack_text_tokens: int | None = None
    """With `pack_frames`: the budget of a row, to see how it cuts a long stream (`data.over_budget=split`); null: whole
    streams."""
    pack_frames: int | None = None
    """See `pack_text_tokens`."""
    epoch: int | None = None
    """Draw the augmentations (`compiler.augment`, jitter) as that epoch of a run does; null: none."""
    seed: int = 0
    """Of the run, with `epoch`."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The recipe's tokenizer."""
    compiler: CompilerConfig = field(default_factory=CompilerConfig)
    """The recipe's compiler."""

    def validate(self) -> None:
        if self.out != "-" and not self.out.endswith(".png"):
            raise ConfigError(f"out={self.out} must end in .png, or be - for text")
        self.budget()
        self.tokenizer.validate()
        self.compiler.validate()

    def budget(self) -> RowBudget | None:
        return RowBudget.of(self.pack_text_tokens, self.pack_frames)


def show_command(options: ShowOptions) -> int:
    """Draw one sample: its frames, who says what when, what each token sees and what is trained."""
    tokenizer = load_tokenizer(options.tokenizer)
    corpus = load_source(options.path, tokenizer, options.compiler, THUMBNAIL, DataConfig())
    number = _number(corpus, options.key)
    parts = corpus.compile_all(number, options.budget(), *_drawn(options, corpus.key(number)))
    if not 0 <= options.part < len(parts):
        raise ConfigError(f"part={options.part}: the sample has {len(parts)} part(s), numbered from 0")
    row = parts[options.part]
    items = read_items(row, tokenizer)
    title = describe(row, len(parts))
    if options.out == "-":
        print("\n".join([title, *text_lines(row, items)]))
        return 0
    from moss_train.data.show_picture import draw_sample

    folder = Path(options.out).absolute().parent
    if not folder.is_dir():
        raise DataError(f"out={options.out}: the folder {folder} does not exist")
    draw_sample(Path(options.out), title, row, items, lambda requests: _thumbnails(corpus, number, requests))
    print(f"wrote {options.out}: {title}")
    return 0


def _drawn(options: ShowOptions, key: str) -> tuple[np.random.Generator | None, int | None]:
    """What draws the augmentations of a sample in an epoch, as the loader does."""
    if options.epoch is None:
        return None, None
    augment = options.compiler.augment
    variant = drawn_variant(options.seed, options.epoch, key, augment.varies, augment.measured_variants)
    return augmentation_rng(options.seed, options.epoch, key), variation_seed(options.seed, key, variant)


def _number(corpus: Corpus, key: str) -> int:
    if not key:
        if not len(corpus):
            raise DataError(f"{shown(corpus.index.location)} holds no sample")
        return 0
    try:
        return corpus.index.number(key)
    except KeyError:
        near = difflib.get_close_matches(key, [corpus.key(number) for number in range(min(len(corpus), 10_000))], n=3)
        hint = f"; near it: {', '.join(near)}" if near else f"; its first is {corpus.key(0)!r}" if len(corpus) else ""
        raise DataError(f"{shown(corpus.index.location)} holds no sample {key!r}{hint}") from None


def _thumbnails(corpus: Corpus, number: int, requests: Sequence[FrameRequest]) -> list[np.ndarray]:
    """uint8 [h, w, 3] of each request: its tile without the padding."""
    facts = corpus.entry(number).media
    members = {medium.id: medium.member for medium in corpus.sample(number).media}
    pictures = []
    for request, tile in zip(requests, corpus.frames(number, requests).numpy(), strict=True):
        probe = facts[members[request.media_id]]
        width, height = fitted_size(probe.width, probe.height, THUMBNAIL)
        pictures.append(tile.transpose(1, 2, 0)[:height, :width])
    return pictures


@dataclass(frozen=True)
class Item:
    """A stretch of the row: one frame with what is said after its anchor, or a stretch of text of one role."""

    role: str  #: "system", "user", "assistant"; "" in rows without turns
    first: int  #: tokens [first, end) of the row; the anchor of a frame is the token before
    end: int
    text: str  #: what it says, without special tokens
    frame: int | None = None
    time_s: float | None = None  #: of the frame, or of a user event in a stream
    silent: bool = False  #: it is silence and nothing else
    context: bool = False  #: repeats what earlier parts of the stream have said
    ending: str = ""  #: of a reply that no silence ends: what does
    thought: str = ""  #: what is thought before, and never heard
    note: str = ""  #: what is special about its silence, see `Slot.note`
    weight: float = 1.0  #: of its silence


def read_items(row: CompiledStream, tokenizer: StreamTokenizer) -> list[Item]:
    """The row taken apart, in order. Headers belong to no item; the tokens that end turns do where they are trained."""
    special = tokenizer.special
    marks = {special.begin_of_text, special.end_of_turn, special.end_of_text, special.anchor}
    items: list[Item] = []
    ids = row.ids.tolist()
    role, first, frame = "", 1, None

    def close(end: int) -> None:
        nonlocal frame
        if end > first or frame is not None:
            hidden = marks if role == "system" else marks | {special.silence}
            said, thought = _apart(ids[first:end], tokenizer)
            said = [token for token in said if token not in hidden]
            text = tokenizer.decode(said) if said else ""
            text = text.removeprefix("\n\n") if frame is None else text
            silent = special.silence in ids[first:end] and not text
            time_s = row.frames[frame].time_s if frame is not None else None
            if text or silent or frame is not None or (role == "user" and row.kind == "stream"):
                items.append(Item(role, first, end, text, frame, time_s, silent, thought=thought))
        frame = None

    position, frames = 1, 0
    while position < len(ids):
        token = ids[position]
        if token == special.start_header:
            end = ids.index(special.end_header, position)
            role, first, position = tokenizer.decode(ids[position + 1 : end]), end + 1, end + 1
            if role == "assistant":  # the line breaks after its header are tokenised apart from what it says
                first = position = position + len(tokenizer.encode(HEADER_END))
            continue
        if token == special.anchor:
            close(position)
            frame, frames, first = frames, frames + 1, position + 1
            if row.kind != "stream":
                close(position + 1)
        elif token == special.end_of_turn:
            trained = bool(row.kinds[position - 1])
            close(position + trained)
            first = position + 1
        position += 1
    close(len(ids))
    return _of_stream(items, row, special.silence) if row.kind == "stream" else items


def _apart(ids: list[int], tokenizer: StreamTokenizer) -> tuple[list[int], str]:
    """What is said, and what is thought."""
    special = tokenizer.special
    if special.think_start is None or special.think_start not in ids:
        return ids, ""
    said, thoughts, inside = [], [], False
    for token in ids:
        if token in (special.think_start, special.think_end):
            inside = token == special.think_start
        elif inside:
            thoughts.append(token)
        else:
            said.append(token)
    return said, tokenizer.decode(thoughts)


def _of_stream(items: list[Item], row: CompiledStream, silence: int) -> list[Item]:
    """With the times of the user turns (those before them are context from earlier parts), and how replies end."""
    asked = [slot.time_s for slot in row.slots if slot.frame < 0]
    users = [index for index, item in enumerate(items) if item.role == "user"]
    first_frame = next((index for index, item in enumerate(items) if item.frame is not None), len(items))
    times = dict(zip(users[len(users) - len(asked) :], asked, strict=True))
    notes = {slot.frame: slot.note for slot in row.slots if slot.frame >= 0}
    result = []
    for index, item in enumerate(items):
        said_before = row.part > 0 and index < first_frame and item.role != "system"
        following = items[index + 1] if index + 1 < len(items) else None
        time_s, ending = times.get(index, item.time_s), _ending(item, following, int(row.ids[item.end - 1]) == silence)
        item = replace(item, time_s=time_s, context=said_before, ending=ending)
        if item.silent and item.frame is not None:
            weight = float(row.weights[item.end - 2])
            item = replace(item, note=notes.get(item.frame, ""), weight=weight if weight > 0 else 1.0)
        result.append(item)
    return result


def _ending(item: Item, following: Item | None, stops: bool) -> str:
    if item.role != "assistant" or not item.text or stops:
        return ""
    if following is None:
        return "ends here"
    return "cut by the user" if following.frame is None else "goes on"


def kinds_of(row: CompiledStream, item: Item) -> list[Kind]:
    """What each token of an item teaches as a target."""
    return [Kind(kind) for kind in row.kinds[item.first - 1 : item.end - 1]]


#: what a note says to whoever looks at the row
NOTES = {
    "confirm": "the answer still holds",
    "stale": "the answer is wrong by now",
    "unknown": "not known to be right",
    "blocked": "arrived during a reply",
    "thinned": "left out by keep_silence",
}


def silence_text(item: Item) -> str:
    """Of a silent item, what is special about it: "" or, for instance, `the answer still holds, weight 2`."""
    weight = f"weight {item.weight:g}" if item.weight != 1.0 else ""
    return ", ".join(filter(None, [NOTES.get(item.note, ""), weight]))


def kind_name(kind: Kind) -> str:
    return "not trained" if kind == Kind.IGNORED else kind.name.lower().replace("_", " ")


def describe(row: CompiledStream, parts: int) -> str:
    """One line about the row."""
    part = f", part {row.part} of {parts}" if parts > 1 else ""
    trained = int((row.kinds > 0).sum())
    return f"{row.key}: {row.kind}{part}, {len(row.ids)} tokens ({trained} trained), {len(row.frames)} frames"


def sees(row: CompiledStream, item: Item) -> str:
    """The frames that the item's tokens may look at, as `0-4`; with sinks `0,7-9`."""
    token = min(max(item.first - (item.frame is not None), 0), len(row.ids) - 1)
    lo, hi = int(row.visible_lo[token]), int(row.visible_hi[token])
    if hi == 0:
        return "-"
    sinks = min(row.sinks, lo)
    ranges = ([(0, sinks)] if sinks else []) + [(lo, hi)]
    return ",".join(f"{first}-{end - 1}" if end - first > 1 else f"{first}" for first, end in ranges)


def text_lines(row: CompiledStream, items: list[Item]) -> list[str]:
    """A table of the items: tokens, frame, time, frames seen, labels trained, what is said by whom."""
    lines = [f"{'tokens':>11}  {'frame':>5}  {'time':>9}  {'sees':>9}  {'trained':<28}  what"]
    for item in items:
        counts = Counter(kind for kind in kinds_of(row, item) if kind)
        trained = ", ".join(f"{count} {kind_name(kind)}" for kind, count in sorted(counts.items()))
        frame = "" if item.frame is None else str(item.frame)
        time = "" if item.time_s is None else f"{item.time_s:.2f} s"
        what = item.text.replace("\n", "⏎")
        if item.silent:
            special = silence_text(item)
            what = f"(silence: {special})" if special else "(silence)"
        if item.thought:
            what = f"[thinks: {item.thought}] {what}"
        speaker = f"{item.role}: " if item.role and item.frame is None else ""
        speaker = f"[said before] {speaker}" if item.context else speaker
        span = f"{item.first}-{item.end - 1}" if item.end > item.first else "-"
        what = f"{speaker}{what}" + (f" [{item.ending}]" if item.ending else "")
        lines.append(f"{span:>11}  {frame:>5}  {time:>9}  {sees(row, item):>9}  {trained:<28}  {what}".rstrip())
    return lines
