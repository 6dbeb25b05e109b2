"""Packing and the index: what went in comes out, byte for byte, and damage is noticed and named."""

import json
import os
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from data_samples import (
    caption_json,
    numbered_clip,
    packed_streams,
    split_pack,
    stage,
    stage_streams,
    still,
    stream_json,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moss_train.data.corpus import load_source
from moss_train.data.shards.index import INDEX_NAME, load_index
from moss_train.data.shards.index_build import build_index
from moss_train.data.shards.index_command import IndexOptions, index_command
from moss_train.data.shards.pack import REJECTED_NAME, PackOptions, pack, pack_command
from moss_train.errors import DataError


def test_round_trip(tmp_path: Path):
    staging, out = tmp_path / "staging", tmp_path / "out"
    stage_streams(staging, 3)
    two = caption_json("two", "0.png")
    two["media"].append({"id": "m1", "kind": "video", "member": "1.avi"})
    stage(staging, "two", two, _0_png=still(1), _1_avi=numbered_clip(4, 4, "avi"))
    stage(staging, "words", caption_json("words", None))
    packed, rejected, _ = pack(staging, out)
    assert (packed, rejected) == (5, [])
    corpus = load_source(out)
    assert corpus.index.keys(range(5)) == ["s000", "s001", "s002", "two", "words"]
    for number, entry in enumerate(corpus.index.samples()):
        assert corpus.index.number(entry.key) == number and corpus.key(number) == entry.key
        for member in entry.members:
            assert corpus.member(number, member) == (staging / f"{entry.key}.{member}").read_bytes()
    assert [corpus.entry(number).kind for number in range(5)] == ["stream"] * 3 + ["caption"] * 2
    assert [corpus.entry(number).modality for number in range(5)] == ["video"] * 4 + ["text"]
    facts = corpus.entry(1).media["mp4"]
    assert (facts.width, facts.height, facts.frame_count, facts.codec) == (64, 32, 6, "h264")
    assert set(corpus.entry(3).media) == {"0.png", "1.avi"}
    assert corpus.media_info(4) == {}
    with pytest.raises(KeyError):
        corpus.index.number("nobody")
    with pytest.raises(IndexError):
        corpus.entry(5)


def test_packing_twice_gives_the_same_bytes_and_fingerprint(tmp_path: Path):
    stage_streams(tmp_path / "staging", 3)
    for name in ("a", "b"):
        pack(tmp_path / "staging", tmp_path / name)
    first, second = load_index(tmp_path / "a"), load_index(tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    assert (tmp_path / "a" / "shard-000000.tar").read_bytes() == (tmp_path / "b" / "shard-000000.tar").read_bytes()


def test_shards_are_begun_by_size_and_webdataset_reads_them(tmp_path: Path):
    import webdataset

    staging, out = tmp_path / "staging", tmp_path / "out 50%"
    for number in range(4):
        stage(staging, f"k{number}", caption_json(f"k{number}", "png", "x" * 600_000), png=still(number))
    assert pack_command(PackOptions(str(staging), str(out), shard_mb=1)) == 0
    shards = sorted(out.glob("*.tar"))
    assert len(shards) == 2
    read = list(webdataset.WebDataset([str(p) for p in shards], shardshuffle=False))
    assert [s["__key__"] for s in read] == ["k0", "k1", "k2", "k3"]
    assert read[2]["png"] == still(2) and set(read[2]) >= {"json", "png"}


def test_webdataset_reads_the_members_that_we_read(tmp_path: Path):
    """Our reading by byte ranges and webdataset's own give the same samples in the same order, byte for byte."""
    import webdataset

    staging, out = tmp_path / "staging", tmp_path / "out"
    stage_streams(staging, 3)
    two = caption_json("two", "0.png")
    two["media"].append({"id": "m1", "kind": "video", "member": "1.avi"})
    stage(staging, "two", two, _0_png=still(1), _1_avi=numbered_clip(4, 4, "avi"))
    stage(staging, "words", caption_json("words", None))
    split_pack(staging, out, 2)
    corpus = load_source(out)
    theirs = {}
    for sample in webdataset.WebDataset([str(p) for p in sorted(out.glob("*.tar"))], shardshuffle=False):
        theirs[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
    assert list(theirs) == corpus.index.keys(range(len(corpus)))
    for number, members in enumerate(theirs.values()):
        assert members == {member: corpus.member(number, member) for member in corpus.entry(number).members}


def test_bad_samples_are_left_out_by_key_with_a_reason(tmp_path: Path, capsys):
    staging, out = tmp_path / "staging", tmp_path / "out"
    stage_streams(staging, 2)
    stage(staging, "absent", stream_json("absent"))
    stage(staging, "broken", b'{"schema": ', mp4=numbered_clip(2, 4))
    stage(staging, "wrong", caption_json("wrong") | {"colour": "red"}, png=still(1))
    stage(staging, "extra", caption_json("extra"), png=still(1), jpg=still(1, "JPEG"))
    (staging / "alone.mp4").write_bytes(numbered_clip(2, 4))
    stage(staging, "l" * 97, caption_json("l"), png=still(1))
    assert pack_command(PackOptions(str(staging), str(out))) == 0
    ledger = [json.loads(line) for line in (out / REJECTED_NAME).read_text().splitlines()]
    reasons = {entry["key"]: entry["reason"] for entry in ledger}
    assert set(reasons) == {"absent", "broken", "wrong", "extra", "alone", "l" * 97}
    assert "absent.mp4 is missing" in reasons["absent"] and "not JSON" in reasons["broken"]
    assert "colour" in reasons["wrong"] and "jpg" in reasons["extra"] and "without alone.json" in reasons["alone"]
    assert load_source(out).index.keys([0, 1]) == ["s000", "s001"] and len(load_source(out)) == 2
    assert "6 left out" in capsys.readouterr().out


def test_nothing_half_written_and_nothing_overwritten_unasked(tmp_path: Path, monkeypatch):
    staging, out = tmp_path / "staging", tmp_path / "out"
    stage_streams(staging, 2)
    pack(staging, out)
    before = load_index(out).fingerprint
    with pytest.raises(DataError, match="exists"):
        pack(staging, out)
    (staging / "s000.mp4").unlink()
    (staging / "s001.mp4").unlink()
    with pytest.raises(DataError, match="no sample that can be packed"):
        pack(staging, out, overwrite=True)
    assert load_index(out).fingerprint == before
    stage_streams(staging, 3)
    interrupted = "moss_train.data.shards.pack.build_index"
    monkeypatch.setattr(interrupted, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        pack(staging, out, overwrite=True)
    monkeypatch.undo()
    assert load_index(out).fingerprint == before
    pack(staging, out, overwrite=True)
    assert len(load_index(out)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "staging"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="did not write"):
        pack(staging, tmp_path / "home", overwrite=True)
    with pytest.raises(DataError, match="not a staging folder"):
        pack(tmp_path / "nowhere", tmp_path / "new")


def test_an_undecodable_video_is_packed_and_named_by_the_index(tmp_path: Path):
    staging, out = tmp_path / "staging", tmp_path / "out"
    stage_streams(staging, 1)
    stage(staging, "bad", stream_json("bad"), mp4=numbered_clip(6, 4)[:300])
    pack(staging, out)
    reason = load_index(out).sample(0).media["mp4"]
    assert isinstance(reason, str) and "cannot be read" in reason


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return packed_streams(tmp_path, 4, shard_samples=2)


def expect_load_error(folder: Path, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        load_index(folder)
    for part in parts:
        assert part in str(caught.value), caught.value


def test_missing_shard_and_missing_index(packed: Path):
    (packed / "shard-000001.tar").unlink()
    expect_load_error(packed, "shard-000001.tar is missing")
    (packed / INDEX_NAME).unlink()
    expect_load_error(packed, "index.arrow is missing", "data index path=")
    (packed / "shard-000000.tar").unlink()
    expect_load_error(packed, "holds no *.tar")
    expect_load_error(packed / "nowhere", "not a folder")


def test_stale_index(packed: Path):
    shard = packed / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data + bytes(512))
    expect_load_error(packed, "shard-000000.tar has", "its index says")
    data[600] ^= 1
    shard.write_bytes(data)
    expect_load_error(packed, "not the file that was indexed", "checksum")
    assert index_command(IndexOptions(str(packed))) == 0
    load_index(packed)
    shutil.copy(shard, packed / "shard-000009.tar")
    expect_load_error(packed, "shard-000009.tar is not in the index")


def test_a_copied_source_is_fresh_and_keeps_its_fingerprint(packed: Path, tmp_path: Path):
    shutil.copytree(packed, tmp_path / "copy", copy_function=shutil.copy)
    os.utime(tmp_path / "copy" / "shard-000000.tar", (1, 1))
    assert load_index(tmp_path / "copy").fingerprint == load_index(packed).fingerprint


def test_damaged_index(packed: Path):
    path = packed / INDEX_NAME
    data = path.read_bytes()
    for damaged in (data[:-9], data[:500], b"", b"ARROW1\0\0", b"{}" * 500, data.replace(b"index@2", b"index@7")):
        path.write_bytes(damaged)
        expect_load_error(packed, "index.arrow is damaged", "data index path=")


@given(place=st.floats(0, 1), bit=st.integers(0, 7))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_flipped_bit_of_the_index_is_an_error_or_changes_no_plan(packed: Path, place: float, bit: int):
    """Never a crash of the process, never another order of samples."""
    path = packed / INDEX_NAME
    whole, sound = path.read_bytes(), load_index(packed)
    data = bytearray(whole)
    data[min(int(place * len(data)), len(data) - 1)] ^= 1 << bit
    try:
        path.write_bytes(data)
        with suppress(DataError):
            index = load_index(packed)
            assert np.array_equal(index.shard_numbers, sound.shard_numbers)
            assert np.array_equal(index.kinds, sound.kinds) and np.array_equal(index.modalities, sound.modalities)
            list(index.samples())
            with suppress(KeyError):
                index.number("s001")
    finally:
        path.write_bytes(whole)


def test_truncated_tar(packed: Path):
    shard = packed / "shard-000001.tar"
    data = shard.read_bytes()
    end = len(data.rstrip(b"\0"))
    for length in (100, 700, len(data) // 2, end - 5, -(-end // 512) * 512):
        shard.write_bytes(data[:length])
        with pytest.raises(DataError, match="shard-000001.tar .*(cut short|no readable tar)"):
            build_index(packed)
    shard.write_bytes(b"\x1f\x8b" + data)
    with pytest.raises(DataError, match="no readable tar"):
        build_index(packed)


@pytest.mark.parametrize("name", ["../up.json", "/root.json", "a/../../b.json", "noextension", ".json"])
def test_hostile_and_nameless_members_are_refused(tmp_path: Path, name: str):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match="member"):
        build_index(tmp_path)


def test_links_doubled_members_and_scattered_parts_are_refused(tmp_path: Path):
    def write(*names: str, link: bool = False) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name in names:
                entry = tarfile.TarInfo(name)
                if link:
                    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(entry)

    write("a.json", link=True)
    with pytest.raises(DataError, match="plain file"):
        build_index(tmp_path)
    write("a.json", "a.json")
    with pytest.raises(DataError, match="stands twice"):
        build_index(tmp_path)
    write("a.json", "b.json", "a.mp4")
    with pytest.raises(DataError, match="'a'.*side by side"):
        build_index(tmp_path)


def test_index_of_foreign_tars(tmp_path: Path):
    """Tars made by others: folders in names, upper-case extensions, samples without or with broken JSON."""
    clip = numbered_clip(3, 4)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in [
            ("part/a.MP4", clip),
            ("part/a.json", json.dumps(caption_json("a", "mp4")).encode()),
            ("part/b.mp4", clip),
            ("c.json", b"[1"),
        ]:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            import io

            tar.addfile(entry, io.BytesIO(data))
    build_index(tmp_path)
    corpus = load_source(tmp_path)
    assert [(s.key, s.kind) for s in corpus.index.samples()] == [
        ("part/a", "caption"),
        ("part/b", "invalid"),
        ("c", "invalid"),
    ]
    assert corpus.sample(0).media[0].member == "mp4" and corpus.member(0, "mp4") == clip
