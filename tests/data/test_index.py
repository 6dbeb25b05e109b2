"""The index: what is stored comes back, an indexing goes on where it was stopped, no file takes it along."""

import fcntl
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from data_samples import caption_json, numbered_clip, packed_streams, read_numbers, still
from faulty_server import FaultyServer, faulty_server
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_train.data.config import MODALITIES, DataConfig
from moss_train.data.corpus import load_source
from moss_train.data.decoding.probe import MediaProbe
from moss_train.data.shards import describe_shards
from moss_train.data.shards.index import INDEX_NAME, fingerprint_of, load_index
from moss_train.data.shards.index_build import PARTIAL_FOLDER, build_index
from moss_train.data.shards.index_command import IndexOptions, index_command
from moss_train.data.shards.index_rows import KINDS, IndexedSample, Member, ShardFacts, read_row, write_rows
from moss_train.data.shards.storage import ShardStore
from moss_train.errors import ConfigError, DataError, SampleError
from moss_train.streams.compiled import FrameRequest
from moss_train.streams.config import TokenizerConfig
from moss_train.streams.tokenizer import load_tokenizer

VALUES = {str: st.text(max_size=5), bool: st.booleans(), int: st.integers(0, 2**40), float: st.floats(allow_nan=False)}
PROBES = st.builds(
    MediaProbe,
    **{
        name: next(values for kind, values in VALUES.items() if hint in (kind, kind | None))
        | (st.none() if hint not in VALUES else st.nothing())
        for name, hint in get_type_hints(MediaProbe).items()
    },
)
MEMBERS = st.builds(Member, st.integers(0, 2**62), st.integers(0, 2**62), st.binary(min_size=16, max_size=16))
SAMPLES = st.builds(
    IndexedSample,
    key=st.text(min_size=1, max_size=20),
    shard=st.integers(0, 2**31 - 1),
    kind=st.sampled_from(KINDS),
    modality=st.sampled_from(MODALITIES),
    members=st.dictionaries(st.text(max_size=5), MEMBERS, max_size=3),
    media=st.dictionaries(st.text(max_size=5), PROBES | st.text(max_size=9), max_size=2),
    text_tokens=st.none() | st.integers(0, 2**31 - 1),
)


@settings(deadline=None, max_examples=20)
@given(samples=st.lists(SAMPLES, min_size=1, max_size=6))
def test_rows_come_back_as_they_were(samples: list[IndexedSample]):
    batch = write_rows(samples)
    batch.validate(full=True)
    assert [read_row(batch, row) for row in range(len(samples))] == samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """12 streams in shards of 3."""
    return packed_streams(tmp_path_factory.mktemp("index"), 12, shard_samples=3)


def test_rows_are_found_in_batches_of_any_size(folder: Path, tmp_path: Path, monkeypatch):
    whole = list(load_index(folder).samples())
    for rows in (1, 4, 5, 12, 100):
        for module in ("index", "index_merge"):
            monkeypatch.setattr(f"moss_train.data.shards.{module}.BATCH_ROWS", rows)
        index = build_index(folder, tmp_path / str(rows))
        assert list(index.samples()) == whole and index.shard_numbers.tolist() == [n // 3 for n in range(12)]
        assert [index.number(sample.key) for sample in whole] == list(range(12))
        assert index.fingerprint == load_index(folder).fingerprint


def test_totals_texts_and_modalities(tmp_path: Path):
    texts = {"text": "a few words", "image": "a still", "video": "a clip"}
    media = {"text": (None, b""), "image": ("png", still(1)), "video": ("mp4", numbered_clip(8, 4))}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, (member, data) in media.items():
            parts = [("json", json.dumps(caption_json(name, member, texts[name])).encode())]
            for extension, content in parts + ([(member, data)] if member else []) + [("txt", b"by the way")]:
                entry = tarfile.TarInfo(f"{name}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    tokenizer = load_tokenizer(TokenizerConfig())
    index = build_index(tmp_path, tokenizer=tokenizer)
    assert [MODALITIES[code] for code in index.modalities] == ["text", "image", "video"]
    assert index.text_tokens().tolist() == [len(tokenizer.encode(texts[name])) for name in texts]
    assert index.totals.kinds == {"caption": 3} and index.totals.modalities == dict.fromkeys(texts, 1)
    assert index.totals.video_hours == pytest.approx(2 / 3600) and index.totals.unreadable_media == 0
    assert (
        index.totals.text_tokens == index.text_tokens().sum()
        and index.tokenizer["fingerprint"] == tokenizer.fingerprint
    )
    assert set(index.sample(1).members) == {"json", "png", "txt"} and set(index.sample(1).media) == {"png"}
    assert build_index(tmp_path).text_tokens().tolist() == [-1] * 3


def test_processes_find_what_one_finds(folder: Path, tmp_path: Path):
    alone, many = build_index(folder, tmp_path / "a"), build_index(folder, tmp_path / "b", workers=2)
    assert list(many.samples()) == list(alone.samples())
    assert (many.fingerprint, many.facts_digest) == (alone.fingerprint, alone.facts_digest)


KILLED = """
import os, signal, sys
from moss_train.data.shards import describe_shards, index_build
write, done = describe_shards.write_partial, []
def write_partial(*arguments):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)
    done.append(1)
describe_shards.write_partial = write_partial
index_build.build_index(sys.argv[1], sys.argv[2])
"""


def test_an_indexing_that_was_killed_goes_on_where_it_was(folder: Path, tmp_path: Path, monkeypatch):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(tmp_path / "out")], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    partials = list((tmp_path / "out" / PARTIAL_FOLDER).glob("*.arrow"))
    assert len(partials) == 2
    partials[0].write_bytes(partials[0].read_bytes()[:100])  # one of them did not reach the disk
    scanned: list[Path] = []
    note_scans(monkeypatch, scanned)
    index = build_index(folder, tmp_path / "out")
    assert len(scanned) == 3
    assert list(index.samples()) == list(load_index(folder).samples())
    assert [path.name for path in (tmp_path / "out").iterdir()] == [INDEX_NAME]


def test_two_do_not_index_the_same_source_at_once(folder: Path, tmp_path: Path):
    partials = tmp_path / "out" / PARTIAL_FOLDER
    partials.mkdir(parents=True)
    with (partials / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="being indexed by another process"):
            build_index(folder, tmp_path / "out")
    assert len(build_index(folder, tmp_path / "out")) == 12


def test_a_signature_of_a_url_is_no_part_of_the_fingerprint():
    def fingerprint(name: str) -> str:
        return fingerprint_of([ShardFacts(name, 1, None, "0", 1)])

    assert fingerprint("https://h/a.tar?sig=1") == fingerprint("https://h/a.tar?sig=2") == fingerprint("/x/a.tar")
    assert fingerprint("/x/a.tar") != fingerprint("/x/b.tar")


def note_scans(monkeypatch, scanned: list[Path]) -> None:
    """Note which shards are scanned."""
    scan = describe_shards.scan_shard
    monkeypatch.setattr(describe_shards, "scan_shard", lambda path, *rest: (scanned.append(path), scan(path, *rest))[1])


def test_what_was_found_counts_only_for_the_same_shard_and_settings(folder: Path, tmp_path: Path, monkeypatch):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for shard in folder.glob("*.tar"):
        (source / shard.name).write_bytes(shard.read_bytes())
    monkeypatch.setattr("moss_train.data.shards.index_build.shutil.rmtree", lambda path: None)
    build_index(source, out)
    scanned: list[Path] = []
    note_scans(monkeypatch, scanned)
    build_index(source, out)
    assert scanned == []
    os.utime(source / "shard-000001.tar", (1, 1))
    build_index(source, out)
    assert [path.name for path in scanned] == ["shard-000001.tar"]
    build_index(source, out, tokenizer=load_tokenizer(TokenizerConfig()))
    assert len(scanned) == 5


HOSTILE = """
import os, time
import moss_train.data.decoding.describe as describe
probe = describe.probe_media
def hostile(data, *rest):
    if data.endswith(b"CRASH"):
        os.abort()
    if data.endswith(b"HANGS"):
        time.sleep(600)
    return probe(data, *rest)
describe.probe_media = hostile
from moss_train.data.decoding.worker import main
main()
"""


def test_a_file_over_which_the_probe_crashes_or_hangs_costs_one_medium(tmp_path: Path, monkeypatch):
    clip = numbered_clip(3, 4)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, end in {"a": b"", "b": b"CRASH", "c": b"HANGS", "d": b""}.items():
            data = clip + end
            for member, content in (("json", json.dumps(caption_json(name, "mp4")).encode()), ("mp4", data)):
                entry = tarfile.TarInfo(f"{name}.{member}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    start = subprocess.Popen
    monkeypatch.setattr(
        "moss_train.data.decoding.pool.subprocess.Popen",
        lambda command, **options: start([command[0], "-c", HOSTILE], **options),
    )
    index = build_index(tmp_path, workers=2, data=DataConfig(decode_timeout_s=3))
    assert index.totals.unreadable_media == 2 and index.totals.kinds == {"caption": 4}
    assert index.sample(1).media["mp4"] == "the process died over the probe (exit code -6)"
    assert index.sample(2).media["mp4"] == "the probe took longer than 3 s (decode_timeout_s)"
    assert isinstance(index.sample(3).media["mp4"], MediaProbe)
    corpus = load_source(tmp_path)
    for number in range(4):  # their bytes were digested all the same
        assert corpus.member(number, "mp4").startswith(clip)
    with pytest.raises(SampleError, match="the process died over the probe"):
        corpus.media_info(1)


def test_changed_bytes_are_no_sample(folder: Path, tmp_path: Path):
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes((folder / "shard-000000.tar").read_bytes())
    index = build_index(tmp_path)
    corpus = load_source(tmp_path, load_tokenizer(TokenizerConfig()), image_size=64)
    before, data = shard.stat(), bytearray(shard.read_bytes())
    for member in ("json", "mp4"):
        place = index.sample(1).members[member]
        data[place.offset + place.size // 2] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert len(load_index(tmp_path)) == 3
    for read in (lambda: corpus.member(1, "mp4"), lambda: corpus.sample(1), lambda: corpus.compile(1)):
        with pytest.raises(SampleError, match="bytes differ from those that were indexed"):
            read()
    requests = [FrameRequest("v0", 0.0)]
    assert read_numbers(corpus.frames(2, requests), 32) == [2]
    corpus._media_names[1] = {"v0": "mp4"}
    with pytest.raises(SampleError, match="'s001': its bytes differ"):
        corpus.frames(1, requests)


@pytest.fixture
def server():
    with faulty_server() as running:
        yield running


def test_remote_shards_and_a_remote_index(folder: Path, tmp_path: Path, server: FaultyServer):
    for path in folder.iterdir():
        server.files[f"/data/{path.name}"] = path.read_bytes()
    server.fail("/data/shard-000001.tar", ("drop", 700), 503)
    local = load_index(folder)
    store = ShardStore(str(tmp_path / "cache"), sleep=lambda seconds: None)
    with pytest.raises(DataError, match="out=<folder>"):
        build_index(f"{server.url}/data/shard-{{000000..000003}}.tar", store=store)
    index = build_index(f"{server.url}/data/shard-{{000000..000003}}.tar", tmp_path / "out", workers=1, store=store)
    assert index.fingerprint == local.fingerprint and list(index.samples()) == list(local.samples())
    assert index.shard_location(2) == f"{server.url}/data/shard-000002.tar" and index.shards[2].mtime_ns is None
    whole = load_source(folder, image_size=64)
    for path in (tmp_path / "out", f"{server.url}/data"):
        opened = load_source(path, image_size=64, store=store)
        assert opened.index.fingerprint == local.fingerprint and opened.member(4, "json") == whole.member(4, "json")
        requests = [FrameRequest("v0", 0.25), FrameRequest("v0", 1.0)]
        assert np.array_equal(opened.frames(4, requests), whole.frames(4, requests))
    with pytest.raises(DataError, match="cannot be fetched.* run `moss-train data index path=.*/nothing out=<folder>`"):
        load_index(f"{server.url}/nothing", store)
    store.close()


def test_the_command(folder: Path, tmp_path: Path, capsys):
    assert index_command(IndexOptions(str(folder), str(tmp_path / "out"), workers=1)) == 0
    printed = capsys.readouterr().out
    assert "12 samples in 4 shards" in printed and "12 streams of" in printed and "12 with video" in printed
    assert len(list((tmp_path / "out").glob("lengths-*.arrow"))) == 1
    with pytest.raises(ConfigError, match="one budget"):
        IndexOptions(str(folder), pack_frames=3).validate()


def test_a_shard_that_changes_while_it_is_read(folder: Path, tmp_path: Path, monkeypatch):
    shard = tmp_path / "x.tar"
    shard.write_bytes((folder / "shard-000000.tar").read_bytes())
    add = describe_shards._Findings.add

    def changing(self, sample):
        os.utime(shard, (random.randrange(10**9), random.randrange(10**9)))
        add(self, sample)

    monkeypatch.setattr(describe_shards._Findings, "add", changing)
    with pytest.raises(DataError, match="x.tar was changed while it was indexed"):
        build_index(tmp_path)
