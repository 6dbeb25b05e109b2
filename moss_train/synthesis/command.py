"""`data synth`: captions of videos become real-time dialogues, as a staging folder that `data pack` reads."""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moss_train.data.shards.staging import check_target, resumable_folder
from moss_train.data.shards.storage import ShardStore
from moss_train.data.synthetic.world import SCENARIOS as WORLD_MIX
from moss_train.data.synthetic.world import SYSTEM
from moss_train.errors import ConfigError, DataError, SampleError
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.tokenizer import StreamTokenizer, load_tokenizer
from moss_train.synthesis.chat_client import ChatClient, EndpointOptions
from moss_train.synthesis.dialogue import Rejection
from moss_train.synthesis.endpoint import SHIPPED_PROMPTS, EndpointWriter, load_prompts
from moss_train.synthesis.ledger import MARKER_NAME, Ledger, Outcome, print_summary
from moss_train.synthesis.pipeline import Settings, synthesise
from moss_train.synthesis.rules import RuleWriter
from moss_train.synthesis.scenarios import SCENARIOS
from moss_train.synthesis.sources import Footage, Where, find_footage

WRITERS = ("rules", "endpoint")
_VIDEOS_PER_TASK = 32


@dataclass
class Mix:
    """Share of each scenario; what they sum up to does not matter. Where a timeline has no room for one, the others
    take its share."""

    before: float = WORLD_MIX["before"]
    """Asked before anything can be known: silence until the evidence comes."""
    during: float = WORLD_MIX["during"]
    """Asked in the middle, answered at the next frame that allows it."""
    after: float = WORLD_MIX["after"]
    """Asked when nothing new comes any more, answered from memory."""
    interruption: float = WORLD_MIX["interruption"]
    """A long reply is cut by another question."""
    description: float = WORLD_MIX["description"]
    """A long reply that is not cut."""
    two_questions: float = WORLD_MIX["two_questions"]
    """A second question takes the place of the first and is kept up to date from then on."""
    silent: float = WORLD_MIX["silent"]
    """Nobody asks anything."""


@dataclass
class SynthOptions:
    """Options of `data synth`."""

    source: str
    """`rendered`: clips of `data render` (path=clips/train/realtime; their captions stand beside the folder).
    `activitynet`, `coin`, `ego4d`, `videollm_online`, `text_stream`, `streamo`, `moss`: annotation files as
    `data convert` reads them (captions= and media_root=). `samples`: streams of a staging folder or of shards (path=),
    whose replies are taken as captions."""
    out: str
    """Staging folder to make."""
    captions: str | None = None
    """Annotation file, or a folder of them. For `rendered`: a file of captions other than the one beside the folder."""
    path: str | None = None
    """Folder of `rendered` clips; folder or shards of `samples`."""
    media_root: str | None = None
    """Folder below which the videos of annotation files lie; found by base name."""
    writer: str = "rules"
    """Who thinks of questions and answers: `rules` (offline, deterministic) or `endpoint` (a language model)."""
    fps: float = 1.0
    """Frames a second of the streams; replies start at frames."""
    tokens_per_second: float = CompilerConfig.tokens_per_second
    """How fast replies are spoken. Train with a `compiler.tokens_per_second` that is not lower."""
    rate_spread: float = 0.0
    """Above 0, each reply is spoken at its own rate, drawn from [1 - spread, 1 + spread] × tokens_per_second, and its
    words are written with their slots."""
    tokenizer: str | None = None
    """A `tokenizer.json` or its folder, by which replies are measured; null = the shipped one, which makes more tokens
    of a text than those of large models."""
    seen_at: float = 1.0
    """Share of a caption's span after which `activitynet` captions may be used: 1.0 when it is over, the only value at
    which nothing can leak; 0.5 = half-way, as MMDuet does."""
    question_every_s: float = 30.0
    """Mean time from one scenario to the next within a stream."""
    mix: Mix = field(default_factory=Mix)
    """Shares of the scenarios."""
    system: str | None = SYSTEM
    """System prompt of all streams; null = none."""
    seed: int = 0
    """Another seed gives other questions."""
    limit: int | None = None
    """Only the first so many videos, in the order of their keys."""
    workers: int = 2
    """Processes of the rule-based writer; has no influence on the result."""
    copy: bool = True
    """Copy the videos; False makes hard links where the file system allows it."""
    overwrite: bool = False
    """Replace `out` when an earlier `data synth` made it of other captions, by other code or with other options."""
    prompts: str | None = None
    """YAML file with the prompts of `writer=endpoint`; null = moss_train/synthesis/prompts.yaml."""
    endpoint: EndpointOptions = field(default_factory=EndpointOptions)
    """The language model of `writer=endpoint`."""

    def validate(self) -> None:
        self.where().validate()
        if self.writer not in WRITERS:
            raise ConfigError(f"writer={self.writer!r} is unknown; use one of {', '.join(WRITERS)}")
        for name in ("fps", "tokens_per_second"):
            if not 0 < getattr(self, name) <= 1000:
                raise ConfigError(f"{name}={getattr(self, name)} must lie above 0 and be at most 1000")
        for name, low, high in (("rate_spread", 0.0, 0.9), ("seen_at", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in [{low:g}, {high:g}]")
        if not self.question_every_s > 0:
            raise ConfigError(f"question_every_s={self.question_every_s} must be above 0 seconds")
        shares = asdict(self.mix)
        for name, share in shares.items():
            if not 0 <= share < float("inf"):
                raise ConfigError(f"mix.{name}={share} must not be negative")
        if not any(shares.values()):
            raise ConfigError("every share of mix is 0: raise one of " + ", ".join(f"mix.{name}" for name in SCENARIOS))
        if self.workers < 1 or (self.limit is not None and self.limit < 1) or self.seed < 0:
            raise ConfigError("workers and limit must be at least 1, seed at least 0")
        if self.writer == "endpoint":
            self.endpoint.validate()
        elif self.prompts is not None:
            raise ConfigError("prompts= has no meaning for writer=rules; give writer=endpoint")

    def where(self) -> Where:
        return Where(self.source, self.captions, self.path, self.media_root, self.fps, self.seen_at)

    def settings(self) -> Settings:
        return Settings(
            self.fps,
            self.tokens_per_second,
            self.rate_spread,
            self.question_every_s,
            self.seed,
            self.system,
            asdict(self.mix),
        )


def synth_command(options: SynthOptions) -> int:
    """Make real-time dialogues of captions: questions, answers from what has been seen so far, revisions when it
    changes, silence otherwise. What `out` holds already is left as it is when the same code made it of the same
    captions with the same options; a run that was stopped goes on where it was."""
    started = time.monotonic()
    made = synth(options, progress=True)
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    if made is None:
        print(f"{options.out}: up to date")
        return 0
    print_summary(made, options.out, console)
    usage = made["usage"]
    if usage is not None:
        console.print(
            f"{usage['requests']} requests and {usage['cached']} from disk, {usage['tokens_in']} tokens in, "
            f"{usage['tokens_out']} out, cost {usage['cost']:.4f}; {usage['retries']} retries, "
            f"{usage['repairs']} answers sent back"
        )
    console.print(f"{made['videos']} videos in {time.monotonic() - started:.1f} s")
    return 0


def synth(options: SynthOptions, progress: bool = False) -> dict[str, Any] | None:
    """Write the staging folder; returns its counts (see `Ledger.summary`), with `usage` of the endpoint, or None when
    `out` is up to date. `out` appears complete or not at all.

    Raises DataError when there is nothing to read, no video gave a stream, or `out` may not be replaced.
    """
    options.validate()
    out = Path(options.out)
    prompts = _prompts(options)
    tokenizer = load_tokenizer(TokenizerConfig(path=options.tokenizer))
    with closing(ShardStore()) as store:
        found = find_footage(options.where(), store)[: options.limit]
        made_by = _made_by(options, found, prompts, tokenizer)
        if _up_to_date(out, made_by):
            return None
        check_target(
            out, MARKER_NAME, "data synth", options.overwrite, "was made of other captions or with other options"
        )
        with resumable_folder(out, json.dumps(made_by, sort_keys=True)) as folder:
            ledger = Ledger(folder, options.copy, store)
            usage = _write(options, found, prompts, tokenizer, ledger, progress)
            if not ledger.summary()["samples"]:
                raise DataError(_nothing(options, ledger))
            return ledger.finish(made_by, usage) | {"usage": usage}


def _write(
    options: SynthOptions,
    found: list[tuple[str, Footage | SampleError]],
    prompts: dict,
    tokenizer: StreamTokenizer,
    ledger: Ledger,
    progress: bool,
) -> dict[str, Any] | None:
    """Adds an outcome for every video that has none yet; returns what the endpoint was asked for."""
    todo: list[Footage] = []
    footage: dict[str, Footage] = {}
    for key, one in found:
        if key in ledger.rows:
            continue
        if isinstance(one, SampleError):
            ledger.add(Outcome(key, None, (Rejection("video", "unreadable", one.reason),)), None)
        else:
            todo.append(one)
            footage[key] = one
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    with Progress(*columns, TextColumn("{task.fields[told]}"), console=console, disable=hidden, transient=True) as bar:
        shown = bar.add_task("writing dialogues", total=len(found), completed=len(found) - len(todo), told="")

        def done(outcome: Outcome, told: str = "") -> None:
            ledger.add(outcome, footage[outcome.key])
            bar.update(shown, advance=1, told=told)

        made = {"writer": options.writer, "seed": options.seed}
        if options.writer == "endpoint":
            made["model"] = str(options.endpoint.model)
            return asyncio.run(_by_endpoint(options, todo, prompts, tokenizer, made, done))
        for outcome in _by_rules(options, todo, tokenizer, made):
            done(outcome)
    return None


def _by_rules(options: SynthOptions, todo: list[Footage], tokenizer: StreamTokenizer, made: dict) -> Iterator[Outcome]:
    """The outcomes of the rule-based writer, in any order."""
    tasks = [todo[first : first + _VIDEOS_PER_TASK] for first in range(0, len(todo), _VIDEOS_PER_TASK)]
    if options.workers == 1 or len(tasks) < 2:
        for task in tasks:
            yield from _write_some(task, options.settings(), tokenizer, made)
        return
    # spawned, not forked: the caller may hold threads
    with ProcessPoolExecutor(min(options.workers, len(tasks)), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(_write_some, task, options.settings(), tokenizer, made) for task in tasks]
        try:
            for one in as_completed(running):
                yield from one.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _write_some(some: list[Footage], settings: Settings, tokenizer: StreamTokenizer, made: dict) -> list[Outcome]:
    async def write() -> list[Outcome]:
        writer = RuleWriter()
        return [await synthesise(footage, writer, settings, tokenizer, made) for footage in some]

    return asyncio.run(write())


async def _by_endpoint(
    options: SynthOptions,
    todo: list[Footage],
    prompts: dict,
    tokenizer: StreamTokenizer,
    made: dict,
    done: Callable[[Outcome, str], None],
) -> dict[str, Any]:
    """Videos side by side, each of which asks one thing at a time; the first error that stops the run stops all."""
    waiting = iter(todo)
    async with ChatClient(options.endpoint) as client:
        writer = EndpointWriter(client, prompts)

        async def work() -> None:
            for footage in waiting:
                outcome = await synthesise(footage, writer, options.settings(), tokenizer, made)
                usage = client.usage
                told = f"{usage.tokens_in + usage.tokens_out} tokens, cost {usage.cost:.2f}, {usage.retries} retries"
                done(outcome, told)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(options.endpoint.concurrency, len(todo))):
                    group.create_task(work())
        except* (ConfigError, DataError) as errors:
            raise errors.exceptions[0] from None
        return client.figures()


def _prompts(options: SynthOptions) -> dict:
    if options.writer != "endpoint":
        return {}
    return load_prompts(Path(options.prompts) if options.prompts else SHIPPED_PROMPTS)


def _made_by(
    options: SynthOptions,
    found: list[tuple[str, Footage | SampleError]],
    prompts: dict,
    tokenizer: StreamTokenizer,
) -> dict[str, Any]:
    """What tells one synthesis from another: captions, settings and code; nothing of it is secret."""
    read = hashlib.sha256()
    for key, one in found:
        told = one.reason if isinstance(one, SampleError) else repr((one.timeline, one.medium))
        read.update(f"{key}\n{told}\n".encode())
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    made_by: dict[str, Any] = {
        "source": options.source,
        "writer": options.writer,
        "settings": asdict(options.settings()),
        "tokenizer": tokenizer.fingerprint,
        "captions": read.hexdigest(),
        "code": code.hexdigest(),
    }
    if options.writer == "endpoint":
        made_by["endpoint"] = options.endpoint.settings()
        made_by["prompts"] = hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()
    return made_by


def _up_to_date(out: Path, made_by: dict) -> bool:
    marker = out / MARKER_NAME
    if not marker.is_file():
        return False
    first = marker.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return first == json.dumps({"made_by": made_by}, ensure_ascii=False)


def _nothing(options: SynthOptions, ledger: Ledger) -> str:
    summary = ledger.summary()
    first = next((row["rejections"][-1] for row in ledger.rows.values() if row["rejections"]), None)
    why = f"; the first: {first['reason']}: {first['detail']}" if first else ""
    return f"{options.path or options.captions}: none of {summary['videos']} videos gave a stream{why}"
