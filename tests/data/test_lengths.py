"""Lengths are those of the compiled streams, are measured once, and anew whenever they could be others."""

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_samples import caption_json, numbered_clip, packed_streams, still, stream_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moss_train.data.config import DataConfig
from moss_train.data.corpus import Corpus, load_source
from moss_train.data.shards import lengths as lengths_module
from moss_train.data.shards.index import load_index
from moss_train.data.shards.index_build import build_index
from moss_train.data.shards.lengths import LENGTHLESS, lengths_of, stored_lengths
from moss_train.errors import DataError, SampleError
from moss_train.streams.config import AugmentationConfig, CompilerConfig, TokenizerConfig
from moss_train.streams.split import RowBudget
from moss_train.streams.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(TokenizerConfig())
CLIP, STILL = numbered_clip(24, 4), still(3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moss_train" / "lengths"


def opened(folder: Path, compiler: CompilerConfig | None = None, **data) -> Corpus:
    return load_source(folder, TOKENIZER, compiler, 64, DataConfig(**data))


def write_source(folder: Path, samples: list[bytes]) -> None:
    """A shard of samples `0`, `1`, …, each with a clip and a still."""
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        for number, text in enumerate(samples):
            for member, data in (("json", text), ("mp4", CLIP), ("png", STILL)):
                entry = tarfile.TarInfo(f"{number}.{member}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    build_index(folder)


TEXTS = st.text("ab red?", min_size=1, max_size=80)


@st.composite
def samples(draw) -> bytes:
    kind = draw(st.sampled_from(["caption", "still", "text", "stream", "dialogue", "broken"]))
    if kind == "broken":
        return draw(st.sampled_from([b"{", b"[]", b'{"schema": "moss_train/stream@1"}']))
    if kind == "stream":
        sample = stream_json("k", draw(st.integers(1, 24)), text=draw(TEXTS.filter(str.strip)))
        sample["sampling"]["fps"] = draw(st.sampled_from([0.5, 1.0, 4.0]))
    elif kind == "dialogue":
        turns = [{"role": role, "content": draw(TEXTS)} for role in ("user", "assistant") * draw(st.integers(1, 2))]
        sample = caption_json("k", "mp4") | {"schema": "moss_train/conversation@1", "messages": turns}
        del sample["text"]
    else:
        sample = caption_json("k", {"caption": "mp4", "still": "png", "text": None}[kind], draw(TEXTS))
    return json.dumps(sample).encode()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(samples(), min_size=1, max_size=6),
    budget=st.none() | st.builds(RowBudget, st.integers(30, 90), st.integers(2, 12)),
    jitter=st.booleans(),
)
def test_lengths_are_those_of_the_compiled_streams(tmp_path_factory, texts, budget, jitter: bool):
    folder = tmp_path_factory.mktemp("lengths") / "source"
    write_source(folder, texts)
    corpus = opened(folder, CompilerConfig(jitter_probability=0.5 if jitter else 0.0, max_frames=16))
    lengths = lengths_of(corpus, budget)
    expected, faults = [], {}
    for number in range(len(corpus)):
        try:
            parts = corpus.compile_all(number, budget, np.random.default_rng(number))
            expected += [(number, place, len(part.ids), len(part.frames)) for place, part in enumerate(parts)]
            assert [part.part for part in parts] == list(range(len(parts)))
            assert len(corpus.compile(number, len(parts) - 1, budget=budget).ids) == len(parts[-1].ids)
        except SampleError as error:
            faults[number] = error.reason
    columns = zip(lengths.samples, lengths.parts, lengths.tokens, lengths.frames, strict=True)
    assert [tuple(map(int, unit)) for unit in columns] == expected and lengths.faults == faults
    again = stored_lengths(opened(folder, CompilerConfig(max_frames=16)), budget)
    assert again is not None and again.digest == lengths.digest and again.faults == faults
    assert [a.tolist() for a in (again.samples, again.tokens)] == [
        a.tolist() for a in (lengths.samples, lengths.tokens)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """9 streams in shards of 4."""
    return packed_streams(tmp_path_factory.mktemp("lengths"), 9, shard_samples=4)


def measured(monkeypatch) -> list[int]:
    """How often something is measured."""
    counts: list[int] = []
    measure = lengths_module._measure
    monkeypatch.setattr(lengths_module, "_measure", lambda *rest: (counts.append(1), measure(*rest))[1])
    return counts


def test_measured_once_and_anew_when_they_could_be_others(folder: Path, monkeypatch):
    counts = measured(monkeypatch)
    first = lengths_of(opened(folder))
    assert lengths_of(opened(folder)).digest == first.digest and len(counts) == 1
    same = {"jitter_probability": 0.5, "jitter_shifts": [-2, 1], "window": 3, "sinks": 1}
    same |= {"train_turn_end_offline": False, "stale_silence_guard": False}
    same |= {"text_window": 9, "text_sinks": 2, "positions": "decoupled", "visibility": "offline"}
    same |= {"train_turn_end_streams": True, "confirmation_weight": 0.5}
    assert set(same) == set(LENGTHLESS)
    drawn = AugmentationConfig([1, 2], [0, 1], [3, 4], [0, 1], keep_silence=0.5, keep_silence_within_s=1.0)
    assert lengths_of(opened(folder, CompilerConfig(**same, augment=drawn))).digest == first.digest
    assert lengths_of(opened(folder), seed=1).digest == first.digest and len(counts) == 1
    others = [CompilerConfig(fps=2.0), CompilerConfig(max_frames=4), CompilerConfig(tokens_per_second=5.0)]
    digests = {first.digest} | {lengths_of(opened(folder, compiler)).digest for compiler in others}
    assert len(digests) == 4 and len(counts) == 4
    assert lengths_of(opened(folder), RowBudget(20, 3)).digest not in digests and len(counts) == 5
    other = load_tokenizer(TokenizerConfig(vocabulary_size=TOKENIZER.vocabulary_size + 7))
    assert lengths_of(load_source(folder, other)).digest not in digests and len(counts) == 6


def test_other_contents_or_other_facts_have_other_lengths(folder: Path, tmp_path: Path, monkeypatch):
    counts = measured(monkeypatch)
    first = lengths_of(opened(folder))
    counts.clear()
    index = load_index(folder)
    index.facts_digest = "another"  # as when a newer FFmpeg tells another duration
    assert lengths_of(Corpus("c", index, TOKENIZER)).digest != first.digest and len(counts) == 1
    other = packed_streams(tmp_path, 9, prefix="t")
    assert lengths_of(opened(other)).digest != first.digest and len(counts) == 2


def test_damaged_tables_are_measured_again(folder: Path):
    first = lengths_of(opened(folder))
    (path,) = [p for p in folder.glob("lengths-*.arrow") if stored_lengths(opened(folder)) and _holds(p, first)]
    whole = path.read_bytes()
    for damaged in (b"", whole[:300], whole.replace(b"lengths@1", b"lengths@9"), _flipped(whole, first)):
        path.write_bytes(damaged)
        assert stored_lengths(opened(folder)) is None
        assert lengths_of(opened(folder)).digest == first.digest
        assert path.read_bytes() == whole


def _holds(path: Path, lengths) -> bool:
    return lengths.digest.encode() in path.read_bytes()


def _flipped(whole: bytes, lengths) -> bytes:
    """One token count changed."""
    place = whole.index(np.ascontiguousarray(lengths.tokens).tobytes())
    return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


def test_processes_measure_what_one_measures(folder: Path, tmp_path: Path, monkeypatch, cache: Path):
    alone = lengths_of(opened(folder))
    monkeypatch.setattr(lengths_module, "_FEW_SAMPLES", 0)
    monkeypatch.setattr(lengths_module, "_JOB_SAMPLES", 2)
    for path in folder.glob("lengths-*.arrow"):
        path.unlink()
    write = lengths_module.write_arrow

    def refused(path: Path, *rest):
        if path.parent == folder:
            raise PermissionError(13, "the source may only be read")
        write(path, *rest)

    monkeypatch.setattr(lengths_module, "write_arrow", refused)
    assert lengths_of(opened(folder), workers=2).digest == alone.digest
    assert len(list(cache.iterdir())) == 1 and not list(folder.glob("lengths-*"))
    assert stored_lengths(opened(folder)).digest == alone.digest


HOSTILE = """
import os
import moss_train.data.shards.measure as measure
compile_entry = measure.compile_entry
def hostile(entry, *rest):
    if entry.key == "s002":
        os.abort()
    if entry.key == "s006":
        raise MemoryError
    return compile_entry(entry, *rest)
measure.compile_entry = hostile
from moss_train.data.decoding.worker import main
main()
"""


def test_a_sample_that_ends_the_process_has_no_length(folder: Path, monkeypatch):
    monkeypatch.setattr(lengths_module, "_FEW_SAMPLES", 0)
    monkeypatch.setattr(lengths_module, "_JOB_SAMPLES", 2)
    start = subprocess.Popen
    monkeypatch.setattr(
        "moss_train.data.decoding.pool.subprocess.Popen",
        lambda command, **options: start([command[0], "-c", HOSTILE], **options),
    )
    lengths = lengths_of(opened(folder, CompilerConfig(tokens_per_second=7.0)), workers=1)
    assert lengths.samples.tolist() == [0, 1, 3, 4, 5, 7, 8]
    assert lengths.faults == {
        2: "the process died over compiling (exit code -6)",
        6: "it needs more memory than allowed (decode_memory_mb)",
    }


def test_a_shard_that_cannot_be_read_is_no_fault_of_its_samples(tmp_path: Path):
    source = packed_streams(tmp_path, 3)
    corpus = opened(source)
    os.unlink(source / "shard-000000.tar")
    with pytest.raises(DataError, match="cannot read .*shard-000000.tar"):
        lengths_of(corpus)
    assert not list(source.glob("lengths-*"))
    with pytest.raises(ValueError, match="without a tokenizer"):
        lengths_of(Corpus(corpus.name, corpus.index))
